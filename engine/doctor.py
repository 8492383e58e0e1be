"""`python launch.py doctor`: what machine this is, what can run on it, what would be picked, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from engine import hardware, hub, paths
from engine.errors import SlipstreamError

if TYPE_CHECKING:
    from engine.models.config import ModelConfig

PACKAGES = (
    "torch", "transformers", "gradio", "tokenizers", "safetensors", "gguf", "huggingface-hub", "numba",
    "numpy", "bitsandbytes", "llama-cpp-python",
)  # fmt: skip

_FALLBACK = "it is of no architecture of ours: if transformers knows it, it chats, but acceleration is off."


@dataclass(frozen=True)
class Option:
    """A format or kernel: whether it runs here, and if not, why not."""

    name: str
    reason: str | None = None  # None: it runs
    bytes_per_weight: float | None = None


@dataclass(frozen=True)
class ModelReport:
    """The model that was asked about, as far as it can be told without loading it."""

    source: str
    path: str | None = None
    problem: str | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    context_length: int | None = None
    file_bytes: int | None = None
    weight_format: str | None = None  # what `auto` picks
    weight_bytes: int | None = None  # of that format, about
    step_bytes: int | None = None  # of them, what one token reads
    reason: str | None = None


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
    options = parser.parse_args(argv)
    report = examine(options.model, measure=not options.quick)
    if options.json:
        json.dump(dataclasses.asdict(report), sys.stdout, indent=2)
        print()
    else:
        print(describe(report))
    return 0


def examine(model: str = hub.DEFAULT_MODEL, measure: bool = True) -> Report:
    """Look at the machine, the engine and the model (nothing is downloaded or loaded)."""
    machine = hardware.machine()
    bandwidth = hardware.copy_bandwidth() if measure else None  # before torch's threads are there
    from engine.loading import pick_device

    device = pick_device("auto")
    return Report(
        versions=versions(),
        machine=machine,
        read_bandwidth=bandwidth,
        device=device,
        formats=formats(device),
        kernels=kernels(device),
        model=examine_model(model, device),
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
    return Option("fused", _fused_problem(device)), Option("torch")


def _fused_problem(device: str) -> str | None:
    if device != "cpu":
        return "they are for the CPU."
    if not find_spec("numba"):
        return "numba is not installed."
    from engine.quantization.int4_layout import int4_block

    return None if int4_block() else "this torch packs int4 weights in an order that they do not know."


def examine_model(source: str, device: str) -> ModelReport:
    """What is known of the model, and what `auto` would pick for it."""
    if not hub.is_ready(source):
        return ModelReport(source, problem="it is not on this machine; it is fetched at the first use.")
    try:
        path = hub.resolve(source).path
        from engine.loading import is_unknown_architecture, pick_format
        from engine.models.checkpoint import open_checkpoint
        from engine.quantization import WEIGHT_FORMATS

        if is_unknown_architecture(path):
            return ModelReport(source, str(path), problem=_FALLBACK)
        config = open_checkpoint(path).config
        picked, notes = pick_format(config, "auto", device)
    except SlipstreamError as error:
        return ModelReport(source, problem=str(error))
    num_parameters = count_parameters(config)
    per_weight = WEIGHT_FORMATS[picked].bytes_per_weight()
    return ModelReport(
        source=source,
        path=str(path),
        architecture=config.model_type,
        num_parameters=num_parameters,
        context_length=config.context_length,
        file_bytes=_size(path),
        weight_format=picked,
        weight_bytes=int(num_parameters * per_weight),
        step_bytes=int(count_read_parameters(config) * per_weight),
        reason=" ".join(notes) or None,
    )


def count_parameters(config: ModelConfig) -> int:
    """Weights of the matrices, tied ones once."""
    vocabularies = 1 if config.tie_embeddings else 2
    size = config.experts.total_size if config.experts is not None else 0
    return _layer_weights(config, size) + vocabularies * config.vocab_size * config.hidden_size


def count_read_parameters(config: ModelConfig) -> int:
    """Weights that one token reads: some of the experts, and of the embedding table a single row."""
    size = config.experts.active_size if config.experts is not None else 0
    return _layer_weights(config, size) + config.vocab_size * config.hidden_size


def _layer_weights(config: ModelConfig, experts_size: int) -> int:
    """Of all layers' matrices; ``experts_size`` is the feed-forward size of those with experts."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layers = range(config.num_layers)
    inner = sum(experts_size if config.is_sparse(layer) else config.intermediate_size for layer in layers)
    return config.num_layers * attention + 3 * config.hidden_size * inner


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
        lines.append(f"  {model.path} ({(model.file_bytes or 0) / 1e6:.0f} MB)")
        size = f"about {(model.weight_bytes or 0) / 1e6:.0f} MB of weights"
        lines.append(f"  auto picks {model.weight_format} on {report.device}, {size}")
        if model.reason:
            lines.append(f"  because    {model.reason}")
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


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _hub_cache() -> Path:
    from engine.hub_repository import hub_cache

    return hub_cache()
