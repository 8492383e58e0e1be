"""The compiled kernels as functions: from the disk cache, or compiled first.

Numba compiles them once for each CPU and kind of weights, which takes 10 to 20 seconds; with its own cache
it would still be imported at every start. Here the object code is kept and linked by LLVM alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.atomic import replacing

_log = logging.getLogger(__name__)
# That are compiled once for all models.
_MODULES = ("loads", "turns", "foretell", "choices", "draft_rows", "matches", "page_guard")
_TIMEOUT = 600.0  # seconds: much longer than it takes


@dataclass(frozen=True)
class Kinds:
    """Which code: dtype names that stand for the weights' format, the cache's type and the formats of draft head and
    draft layers (:mod:`engine.kernels.matmul` says which), and which models it is for: ``dense``, or with
    ``experts``, whose code takes longer to compile."""

    weights: str
    cache: str
    draft_head: str
    draft_layers: str
    models: str = "dense"


@dataclass(frozen=True)
class Program:
    """The entry points; :func:`engine.kernels.program.native_code` says what they do. ``work`` runs without the
    interpreter lock; the others keep it: they are short, and to have the lock back would take longer."""

    work: Callable[[int, int, int], None]  # control block, rank, patience
    publish: Callable[[int], None]  # control block
    copy_slot: Callable[[int, int, int, int], None]  # control block, layers, source, target


@cache
def load_foretell() -> Callable[[int, int, int], None]:
    """:func:`engine.kernels.foretell.native_code`'s, of a task and states; once for the process. It keeps the interpreter
    lock."""
    return _link(*_objects(("foretell",))["foretell"], ctypes.PYFUNCTYPE, 3)


@cache
def load_draft_rows() -> Callable[..., None]:
    """:func:`engine.kernels.draft_rows.native_code`'s, once for the process. It keeps the interpreter lock."""
    return _link(*_objects(("draft_rows",))["take_row"], ctypes.PYFUNCTYPE, 8)


@cache
def load_matches() -> Callable[[int, int, int], None]:
    """:func:`engine.kernels.matches.native_code`'s, once for the process. It keeps the interpreter lock."""
    return _link(*_objects(("matches",))["find"], ctypes.PYFUNCTYPE, 3)


@dataclass(frozen=True)
class Choices:
    """How tokens are chosen; :func:`engine.kernels.choices.native_code` says what they do. Both keep the interpreter lock."""

    choose: Callable[[int], None]
    rank: Callable[[int], None]


@cache
def load_choices() -> Choices:
    """The code that chooses tokens, once for the process."""
    objects = _objects(("choices",))
    return Choices(*(_link(*objects[name], ctypes.PYFUNCTYPE, 1) for name in ("choose", "rank")))


@cache
def load_page_guard(table: int) -> int:
    """The address of :func:`engine.kernels.page_guard.native_code`'s handler, which has its table at that address."""
    import llvmlite.binding as llvm

    llvm.add_symbol("slipstream_guard_table", table)
    return _place(*_objects(("page_guard",))["on_bus"])


@cache
def load_program(kinds: Kinds) -> Program:
    """The code for ``kinds``, once for the process."""
    soon = _MODULES if kinds.models == "experts" else ("choices", "draft_rows", "matches")
    objects = _objects(astuple(kinds), *((module,) for module in soon))
    return Program(
        _link(*objects["work"], ctypes.CFUNCTYPE, 3),
        _link(*objects["publish"], ctypes.PYFUNCTYPE, 1),
        _link(*objects["copy_slot"], ctypes.PYFUNCTYPE, 4),
    )


@dataclass(frozen=True)
class Turns:
    """How layers get their experts. ``serve`` is :func:`engine.kernels.loads.native_code`'s; the others are
    :func:`engine.kernels.turns.native_code`'s, once with the interpreter lock and once without, and its address."""

    serve: Callable[[int, int], None]  # control block, the least urgency
    act: Callable[[int, int, int, int, int], None]  # block, command, and three numbers
    wait: Callable[[int, int, int, int, int], None]
    address: int


@cache
def load_turns() -> Turns:
    """The code that brings experts into slots, once for the process.

    Raises:
        OSError: this system has no ``pread``.
    """
    register_symbols()
    if _c_function("pread") is None:
        raise OSError("there is no pread")
    serve, turn = _objects(("loads",), ("turns",))["serve"], _objects(("turns",))["turn"]
    address = _place(*turn)
    return Turns(
        _function(_place(*serve), ctypes.CFUNCTYPE, 2),
        _function(address, ctypes.PYFUNCTYPE, 5),
        _function(address, ctypes.CFUNCTYPE, 5),
        address,
    )


def _objects(names: tuple[str, ...], *soon: tuple[str, ...]) -> dict[str, tuple[str, bytes]]:
    """Object code, compiled if it is not on the disk: a module of ``_MODULES``, or what :class:`Kinds` names. What will be
    asked for ``soon`` is compiled at the same time."""
    file = _file(names)
    objects = _read(file)
    if objects is None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_compile_apart, (names, *(other for other in soon if not _file(other).exists()))))
        objects = _read(file)
    return _compile(names) if objects is None else objects


def _file(names: tuple[str, ...]) -> Path:
    return _folder() / f"{'-'.join(names)}.o"


def _compile_apart(names: tuple[str, ...]) -> None:
    """Compile in a process of its own: here it would hold the interpreter lock, and much memory to the end."""
    command = [sys.executable, "-m", "engine.kernels.native", *names]
    quiet = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=_TIMEOUT,
            creationflags=quiet,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the kernels could not be compiled apart: %s", error)
    else:
        if done.returncode:
            _log.warning("the kernels could not be compiled apart: %s", done.stderr)


def _compile(names: tuple[str, ...]) -> dict[str, tuple[str, bytes]]:
    """Compile, and keep what came out if possible."""
    register_symbols()
    if names[0] in _MODULES:
        objects = import_module(f"engine.kernels.{names[0]}").native_code()
    else:
        from engine.kernels import program

        objects = program.native_code(Kinds(*names))
    _write(_file(names), objects)
    return objects


def _folder() -> Path:
    """Named after all that the code depends on: these sources, the compilers, the CPU, how keys lie."""
    import llvmlite.binding as llvm

    from engine.models.kv_cache import KEY_BLOCK
    from engine.paths import cache_dir

    cpu = [platform.machine(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    others = [version("numba"), version("llvmlite"), sys.version, str(KEY_BLOCK)]
    digest = hashlib.sha256(" ".join([*others, *cpu]).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "kernels" / digest.hexdigest()[:16]


def _read(file: Path) -> dict[str, tuple[str, bytes]] | None:
    """What :func:`_write` kept; None if there is nothing, or nothing whole."""
    try:
        header, _, code = file.read_bytes().partition(b"\n")
        entries = json.loads(header)
        if entries.pop("sha256") != hashlib.sha256(code).hexdigest():
            return None
        return {name: (symbol, code[start:end]) for name, (symbol, start, end) in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path, objects: dict[str, tuple[str, bytes]]) -> None:
    code, entries = b"", dict[str, Any]()
    for name, (symbol, data) in objects.items():
        entries[name] = symbol, len(code), len(code) + len(data)
        code += data
    entries["sha256"] = hashlib.sha256(code).hexdigest()
    try:
        with replacing(file) as handle:
            handle.write(json.dumps(entries).encode() + b"\n" + code)
    except OSError as error:  # compiled again next time
        _log.warning("the compiled kernels could not be kept: %s", error)


@cache
def register_symbols() -> None:
    """Give compiled code what it asks of the operating system; needed before anything is compiled or linked."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
        import numba.core.registry  # LLVM's helpers for the stack there

        numba.core.registry.cpu_target.target_context  # noqa: B018
    else:
        function = _c_function("sched_yield")
        for name, own in _POSIX.items():
            if (found := _c_function(own)) is not None:
                llvm.add_symbol(f"slipstream_{name}", ctypes.cast(found, ctypes.c_void_p).value)
    llvm.add_symbol("slipstream_give_way", ctypes.cast(function, ctypes.c_void_p).value)


def _c_function(name: str) -> Any:
    """A function of the C library; None where there is none such."""
    return None if sys.platform == "win32" else getattr(ctypes.CDLL(None), name, None)


# What reading experts and guarding mappings takes, by the names that their code knows it by.
_POSIX = {
    "pread": "pread",
    "read": "read",
    "write": "write",
    "clock": "clock_gettime",
    "madvise": "madvise",
    "mmap": "mmap",
    "sigaction": "sigaction",
}


_engines: list[Any] = []  # what owns the linked code
# Numba's calling convention: where to put the result and an exception, of which there are none, come first.
_nowhere = (ctypes.c_void_p * 8)()
_NOWHERE = ctypes.addressof(_nowhere)


def _link(symbol: str, code: bytes, convention: Callable[..., Any], arguments: int) -> Callable[..., None]:
    return _function(_place(symbol, code), convention, arguments)


def _place(symbol: str, code: bytes) -> int:
    """The address of linked code."""
    import llvmlite.binding as llvm

    register_symbols()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(symbol)
    return address


def _function(address: int, convention: Callable[..., Any], arguments: int) -> Callable[..., None]:
    kind = convention(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * arguments)
    return partial(kind(address), _NOWHERE, _NOWHERE + 8)


if __name__ == "__main__":
    _compile(tuple(sys.argv[1:]))
