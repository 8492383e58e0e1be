"""A mixture-of-experts model with its experts in a cache: the parts put together."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import paths
from engine.experts.blob import BlobLayout
from engine.experts.cache import ExpertCache, LayerExperts, make_cache
from engine.experts.conversion import reopen, write_store
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.in_place import find_in_place
from engine.experts.memory_guard import MemoryGuard
from engine.experts.native_cache import NativeCache
from engine.experts.planner import MemoryPlan, spare_memory
from engine.experts.prediction.base import Predictor
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prediction.ridge_gate import RidgeGate
from engine.experts.prefetcher import Prefetcher
from engine.experts.report import ExpertReport
from engine.experts.slots import slot_maker
from engine.experts.store import ExpertStore, damage_mark
from engine.models.checkpoint import open_checkpoint
from engine.models.decoder import Decoder
from engine.models.loader import expert_packer, load_decoder
from engine.progress import Progress
from engine.quantization import get_format
from engine.quantization.int4_layout import torch_block

_VERSION = 2  # of what the blobs hold; raise it when packing changes
_CPU = torch.device("cpu")


class ExpertTiers:
    """Slots for a decoder's experts, what fills them ahead of time, and what keeps them within the memory: a decoder's
    :attr:`engine.models.decoder.Decoder.watch`.

    Args:
        prefetcher: None: nothing is loaded ahead of time.
        plan: the memory that the slots are part of; None: they stay as many as they are.
    """

    def __init__(
        self, cache: ExpertCache, prefetcher: Prefetcher | None = None, plan: MemoryPlan | None = None
    ) -> None:
        self.cache, self.prefetcher, self.plan = cache, prefetcher, plan
        self._guard = None if plan is None else MemoryGuard(cache, plan, str(cache.device))

    def __call__(self, layer: int, hidden: Tensor) -> None:
        if self._guard is not None:
            self._guard.look()
        if self.prefetcher is not None:
            self.prefetcher(layer, hidden)

    def begin_pass(self, rows: int) -> bool:
        if self._guard is not None:
            self._guard.look()
        if self.prefetcher is not None:
            return self.prefetcher.begin_pass(rows)
        return isinstance(self.cache, NativeCache) and self.cache.follow(None)

    def end_pass(self, rows: int) -> None:
        if self.prefetcher is not None:
            self.prefetcher.end_pass(rows)

    def report(self) -> ExpertReport:
        """The experts' state now; cheap enough for a live view."""
        cache, prefetcher = self.cache, self.prefetcher
        index = cache.store.index
        held = set(cache.residents())
        numbers = range(index.num_experts)
        return ExpertReport(
            layers=index.layers,
            resident=tuple(tuple((layer, number) in held for number in numbers) for layer in index.layers),
            uses=tuple(tuple(cache.uses[layer]) for layer in index.layers),
            num_slots=cache.num_slots,
            expert_bytes=cache.store.layout.nbytes,
            stats=replace(cache.stats),
            prefetching=prefetcher is not None and prefetcher.enabled,
            policy=cache.eviction.name,
            predictor=None if prefetcher is None else prefetcher.predictor.name,
            plan="" if self.plan is None else str(self.plan),
            planned_slots=None if self.plan is None else self.plan.num_slots,
            has_maps=prefetcher is not None and isinstance(prefetcher.predictor, RidgeGate),
        )

    def close(self) -> None:
        """Stop loading, and close the store."""
        self.cache.close()


def prepare_store(
    path: Path,
    weight_format: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
    direct: bool = False,
    device: torch.device = _CPU,
) -> ExpertStore:
    """The expert store of the model at ``path``, written at the first use into the cache folder.

    Args:
        device: where its experts compute.

    Raises:
        ExpertStoreError, ModelFileError, UnsupportedModelError.
    """
    checkpoint, fmt = open_checkpoint(path), get_format(weight_format)
    config = checkpoint.config
    assert config.experts is not None
    layout = BlobLayout.of(config, fmt, device)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    where = "" if device.type == "cpu" else f"-{device.type}"
    file = paths.cache_dir() / "experts" / f"{path.stem}-{place}-{weight_format}{where}.experts"
    about = {
        "version": _VERSION, "model": _state(path), "format": weight_format, **layout_facts(layout, device),
    }  # fmt: skip
    if damage_mark(file).exists():
        reopen(file)
        with contextlib.suppress(OSError):
            damage_mark(file).unlink()
    layers = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
    build = expert_packer(checkpoint, fmt, device)
    write_store(file, build, layers, config.experts.num_experts, layout, about, on_progress, cancel)
    return ExpertStore(file, layout, about, direct)


def load_with_tiers(
    path: Path,
    weight_format: str,
    plan: MemoryPlan,
    on_progress: Callable[[Progress], None] | None = None,
    on_share: Callable[[float], None] | None = None,
    cancel: threading.Event | None = None,
    device: str = "cpu",
) -> tuple[Decoder, ExpertTiers]:
    """Load a model whose experts are read from disk into ``plan.num_slots`` slots on ``device``; those for a GPU stay
    in RAM as well, as far as there is room.

    Raises:
        ExpertStoreError, ModelFileError, UnsupportedModelError, OutOfMemoryError.
    """
    target = torch.device(device)
    store = prepare_store(path, weight_format, on_progress, cancel, device=target)
    slots = slot_maker(store, target, plan.host)
    lying = find_in_place(store, slots)
    if lying is not None:
        lying.warm(spare_memory(plan))
    cache = make_cache(store, plan.num_slots, EVICTION_POLICIES["lfu"], slots=slots, in_place=lying)
    decoder = load_decoder(path, weight_format, target, on_share, lambda layer: LayerExperts(cache, layer))
    tiers = ExpertTiers(cache, Prefetcher(cache, _predictor(decoder, cache)), plan)
    decoder.watch = tiers
    return decoder, tiers


def _predictor(decoder: Decoder, cache: ExpertCache) -> Predictor:
    """What of all that was measured is the fastest (assets/results/README.md): the ridge gate, if it was fitted for this
    model, else the next gate. The accelerated stream names fewer experts than the first, and its row costs more."""
    from engine.residuals.expert_files import find_maps

    maps, experts = find_maps(decoder), decoder.config.experts
    if maps is None or experts is None:
        return NextGate(decoder)
    cache.eviction = foreseen = LeastForeseen(cache.store.index.shape)
    return RidgeGate(maps.to(decoder.device), experts.num_experts_per_tok, foreseen)


def layout_facts(layout: BlobLayout, device: torch.device = _CPU) -> dict[str, Any]:
    """What the bytes of a blob depend on besides the weights."""
    order = torch_block() if device.type == "cpu" else device.type
    return {"layout": layout.describe(), "int4_block": order}


def _state(source: Path) -> str:
    """Changes when a file of the model does."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
