"""What is told about the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine import hardware


def test_the_machine_adds_up() -> None:
    machine = hardware.machine()
    assert 0 < machine.ram_available <= machine.ram_total
    assert machine.physical_cores >= 1 and machine.usable_threads >= 1
    assert machine.cpu and machine.os
    assert set(machine.isa) <= set(hardware.ISA_FLAGS)
    assert hardware.machine_memory().total == machine.ram_total
    assert 10e6 < hardware.process_memory() < machine.ram_total


def test_torch_is_not_imported() -> None:
    script = "import sys; from engine import hardware; hardware.machine(); sys.exit('torch' in sys.modules)"
    root = Path(hardware.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


def fake_files(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(path, ""))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_a_container_has_the_threads_of_its_quota(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    fake_files(monkeypatch, files)
    assert hardware.usable_threads() == expected


def test_a_container_has_the_memory_of_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_files(
        monkeypatch,
        {
            "/sys/fs/cgroup/memory.max": "1000000000\n",
            "/sys/fs/cgroup/memory.current": "700000000\n",
            "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 300000000\nactive_file 5\n",
        },
    )
    assert hardware.machine_memory() == hardware.MemoryUse(400_000_000, 1_000_000_000)
    fake_files(monkeypatch, {"/sys/fs/cgroup/memory.max": "max\n"})
    assert hardware.machine_memory().total > 1_000_000_000


def test_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'A Card, 24564, 20000'\necho 'Another, Card, 1'\necho 'Third, [N/A], [N/A]'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert hardware.gpus() == (hardware.Gpu("A Card", 24564 << 20, 20000 << 20),)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert hardware.gpus() == ()
    monkeypatch.setenv("PATH", "")
    assert hardware.gpus() == ()


def test_the_read_bandwidth_is_of_this_world() -> None:
    speed = hardware.copy_bandwidth(threads=2, seconds=0.05, size=1 << 24)
    assert 1e8 < speed < 1e13


def test_every_byte_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    sizes: list[int] = []
    original = np.bitwise_or.reduce
    counting = type("Or", (), {"reduce": lambda part: (sizes.append(part.nbytes), original(part))})
    monkeypatch.setattr(np, "bitwise_or", counting)
    hardware.copy_bandwidth(threads=3, seconds=0.0, size=3000 * 8)
    assert sorted(sizes) == [8000, 8000, 8000]
