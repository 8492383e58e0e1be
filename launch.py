#!/usr/bin/env python3
"""Start Slipstream: `python launch.py`. The first start sets everything up, which takes some minutes.

This file needs nothing but Python's standard library. It makes a private environment in the platform's
cache folder, installs the pinned dependencies of pyproject.toml into it, and runs itself again inside.
In a Hugging Face Space, and where the running Python already has those packages, it makes none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

if False:  # for the type checker; importing typing costs a tenth of the start
    from collections.abc import Callable, Iterator
    from typing import Any

ROOT = os.path.dirname(os.path.abspath(__file__))
TORCH_INDEX = "https://download.pytorch.org/whl"
CUDA_BUILD = "cu130"  # what PyPI's own Linux build of the pinned torch is made for

HELP = """usage: python launch.py [command] [options]

  run        start the chat and open the browser (what happens without a command)
  generate   one prompt on the command line, streaming
  bench      compare methods, formats and peers side by side
  tune       train an accelerator for a model on this machine; stops and goes on at any time
  doctor     this machine, what can run on it, and what would be picked
  shortcut   put Slipstream into the desktop's menu (Linux)

  test       run all tests; options go to pytest
  lint       ruff and mypy
  fix        let ruff repair and format the code

Every command takes --help. Files are kept in the platform's cache and data folders;
SLIPSTREAM_HOME=FOLDER keeps them all in one place.
"""

RUN_HELP = """usage: python launch.py [run] [--port N] [--no-browser] [--model MODEL] [--format FORMAT] [--memory SIZE]

  --port N         the port on 127.0.0.1 (default: 7860, or the next free one)
  --no-browser     do not open the browser
  --model MODEL    owner/name on the Hugging Face hub, a folder, or a .gguf file
  --format FORMAT  weight format: auto (the default), int4, int8, bf16 ...
  --memory SIZE    what a mixture-of-experts model may take, such as 6GB (default: what is free)
"""


class SetupError(Exception):
    """A sentence for the user: what went wrong and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "run"
    if command not in COMMANDS:
        print(f"There is no command {command!r}.\n\n{HELP}", end="", file=sys.stderr)
        return 2
    if command == "run" and any(word in ("-h", "--help") for word in argv):
        print(RUN_HELP, end="")
        return 0
    try:
        if command != "shortcut":
            extras = ("dev",) if command in ("test", "lint", "fix") else ()
            if command == "bench" and "llama" in " ".join(argv):
                extras = ("peers",)
            status = enter_environment(extras)
            if status is not None:
                return status
        return COMMANDS[command](argv)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


# --- the private environment ----------------------------------------------------------------------------


def enter_environment(extras: tuple[str, ...]) -> int | None:
    """Make sure that this runs where the dependencies are. None: it does, go on. Otherwise the command
    was run there, and the result is its exit status (on Unix, this process becomes that one)."""
    check_python()
    flavour = torch_flavour()
    folder = environment_folder(flavour)
    inside = os.path.realpath(sys.prefix) == os.path.realpath(folder)
    ready = is_ready(folder, extras)
    if inside and (ready or os.environ.get("SLIPSTREAM_PREPARED")):
        return None
    in_some_environment = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ or not ready
    if os.environ.get("SPACE_ID") or (not inside and in_some_environment and has_packages(extras)):
        return None
    if not ready:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(folder), exist_ok=True)
        with locked(folder + ".lock", "Another window is preparing Slipstream; waiting for it."):
            if not is_ready(folder, extras):
                prepare(folder, flavour, extras)
    return run_inside(folder)


def check_python() -> None:
    """Only the versions that the pinned packages exist for; another one on this machine will do as well."""
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return
    import shutil

    for minor in (13, 12, 11, 10):
        other = shutil.which(f"python3.{minor}")
        if other:
            sys.exit(run([other, os.path.abspath(__file__), *sys.argv[1:]]))
    version = ".".join(map(str, sys.version_info[:2]))
    raise SetupError(f"Slipstream needs Python 3.10 to 3.13, and this is {version}; get one from python.org.")


def requirements(name: str = "dependencies") -> list[str]:
    """The pinned dependencies of pyproject.toml, or of an extra there (by a pattern: tomllib is not in
    Python 3.10)."""
    import re

    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
        text = file.read()
    block = re.search(rf"^{name} = \[$(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    assert block is not None, name
    return re.findall(r'^ *"(.+)",$', block.group(1), re.MULTILINE)


def fingerprint(pins: list[str]) -> str:
    """Changes whenever a pin does."""
    import hashlib

    return hashlib.sha256("\n".join(pins).encode()).hexdigest()[:12]


def cache_folder() -> str:
    """As in engine/paths.py, which may need a package that is not installed yet."""
    home = os.environ.get("SLIPSTREAM_HOME")
    if home:
        return os.path.join(os.path.realpath(os.path.expanduser(home)), "cache")
    if sys.platform == "win32":
        return os.path.join(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~"), "slipstream", "Cache")
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches/slipstream")
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "slipstream")


def environment_folder(flavour: str) -> str:
    """One folder for each set of pins, Python version and build of torch."""
    version = sys.version_info
    name = f"py{version[0]}.{version[1]}-{flavour}-{fingerprint(requirements())}"
    return os.path.join(cache_folder(), "environments", name)


def torch_flavour() -> str:
    """``cuda`` where the driver's own tool lists an NVIDIA GPU, else ``cpu``."""
    import shutil

    tool = shutil.which("nvidia-smi")
    if tool is None or sys.platform == "darwin":
        return "cpu"
    if is_ready(environment_folder("cuda"), ()):
        return "cuda"  # it was asked once; asking takes up to a second
    import subprocess

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
        if answer.returncode == 0 and "GPU" in answer.stdout:
            return "cuda"
    return "cpu"


def is_ready(folder: str, extras: tuple[str, ...]) -> bool:
    """Whether the environment is complete, with these extras as they are pinned now."""
    try:
        with open(os.path.join(folder, "ready.json"), encoding="utf-8") as file:
            installed = json.load(file)
    except (OSError, ValueError):
        return False
    names = ("dependencies", *extras)
    return all(installed.get(name) == fingerprint(requirements(name)) for name in names)


def has_packages(extras: tuple[str, ...]) -> bool:
    """Whether the running Python has every pinned package, without importing any."""
    from importlib import metadata

    pins = requirements() + [pin for extra in extras for pin in requirements(extra)]
    for pin in pins:
        specifier, _, marker = pin.partition(";")
        name, _, version = specifier.strip().partition("==")
        if not marker_holds(marker.strip()):
            continue
        try:
            if metadata.version(name).partition("+")[0] != version:
                return False
        except metadata.PackageNotFoundError:
            return False
    return True


def marker_holds(marker: str) -> bool:
    """Evaluate the few environment markers that pyproject.toml uses."""
    if not marker:
        return True
    import platform

    name, operator, value = marker.replace("'", "").split()
    if name == "platform_system":
        return (platform.system() == value) == (operator == "==")
    wanted = tuple(map(int, value.split(".")))
    return sys.version_info[:2] >= wanted if operator == ">=" else sys.version_info[:2] < wanted


def prepare(folder: str, flavour: str, extras: tuple[str, ...]) -> None:
    """Make the environment or complete it. What an interrupted run has installed is kept."""
    python = environment_python(folder)
    first = not is_ready(folder, ())
    if first:
        print(f"Setting up Slipstream in {folder}\nThis is done once and takes some minutes.", flush=True)
        make_environment(folder)
        discard_half_installed(folder)
        announce(f"Installing PyTorch ({'for NVIDIA GPUs' if flavour == 'cuda' else 'for the CPU'})")
        torch = next(pin for pin in requirements() if pin.startswith("torch=="))
        install(python, [torch], torch_index(flavour))
        announce("Installing the other packages")
        install(python, requirements())
        mark_ready(folder, "dependencies")
        remove_unused(folder)
    for extra in extras:
        announce(f"Installing the packages of the extra `{extra}`")
        try:
            install(python, requirements(extra))
            mark_ready(folder, extra)
        except SetupError as error:
            if extra != "peers":  # only what bench compares with: it does without
                raise
            print(error, "Going on without.", file=sys.stderr)
    os.environ["SLIPSTREAM_PREPARED"] = "1"
    announce("Slipstream is set up\n")


def make_environment(folder: str) -> None:
    """A virtual environment with pip, unless a working one is there."""
    python = environment_python(folder)
    if os.path.exists(python) and run([python, "-c", "import pip"], quiet=True) == 0:
        return
    announce("Making a private Python environment")
    if run([sys.executable, "-m", "venv", "--clear", folder], quiet=True) == 0:
        return
    # Debian's Python comes without ensurepip; another pip can install itself.
    without_pip = run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], quiet=True)
    own_pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip"]
    if without_pip or run(own_pip, quiet=True):
        raise SetupError(
            "Python cannot make a virtual environment here; on Debian or Ubuntu install one package with "
            f"`sudo apt install python3-venv`, and see that there is room in {os.path.dirname(folder)}."
        )


def discard_half_installed(folder: str) -> None:
    """Forget packages whose installation was killed half-way, which pip would take for installed: the
    RECORD is written last."""
    import glob
    import shutil

    for pattern in ("lib/python*/site-packages", "Lib/site-packages"):
        for info in glob.glob(os.path.join(folder, pattern, "*.dist-info")):
            if not os.path.exists(os.path.join(info, "RECORD")):
                shutil.rmtree(info, ignore_errors=True)


def torch_index(flavour: str) -> str | None:
    """The package index that has the right build of torch; None: the usual one has it, or the other
    cannot be reached."""
    if sys.platform == "darwin" or (sys.platform == "win32") == (flavour == "cpu"):
        return None
    index = f"{TORCH_INDEX}/{'cpu' if flavour == 'cpu' else CUDA_BUILD}"
    import urllib.request

    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=8).close()
    except (OSError, ValueError):
        print(f"{index} cannot be reached, so torch comes from the usual package index.", flush=True)
        return None
    return index


def install(python: str, pins: list[str], index: str | None = None) -> None:
    """Run pip, which shows its progress; what it says on errors becomes one sentence."""
    import subprocess

    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--prefer-binary", *(["--index-url", index] if index else []), *pins]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if not line.startswith(("WARNING: Location", "WARNING: Cache entry")):
                sys.stderr.write(line)
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise SetupError(explain_failure("".join(said)))


def explain_failure(said: str) -> str:
    """Why pip failed, as a sentence."""
    again = "start it again and it continues where it stopped"
    if "No space left on device" in said or "Errno 28" in said:
        return f"The disk is full; free some space, or set SLIPSTREAM_HOME to another disk, then {again}."
    if "DO NOT MATCH THE HASHES" in said:
        return f"A package arrived damaged and was thrown away; {again}."
    if any(word in said for word in ("connection broken", "Max retries", "timed out", "Connection", "resol")):
        return f"The packages could not be fetched; check the network connection or the proxy, then {again}."
    if "No matching distribution" in said:
        return (
            "The package index does not answer, or it has nothing for this system and Python (see above); check "
            f"the network or the proxy, or take Python 3.12 from python.org on a 64-bit system, then {again}."
        )
    return f"The packages could not be installed (see above); {again}."


def mark_ready(folder: str, name: str) -> None:
    """Note, atomically, that the dependencies (or an extra's) are complete."""
    path = os.path.join(folder, "ready.json")
    noted = {}
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        noted = json.load(file)
    noted[name] = fingerprint(requirements(name))
    write_json(path, noted)


def remove_unused(folder: str) -> None:
    """Environments of earlier versions that were not started for a month."""
    import shutil
    import time

    for other in os.scandir(os.path.dirname(folder)):
        marker = os.path.join(other.path, "ready.json")
        with contextlib.suppress(OSError):
            if other.path != folder and time.time() - os.path.getmtime(marker) > 30 * 86400:
                shutil.rmtree(other.path)


def environment_python(folder: str) -> str:
    """The environment's interpreter."""
    return os.path.join(folder, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def run_inside(folder: str) -> int:
    """Run this command again with the environment's Python."""
    with contextlib.suppress(OSError):
        os.utime(os.path.join(folder, "ready.json"))  # so that it is not taken for unused
    for name in ("PYTHONHOME", "PYTHONPATH"):
        os.environ.pop(name, None)
    os.environ["PYTHONNOUSERSITE"] = "1"
    command = [environment_python(folder), os.path.abspath(__file__), *sys.argv[1:]]
    if os.name != "nt":
        sys.stdout.flush()
        os.execv(command[0], command)
    return run(command)


def run(command: list[str], quiet: bool = False) -> int:
    """Run a program and return its exit status."""
    import subprocess

    where = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if quiet else {}
    process = subprocess.Popen(command, **where)  # type: ignore[call-overload]
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # it got the signal too, and ends in its own way


def announce(what: str) -> None:
    """A step of the set-up."""
    print(f"\n==> {what}", flush=True)


def write_json(path: str, content: object) -> None:
    """Write a small file so that it is either old or new, never half."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def try_lock(path: str) -> Any:
    """Lock a file until this process ends; None if another process has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - kept open on purpose
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def locked(path: str, message: str) -> Iterator[None]:
    """Hold a lock, waiting for it with a message."""
    import time

    lock = try_lock(path)
    if lock is None:
        print(message, flush=True)
    while lock is None:
        time.sleep(0.5)
        lock = try_lock(path)
    try:
        yield
    finally:
        lock.close()


# --- commands, run inside the environment ----------------------------------------------------------------


def start(argv: list[str]) -> int:
    """The chat."""
    from app.startup import start

    return start(argv)


def command_line(command: str) -> Callable[[list[str]], int]:
    """A command of engine/cli.py."""

    def call(argv: list[str]) -> int:
        from engine.cli import main

        return main([command, *argv]) or 0

    return call


def doctor(argv: list[str]) -> int:
    """What machine this is, what can run, and what would be picked."""
    from engine.doctor import main

    return main(argv)


def shortcut(argv: list[str]) -> int:
    """A menu entry."""
    from app.shortcut import main

    return main(argv)


def test(argv: list[str]) -> int:
    """All tests."""
    os.chdir(ROOT)
    return run([sys.executable, "-m", "pytest", *argv])


def lint(argv: list[str]) -> int:
    """ruff's checks, ruff's format and mypy: all of them, even if the first finds something."""
    os.chdir(ROOT)
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    return max([run([sys.executable, "-m", *command, *argv]) for command in commands])


def fix(argv: list[str]) -> int:
    """What ruff can repair."""
    os.chdir(ROOT)
    commands = (["ruff", "check", "--fix", "."], ["ruff", "format", "."])
    return max([run([sys.executable, "-m", *command, *argv]) for command in commands])


COMMANDS = {
    "run": start,
    "generate": command_line("generate"),
    "bench": command_line("bench"),
    "tune": command_line("tune"),
    "doctor": doctor,
    "shortcut": shortcut,
    "test": test,
    "lint": lint,
    "fix": fix,
}

if __name__ == "__main__":
    sys.exit(main())
