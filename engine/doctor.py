"""`python launch.py doctor`: what machine this is, what can run on it, what would be picked, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine import hardware, hub, paths
from engine.errors import SlipstreamError
from engine.memory_speed import measure_bandwidth
from engine.model_report import ModelReport, examine_model, fused_problem

PACKAGES = (
    "torch", "transformers", "gradio", "tokenizers", "safetensors", "gguf", "huggingface-hub", "numba",
    "numpy", "bitsandbytes", "llama-cpp-python",
)  # fmt: skip


@dataclass(frozen=True)
class Option:
    """A format or kernel: whether it runs here, and if not, why not."""

    name: str
    reason: str | None = None  # None: it runs
    bytes_per_weight: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything `doctor` says. Sizes in bytes, bandwidth in bytes per second."""

    versions: dict[str, str | None]
    machine: hardware.Machine
    read_bandwidth: float | None
    device: str
    formats: tuple[Option, ...]
    kernels: tuple[Option, ...]
    model: ModelReport
    ready_models: tuple[str, ...]
    folders: dict[str, str]


def main(argv: list[str]) -> int:
    """Print the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python launch.py doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--model", default=hub.DEFAULT_MODEL, help="owner/name on the hub, a folder, or a .gguf file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the measurement of the memory's speed"
    )
    parser.add_argument("--memory", help="what a mixture-of-experts model may take, such as 6GB")
    options = parser.parse_args(argv)
    try:
        report = examine(options.model, measure=not options.quick, memory=options.memory)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if options.json:
        json.dump(dataclasses.asdict(report), sys.stdout, indent=2)
        print()
    else:
        print(describe(report))
    return 0


def examine(model: str = hub.DEFAULT_MODEL, measure: bool = True, memory: str | None = None) -> Report:
    """Look at the machine, the engine and the model (of one that is not here the hub is asked; nothing is loaded).

    Args:
        memory: what a mixture-of-experts model may take, as a person writes it.

    Raises:
        InvalidRequestError: ``memory`` is no amount of memory.
    """
    machine = hardware.machine()
    bandwidth = measure_bandwidth() if measure else None  # before torch's threads are there
    from engine.experts.planner import parse_memory
    from engine.loading import pick_device

    budget = None if memory is None else parse_memory(memory)
    device = pick_device("auto")
    return Report(
        versions=versions(),
        machine=machine,
        read_bandwidth=bandwidth,
        device=device,
        formats=formats(device),
        kernels=kernels(device),
        model=examine_model(model, device, memory=budget, ask_hub=True),
        ready_models=tuple(ready.name for ready in hub.list_ready_models()),
        folders={
            "data": str(paths.data_dir()),
            "cache": str(paths.cache_dir()),
            "models": str(paths.models_dir()),
            "hub cache": str(_hub_cache()),
            "log": str(paths.log_dir()),
            "environment": sys.prefix,
        },
    )


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def formats(device: str) -> tuple[Option, ...]:
    """The weight formats, and why some do not run on ``device``."""
    import torch

    from engine.quantization import WEIGHT_FORMATS

    target = torch.device(device)
    return tuple(
        Option(name, weight_format.unavailable(target), weight_format.bytes_per_weight())
        for name, weight_format in WEIGHT_FORMATS.items()
    )


def kernels(device: str) -> tuple[Option, ...]:
    """Who computes a decoding step: our fused kernels, or torch operation by operation."""
    return Option("fused", fused_problem(device)), Option("torch")


def describe(report: Report) -> str:
    """The report as text for a terminal."""
    machine, model = report.machine, report.model
    lines = [
        "Machine",
        f"  system     {machine.os}",
        f"  processor  {machine.cpu}, {machine.physical_cores} cores, {machine.usable_threads} threads for us",
        f"  features   {' '.join(machine.isa) or 'not told by the system'}",
        f"  memory     {_gb(machine.ram_total)}, {_gb(machine.ram_available)} available",
    ]
    if report.read_bandwidth is not None:
        speed = f"{report.read_bandwidth / 1e9:.1f} GB/s with {machine.usable_threads} threads"
        lines.append(f"  reads at   {speed} (the limit of decoding without a GPU)")
    lines += [f"  GPU        {gpu.name}, {_gb(gpu.memory_total)}" for gpu in machine.gpus]
    if not machine.gpus:
        lines.append("  GPU        none from NVIDIA")
    lines += ["", f"Weight formats on {report.device}"]
    lines += [_option(option) for option in report.formats]
    lines += ["", "Kernels"]
    lines += [_option(option) for option in report.kernels]
    lines += ["", f"Model {model.source}"]
    if model.problem:
        lines.append(f"  {model.problem}")
    else:
        parameters = f"{(model.num_parameters or 0) / 1e6:.0f} M parameters"
        lines.append(f"  {model.architecture}, {parameters}, context {model.context_length} tokens")
        size = f"{(model.file_bytes or 0) / 1e6:.0f} MB"
        here = f"{model.path} ({size})" if model.path else f"not on this machine, {size} to download"
        lines.append(f"  {here}")
        size = f"about {(model.weight_bytes or 0) / 1e6:.0f} MB of weights"
        lines.append(f"  auto picks {model.weight_format} on {report.device}, {size}")
        if model.reason:
            lines.append(f"  because    {model.reason}")
        if model.plan:
            lines.append(f"  memory     {model.plan}")
        if report.read_bandwidth and model.step_bytes and report.device == "cpu":
            limit = report.read_bandwidth / model.step_bytes
            read = f"each token reads {model.step_bytes / 1e6:.0f} MB of weights"
            lines.append(f"  limit      {limit:.0f} tokens/s without drafts: {read}")
    lines += ["", "Models on this machine", *(f"  {name}" for name in report.ready_models or ("none yet",))]
    lines += ["", "Folders", *(f"  {name:<12}{folder}" for name, folder in report.folders.items())]
    lines += ["", "Versions"]
    lines += [f"  {name:<18}{version or 'not installed'}" for name, version in report.versions.items()]
    return "\n".join(lines)


def _option(option: Option) -> str:
    size = f"{8 * option.bytes_per_weight:4.1f} bits a weight" if option.bytes_per_weight else "runs"
    return f"  {option.name:<11}{size if option.reason is None else 'not here: ' + option.reason}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _hub_cache() -> Path:
    from engine.hub_repository import hub_cache

    return hub_cache()
