"""The compiled kernels as functions: from the disk cache, or compiled first.

Numba compiles them once for each CPU and kind of weights, which takes most of a minute; with its own cache
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
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.atomic import replacing

_log = logging.getLogger(__name__)
_TIMEOUT = 600.0  # seconds; it takes most of a minute on two slow cores


@dataclass(frozen=True)
class Kinds:
    """Which code: dtype names that stand for the weights' format, the cache's type and the formats of draft head and
    draft layers (:mod:`engine.kernels.matmul` says which), and which models it is for: ``dense``, or with
    ``experts``, whose code takes half as long again to compile."""

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
def load_program(kinds: Kinds) -> Program:
    """The code for ``kinds``, once for the process."""
    file = _file(kinds)
    objects = _read(file)
    if objects is None and _compile_apart(kinds):
        objects = _read(file)
    if objects is None:
        objects = _compile(kinds)
    return Program(
        _link(*objects["work"], ctypes.CFUNCTYPE, 3),
        _link(*objects["publish"], ctypes.PYFUNCTYPE, 1),
        _link(*objects["copy_slot"], ctypes.PYFUNCTYPE, 4),
    )


def _file(kinds: Kinds) -> Path:
    return _folder() / f"{'-'.join(astuple(kinds))}.o"


def _compile_apart(kinds: Kinds) -> bool:
    """Compile in a process of its own: here it would hold the interpreter lock, and much memory to the end."""
    command = [sys.executable, "-m", "engine.kernels.native", *astuple(kinds)]
    quiet = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # on Windows
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=_TIMEOUT,
            creationflags=quiet,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("the kernels could not be compiled apart: %s", error)
        return False
    if done.returncode:
        _log.warning("the kernels could not be compiled apart: %s", done.stderr)
    return done.returncode == 0


def _compile(kinds: Kinds) -> dict[str, tuple[str, bytes]]:
    """Compile, and keep what came out if possible."""
    from engine.kernels.program import native_code

    register_symbols()
    objects = native_code(kinds)
    _write(_file(kinds), objects)
    return objects


def _folder() -> Path:
    """Named after all that the code depends on: these sources, the compilers, the CPU."""
    import llvmlite.binding as llvm

    from engine.paths import cache_dir

    cpu = [platform.machine(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest = hashlib.sha256(" ".join([version("numba"), version("llvmlite"), sys.version, *cpu]).encode())
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
    """Give compiled code the operating system's yield; needed before anything is compiled or linked."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
        import numba.core.registry  # LLVM's helpers for the stack there

        numba.core.registry.cpu_target.target_context  # noqa: B018
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    llvm.add_symbol("slipstream_give_way", address)


_engines: list[Any] = []  # what owns the linked code
# Numba's calling convention: where to put the result and an exception, of which there are none, come first.
_nowhere = (ctypes.c_void_p * 8)()
_NOWHERE = ctypes.addressof(_nowhere)


def _link(symbol: str, code: bytes, convention: Callable[..., Any], arguments: int) -> Callable[..., None]:
    import llvmlite.binding as llvm

    register_symbols()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    kind = convention(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * arguments)
    return partial(kind(engine.get_function_address(symbol)), _NOWHERE, _NOWHERE + 8)


if __name__ == "__main__":
    _compile(Kinds(*sys.argv[1:]))
