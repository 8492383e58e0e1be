"""What this machine is and how much of it is in use. Nothing here imports torch unless it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that matter for decoding speed, as the kernel names them.
ISA_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A graphics card that torch can use. Sizes in bytes."""

    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it: inside a container, the container's share. Sizes in bytes."""

    os: str
    cpu: str
    physical_cores: int
    usable_threads: int  # what affinity and a container's quota leave, at least 1
    ram_total: int
    ram_available: int
    isa: tuple[str, ...]  # of ISA_FLAGS, those that the CPU has; empty where the system does not tell
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class MemoryUse:
    """Bytes in use and in all."""

    used: int
    total: int


def machine() -> Machine:
    """Look at the machine now (milliseconds; with an NVIDIA driver, up to a second the first time)."""
    import psutil

    memory = machine_memory()
    return Machine(
        os=f"{platform.system()} {platform.release()} ({platform.machine()})",
        cpu=cpu_name(),
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        usable_threads=usable_threads(),
        ram_total=memory.total,
        ram_available=memory.total - memory.used,
        isa=isa_flags(),
        gpus=gpus(),
    )


@functools.lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name for people."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
        match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
        if match:
            return " ".join(match[1].split())
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def isa_flags() -> tuple[str, ...]:
    """Those of :data:`ISA_FLAGS` that the CPU has; empty where the system does not tell."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-a"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.lower()
            arm = {"feat_dotprod": "asimddp", "feat_i8mm": "i8mm", "feat_bf16": "bf16", "neon": "asimd"}
            found = {flag for name, flag in arm.items() if re.search(rf"{name}: 1", listed)}
            return tuple(flag for flag in ISA_FLAGS if flag in found)
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
        present = set(match[1].split()) if match else set()
        return tuple(flag for flag in ISA_FLAGS if flag in present)
    return ()


def usable_threads() -> int:
    """CPU threads that this process may really run on: affinity and the container's quota count."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")  # cgroup v2
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()  # cgroup v1
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def machine_memory() -> MemoryUse:
    """RAM in use by everything, and in all; in a container with a limit, the container's."""
    import psutil

    memory = psutil.virtual_memory()
    use = MemoryUse(memory.total - memory.available, memory.total)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < use.total:
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        # Files that the kernel merely caches leave when memory is asked for.
        cached = re.search(r"^inactive_file (\d+)$", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        return MemoryUse(max(0, used - int(cached[1] if cached else 0)), int(limit))
    return use


def process_memory() -> int:
    """Bytes of RAM that this process has in use (resident)."""
    import psutil

    return psutil.Process().memory_info().rss


def private_memory() -> int:
    """Bytes of RAM that this process alone has in use, files that it merely maps left out; 0 where the system
    does not tell."""
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "private"):  # Windows
        return int(info.private)
    return int(info.rss - info.shared) if hasattr(info, "shared") else 0


def gpu_in_use() -> MemoryUse | None:
    """Memory of the first GPU, once torch uses it; None without one. Cheap enough for a meter."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return gpu_memory("cuda")


def gpu_memory(device: str) -> MemoryUse:
    """Memory of a GPU that torch can use, and of it, what is in use by everything. The first call sets CUDA up."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return MemoryUse(total - free, total)


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs, asked of the driver's own tool, so without torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in answer.splitlines():
        with contextlib.suppress(ValueError):  # a card that reports no memory
            name, total, free = (part.strip() for part in line.split(","))
            found.append(Gpu(name, int(total) << 20, int(free) << 20))
    return tuple(found)


def copy_bandwidth(threads: int | None = None, seconds: float = 1.0, size: int = 1 << 29) -> float:
    """Bytes per second that ``threads`` can read from RAM: what bounds decoding, which reads every weight
    once a token and writes next to nothing.

    Reads ``size`` bytes, far more than any cache holds, again and again for ``seconds``; the best pass
    counts, since whatever else runs on the machine only ever takes away from it.
    """
    import numpy as np

    threads = threads or usable_threads()
    buffer = np.ones(size // 8, np.int64)
    parts = np.array_split(buffer, threads)
    start, stop = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    going = True

    def read(part: np.ndarray) -> None:
        while True:
            start.wait()
            if not going:
                return
            np.bitwise_or.reduce(part)  # numpy lets go of the interpreter lock here
            stop.wait()

    workers = [threading.Thread(target=read, args=(part,), daemon=True) for part in parts]
    for worker in workers:
        worker.start()
    best = float("inf")
    until = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        begin = time.perf_counter()
        start.wait()
        stop.wait()
        best = min(best, time.perf_counter() - begin)
    going = False
    start.wait()
    return buffer.nbytes / best


def return_free_memory() -> None:
    """Give freed memory back to the system: glibc keeps what short-lived large buffers grew it by."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
