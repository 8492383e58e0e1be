"""launch.py: what it decides, and a real (small) environment made from a stand-in package index."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import Fault, StandIn, serve

import launch
from engine import paths

ROOT = Path(launch.ROOT)
LAUNCH = str(ROOT / "launch.py")


def bare(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run launch.py with a Python that sees the standard library and nothing else."""
    environment = {**os.environ, "SLIPSTREAM_HOME": str(home), **variables}
    environment.pop("SPACE_ID", None) if "SPACE_ID" not in variables else None
    command = [sys.executable, "-I", "-S", LAUNCH, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_help_needs_only_the_standard_library(tmp_path: Path) -> None:
    answer = bare("--help", home=tmp_path)
    assert answer.returncode == 0 and answer.stderr == ""
    for command in launch.COMMANDS:
        assert f"  {command} " in answer.stdout
    assert "--port" in bare("run", "--help", home=tmp_path).stdout
    assert "--port" in bare("--no-browser", "-h", home=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []  # asking for help sets nothing up


def test_an_unknown_command(tmp_path: Path) -> None:
    answer = bare("strat", home=tmp_path)
    assert answer.returncode == 2 and "no command 'strat'" in answer.stderr


def test_the_syntax_is_that_of_the_oldest_python() -> None:
    ast.parse(Path(LAUNCH).read_text(), feature_version=(3, 10))


def test_the_cache_folder_is_that_of_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLIPSTREAM_HOME", raising=False)
    assert launch.cache_folder() == str(paths.cache_dir())
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "here"))
    assert launch.cache_folder() == str(paths.cache_dir()) == str(tmp_path / "here" / "cache")


def test_running_python_with_all_packages_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "requirements", lambda name="dependencies": [f"pytest=={pytest.__version__}"])
    assert launch.has_packages(())
    monkeypatch.setattr(launch, "requirements", lambda name="dependencies": ["pytest==0.0.1"])
    assert not launch.has_packages(())
    monkeypatch.setattr(launch, "requirements", lambda name="dependencies": ["no-such-package==1"])
    assert not launch.has_packages(())
    absent = ["no-such-package==1; python_version < '3.10'"]
    monkeypatch.setattr(launch, "requirements", lambda name="dependencies": absent)
    assert launch.has_packages(())


@pytest.mark.parametrize(
    "marker",
    [
        "python_version >= '3.11'",
        "python_version < '3.11'",
        "platform_system != 'Darwin'",
        "platform_system == 'Linux'",
        "platform_system == 'Windows'",
    ],
)
def test_markers_are_read_as_pip_reads_them(marker: str) -> None:
    from packaging.markers import Marker

    assert launch.marker_holds(marker) == Marker(marker).evaluate()


def test_a_python_that_is_too_old_or_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "version_info", (3, 14, 0))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(launch.SetupError, match=r"3\.10 to 3\.13, and this is 3\.14"):
        launch.check_python()


def make_ready(home: Path, script: str) -> Path:
    """An environment that is complete, with a shell script for its Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_HOME", str(home))
        patch.setattr(launch.sys, "platform", "linux")
        folder = Path(launch.environment_folder("cpu"))
    python = Path(launch.environment_python(str(folder)))
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n" + script)
    python.chmod(0o755)
    (folder / "ready.json").write_text(
        json.dumps({"dependencies": launch.fingerprint(launch.requirements())})
    )
    return folder


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")
def test_a_ready_environment_is_entered_at_once(tmp_path: Path) -> None:
    make_ready(tmp_path, 'echo "$@"; echo "path:$PYTHONPATH"; exit 7')
    answer = bare("doctor", "--json", home=tmp_path, PATH="", PYTHONPATH="/other")
    assert answer.returncode == 7
    assert answer.stdout.split("\n")[:2] == [f"{LAUNCH} doctor --json", "path:"]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")
def test_a_space_makes_no_environment(tmp_path: Path) -> None:
    answer = bare("doctor", home=tmp_path, SPACE_ID="someone/slipstream")
    assert "Setting up" not in answer.stdout
    assert not (tmp_path / "cache").exists()


def test_torch_is_built_for_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launch.sys, "platform", "linux")
    assert launch.torch_flavour() == "cpu"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: a card'\n")
    tool.chmod(0o755)
    assert launch.torch_flavour() == "cuda"
    tool.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert launch.torch_flavour() == "cpu"


def test_the_index_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        server.pages["/whl/cpu/torch/"] = ("text/html", b"")
        monkeypatch.setattr(launch, "TORCH_INDEX", server.url + "/whl")
        monkeypatch.setattr(launch.sys, "platform", "linux")
        assert launch.torch_index("cpu") == server.url + "/whl/cpu"
        assert launch.torch_index("cuda") is None  # PyPI's own build
        monkeypatch.setattr(launch.sys, "platform", "win32")
        assert launch.torch_index("cpu") is None
        monkeypatch.setattr(launch.sys, "platform", "darwin")
        assert launch.torch_index("cpu") is None
    monkeypatch.setattr(launch.sys, "platform", "linux")
    assert launch.torch_index("cpu") is None  # blocked: the usual index has one too


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        (
            "WARNING: Retrying ... Temporary failure in name resolution\nERROR: No matching distribution",
            "network",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "nothing for this system"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "arrived damaged"),
        ("ERROR: something else", "could not be installed"),
    ],
)
def test_a_failure_becomes_a_sentence(said: str, expected: str) -> None:
    sentence = launch.explain_failure(said)
    assert expected in sentence and "\n" not in sentence and sentence.endswith(".")


def test_half_installed_packages_are_forgotten(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, record in (("whole-1.dist-info", True), ("half-1.dist-info", False)):
        (packages / name).mkdir(parents=True)
        (packages / name / "METADATA").write_text("")
        if record:
            (packages / name / "RECORD").write_text("")
    launch.discard_half_installed(str(tmp_path))
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_old_environments_are_removed_and_others_are_not(tmp_path: Path) -> None:
    for name, age in (("current", 90), ("old", 90), ("recent", 1)):
        (tmp_path / name).mkdir()
        marker = tmp_path / name / "ready.json"
        marker.write_text("{}")
        os.utime(marker, (marker.stat().st_mtime - age * 86400,) * 2)
    (tmp_path / "unfinished").mkdir()
    launch.remove_unused(str(tmp_path / "current"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "recent", "unfinished"]


# --- a real environment, from a package index that has two small packages ---------------------------------


def small_wheel(name: str, version: str) -> tuple[str, bytes]:
    """A valid wheel of one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return f"{name}-{version}-py3-none-any.whl", buffer.getvalue()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, StandIn]]:
    """A project of two dependencies, and the index that offers them."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "launch.py").write_bytes(Path(LAUNCH).read_bytes())
    (root / "pyproject.toml").write_text(
        'dependencies = [\n    "torch==2.13.0",\n    "small==1.0",\n]\n'
        'dev = [\n    "tool==3.0",\n]\npeers = [\n    "missing==1.0",\n]\n'
    )
    (root / "engine").mkdir()
    (root / "engine" / "doctor.py").write_text(
        "def main(argv):\n    import torch, small, sys\n    print('inside', sys.prefix)\n    return 0\n"
    )
    with serve() as server:
        for name, version in (("torch", "2.13.0"), ("small", "1.0"), ("tool", "3.0")):
            server.add_index(name, *small_wheel(name, version))
        for variable in list(os.environ):
            if variable.startswith(("PIP_", "SPACE_")):
                monkeypatch.delenv(variable)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", server.url + "/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the other index is out of reach
        yield root, server


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(root / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_from_nothing_to_a_running_command(
    project: tuple[Path, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, server = project
    with monkeypatch.context() as patch:
        patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # no network
        answer = start(root, "doctor")
    assert answer.returncode == 1
    assert "check the network" in answer.stderr.strip().splitlines()[-1]
    assert "Traceback" not in answer.stderr

    wheel = "/files/small-1.0-py3-none-any.whl"
    whole = server.files[wheel]

    server.files[wheel] = whole[: len(whole) // 2]  # a truncated wheel
    first = start(root, "doctor")
    assert first.returncode == 1, first.stdout + first.stderr
    last_line = first.stderr.strip().splitlines()[-1]
    assert "continues where it stopped" in last_line and "Traceback" not in first.stderr
    (environment,) = (tmp_path / "home" / "cache" / "environments").glob("py*-cpu-*[0-9a-f]")
    assert not (environment / "ready.json").exists()

    server.files[wheel] = whole
    server.requests.clear()
    second = start(root, "doctor")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Installing PyTorch (for the CPU)" in second.stdout and f"inside {environment}" in second.stdout
    assert "Making a private" not in second.stdout  # what was there is kept
    assert server.asked("/files/torch-2.13.0-py3-none-any.whl") == []

    server.requests.clear()
    third = start(root, "doctor")
    assert third.stdout == f"inside {environment}\n" and third.stderr == ""
    assert server.requests == []  # offline works


def test_extras_are_added_when_they_are_needed(project: tuple[Path, StandIn]) -> None:
    root, server = project
    (root / "engine" / "cli.py").write_text("def main(argv):\n    print(argv)\n    return 0\n")
    answer = start(root, "bench", "--peers", "llama.cpp")  # `missing` is on no index
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Going on without" in answer.stderr
    assert "['bench', '--peers', 'llama.cpp']" in answer.stdout
    lint = start(root, "lint")
    assert "extra `dev`" in lint.stdout and "No module named ruff" in lint.stderr
    assert server.asked("/files/tool-3.0-py3-none-any.whl") == [None]
    assert "extra" not in start(root, "lint").stdout


def test_a_killed_installation_goes_on(project: tuple[Path, StandIn], tmp_path: Path) -> None:
    root, server = project
    server.faults["/files/small-1.0-py3-none-any.whl"] = Fault(stall_after=10, times=1)
    command = [sys.executable, "-I", "-S", str(root / "launch.py"), "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "small" in line and "Downloading" in line:
            break
    os.killpg(process.pid, 9)
    process.wait()
    process.stdout.close()
    server.released.set()
    answer = start(root, "doctor")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "inside" in answer.stdout


def test_two_windows_prepare_it_once(project: tuple[Path, StandIn]) -> None:
    root, server = project
    command = [sys.executable, "-I", "-S", str(root / "launch.py"), "doctor"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("Making a private" in text for text in said) == 1
    assert server.asked("/files/torch-2.13.0-py3-none-any.whl") == [None]


def test_the_fingerprint_follows_the_pins() -> None:
    pins = launch.requirements()
    assert launch.fingerprint(pins) != launch.fingerprint([*pins, "another==1"])
    assert hashlib.sha256("\n".join(pins).encode()).hexdigest().startswith(launch.fingerprint(pins))
