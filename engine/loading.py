"""From a model's files to a :class:`Session`: format, device, weights, tokenizer, warm-up."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelFileError, UnsupportedModelError
from engine.hardware import return_free_memory
from engine.models.gguf_header import read_header
from engine.recommended import recommended_sampling
from engine.session import ModelInfo, Session
from engine.threads import set_threads
from engine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from engine.backend import LoadedModel
    from engine.experts.planner import MemoryPlan
    from engine.models.config import ModelConfig
    from engine.models.decoder import Decoder
    from engine.progress import Progress

_FASTEST_FIRST = ("int4", "int8", "bf16")  # decoding reads all weights for each token, so the smallest wins


def load_session(
    name: str,
    path: Path,
    weight_format: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    memory: int | None = None,
    cancel: threading.Event | None = None,
) -> Session:
    """Load the model at ``path`` (``.gguf`` or folder). The arguments are those of :meth:`Session.load`.

    Raises:
        ModelFileError, UnsupportedModelError, OutOfMemoryError, ExpertStoreError.
    """
    report = _Reporter(on_progress)
    report("load", 0.0, f"Loading {name}.")
    set_threads(threads)  # kernels size their own pools by it
    held = None if path.is_dir() else read_header(path)  # for all that ask for it below
    tokenizer = load_tokenizer(path)
    device = pick_device(device)

    def on_share(share: float) -> None:
        report("load", share, f"Loading {name}.")

    if is_unknown_architecture(path):
        model = _load_fallback(path, weight_format, device, on_share)
    else:
        model = _load_decoder(path, weight_format, device, on_share, memory, on_progress, cancel)
    notes = list(model.notes)
    if tokenizer.uses_default_template:
        notes.append("This model brings no chat template, so ChatML is used; it may not follow a chat.")
    info = ModelInfo(
        name=name,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        weight_format=model.weight_format,
        device=model.device,
        context_length=model.backend.context_length,
        weight_bytes=model.weight_bytes,
        kernel=model.backend.kernel,
        methods=model.backend.methods(),
        notes=tuple(notes),
        recommended=recommended_sampling(path),
    )
    session = Session(model.backend, tokenizer, info, threads)
    report("warm up", 0.0, "Warming up.")
    try:
        session.warm_up()
    except BaseException:
        session.close()
        raise
    del held
    return_free_memory()
    report("ready", 1.0, f"{name} is ready.")
    return session


def _load_decoder(
    path: Path,
    weight_format: str,
    device: str,
    on_share: Callable[[float], None],
    memory: int | None,
    on_progress: Callable[[Progress], None] | None,
    cancel: threading.Event | None,
) -> LoadedModel:
    from engine.backend import DecoderBackend, LoadedModel
    from engine.models.checkpoint import open_checkpoint
    from engine.models.loader import load_decoder
    from engine.models.packed_model import PackedModel

    config = open_checkpoint(path).config
    weight_format, notes = pick_format(config, weight_format, device)
    plan = _plan(config, weight_format, device, memory)
    if plan is None or plan.resident:
        packed = PackedModel(path, weight_format, device)
        decoder = packed.decoder(config) or load_decoder(path, weight_format, device, on_share)
        return_free_memory()  # before the kernels are compiled: that takes some as well
        backend = DecoderBackend(decoder)
        packed.keep(decoder)  # in the order that the kernels have given it
    else:
        from engine.experts.model import load_with_tiers

        decoder, tiers = load_with_tiers(path, weight_format, plan, on_progress, on_share, cancel, device)
        backend = DecoderBackend(decoder, tiers=tiers)
        notes = (*notes, str(plan))
    return LoadedModel(
        backend, decoder.config.model_type, count_parameters(decoder), weight_format,
        str(decoder.device), decoder.weight_bytes, notes,
    )  # fmt: skip


def _plan(config: ModelConfig, weight_format: str, device: str, memory: int | None) -> MemoryPlan | None:
    """Which experts stay in memory; None for a dense model."""
    if config.experts is None:
        return None
    from engine.experts.planner import plan_memory
    from engine.quantization import get_format

    return plan_memory(config, get_format(weight_format), memory, device=device)


def _load_fallback(
    path: Path, weight_format: str, device: str, on_progress: Callable[[float], None]
) -> LoadedModel:
    from engine.models.fallback import load_fallback

    return load_fallback(path, weight_format, device, on_progress)


def is_unknown_architecture(path: Path) -> bool:
    """Is this a folder whose architecture our own decoder does not run?"""
    from engine.models.families import config_from_hf

    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config_from_hf(raw if isinstance(raw, dict) else {"model_type": "llama"})
    except UnsupportedModelError:
        return True
    except (OSError, ValueError, ModelFileError):
        pass  # not a folder, or a damaged one: the loader has the sentence for it
    return False


def pick_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is an NVIDIA GPU, else ``cpu``.

    Raises:
        UnsupportedModelError: a device that is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedModelError("This machine has no usable NVIDIA GPU; choose the device cpu.")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModelError(f"There is no device {device!r}; choose auto, cpu or cuda.") from error
    return device


def pick_format(config: ModelConfig, weight_format: str, device: str) -> tuple[str, tuple[str, ...]]:
    """The weight format to load, and a note on why, if it was chosen here and is not the fastest."""
    if weight_format != "auto":
        return weight_format, ()
    import torch

    from engine.quantization import get_format

    shapes = config.all_matrix_shapes()
    reasons: list[str] = []
    for name in _FASTEST_FIRST:
        packer = get_format(name)
        misfits = (packer.misfit(*shape) for shape in shapes)
        reason = packer.unavailable(torch.device(device)) or next((m for m in misfits if m), None)
        if reason is None:
            break
        reasons.append(f"{name} cannot be used: {reason.split(';')[0].rstrip('.')}.")
    return name, tuple(reasons)


def count_parameters(decoder: Decoder) -> int:
    """Parameters of the model, tied ones once."""
    from engine.models.feed_forward import FeedForward

    config = decoder.config
    total = config.hidden_size
    for layer in decoder.layers:
        total += FeedForward(layer.qkv, layer.o).num_parameters + layer.ffn.num_parameters
        norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        total += sum(norm.numel() for norm in norms if norm is not None)
    return total + config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)


class _Reporter:
    """Builds the hub's progress objects, so that loading and downloading report alike."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress = on_progress

    def __call__(self, stage: str, share: float, message: str) -> None:
        if self._on_progress is None:
            return
        from engine.progress import Progress

        self._on_progress(
            Progress(stage=stage, done=share, total=1.0, seconds_left=None, stalled=False, message=message)
        )
