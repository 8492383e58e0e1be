"""What is known of a model without loading it: its shapes and sizes, and whether there is memory for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from engine import hub
from engine.errors import ModelFileError, OutOfMemoryError, SlipstreamError, UnsupportedModelError

if TYPE_CHECKING:
    from engine.models.config import ModelConfig

_NOT_HERE = "it is not on this machine; it is fetched at the first use."
_FALLBACK = "it is of no architecture of ours: if transformers knows it, it chats, but acceleration is off."


@dataclass(frozen=True)
class ModelReport:
    """The model that was asked about, as far as it can be told without loading it."""

    source: str
    path: str | None = None  # None: it is not on this machine
    problem: str | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    context_length: int | None = None
    file_bytes: int | None = None  # also of a download that is still to come
    weight_format: str | None = None  # what `auto` picks
    weight_bytes: int | None = None  # of that format, about
    step_bytes: int | None = None  # of them, what one token reads
    reason: str | None = None
    plan: str | None = (
        None  # what lives where in memory, or why it does not fit; None for a dense model on a GPU
    )
    fits: bool | None = None  # whether there is memory for it
    memory_bytes: int | None = None  # that the process will take
    num_experts: int | None = None  # None: it has none
    num_slots: int | None = None  # of them, those in memory at the same time; the others are read from disk
    expert_bytes: int | None = None  # one of them
    routed_bytes: int | None = None  # of all that one token takes


def examine_model(
    source: str,
    device: str,
    weight_format: str = "auto",
    memory: int | None = None,
    ask_hub: bool = False,
) -> ModelReport:
    """What is known of the model, what `auto` would pick for it, and whether there is memory for it.

    Args:
        memory: bytes that a mixture-of-experts model may take; None: what is free.
        ask_hub: of a model that is not here, fetch its description from the hub.
    """
    path, size = None, None
    try:
        if hub.is_ready(source):
            path = hub.resolve(source).path
            config, size = _local_config(path), _size(path)
        elif not ask_hub or source == hub.DEFAULT_MODEL:
            return ModelReport(source, problem=_NOT_HERE)
        else:
            config, size = _remote_config(source)
        from engine.loading import pick_format

        picked, notes = pick_format(config, weight_format, device)
    except UnsupportedModelError:
        return ModelReport(source, _told(path), problem=_FALLBACK, file_bytes=size)
    except SlipstreamError as error:
        return ModelReport(source, problem=str(error) if path else f"it is not on this machine: {error}")
    from engine.quantization import WEIGHT_FORMATS

    num_parameters = count_parameters(config)
    per_weight = WEIGHT_FORMATS[picked].bytes_per_weight()
    report = ModelReport(
        source=source,
        path=_told(path),
        architecture=config.model_type,
        num_parameters=num_parameters,
        context_length=config.context_length,
        file_bytes=size,
        weight_format=picked,
        weight_bytes=int(num_parameters * per_weight),
        step_bytes=int(count_read_parameters(config) * per_weight),
        reason=" ".join(notes) or None,
    )
    if device != "cpu" and config.experts is None:
        return report
    return _with_plan(report, config, memory, device)


def _local_config(path: Path) -> ModelConfig:
    from engine.loading import is_unknown_architecture
    from engine.models.checkpoint import open_checkpoint

    if is_unknown_architecture(path):
        raise UnsupportedModelError(_FALLBACK)
    return open_checkpoint(path).config


def _remote_config(source: str) -> tuple[ModelConfig, int]:
    """The shapes of a model on the hub, and how much there is to download."""
    from engine.hub_repository import HubModel, look_up
    from engine.models.families import config_from_hf

    model = HubModel.parse(source)
    if model is None:
        raise ModelFileError(f"there is no model {source!r}, and owner/name on the hub reads otherwise.")
    offer = look_up(model)
    if offer.config is None:
        raise ModelFileError(
            f"its shapes are in its GGUF file ({size_text(offer.size)}), so more can be told once that is downloaded."
        )
    return config_from_hf(offer.config), offer.size


def _with_plan(report: ModelReport, config: ModelConfig, memory: int | None, device: str) -> ModelReport:
    """Adds whether there is memory, and what lives where in it."""
    from engine.experts.planner import default_budget, fixed_bytes, plan_memory
    from engine.quantization import get_format

    fmt = get_format(report.weight_format or "")
    if config.experts is None:  # a dense model takes what it needs
        needed, budget = fixed_bytes(config, fmt), default_budget()
        if needed <= budget:
            told = f"All of it fits into memory: it takes about {size_text(needed)}, and {size_text(budget)} can be had."
        else:
            told = (
                f"It needs about {size_text(needed)} of memory as {fmt.name}, and {size_text(budget)} can be had; close other "
                "programs or choose a smaller model."
            )
        return replace(report, plan=told, fits=needed <= budget, memory_bytes=needed)
    try:
        plan = plan_memory(config, fmt, memory, device=device)
    except OutOfMemoryError as error:
        return replace(report, plan=str(error), fits=False)
    sparse = plan.num_experts // config.experts.num_experts
    return replace(
        report, plan=str(plan), fits=True, memory_bytes=plan.total, num_experts=plan.num_experts,
        num_slots=plan.num_slots, expert_bytes=plan.expert,
        routed_bytes=sparse * config.experts.num_experts_per_tok * plan.expert,
    )  # fmt: skip


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


def fused_problem(device: str) -> str | None:
    """Why our fused kernels do not run on ``device``; None if they do."""
    if device != "cpu":
        return "they are for the CPU."
    if not find_spec("numba"):
        return "numba is not installed."
    from engine.quantization.int4_layout import torch_block

    return None if torch_block() else "this torch packs int4 weights in an order that they do not know."


def _told(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def size_text(count: int) -> str:
    """A size in memory for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
