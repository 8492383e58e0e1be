"""Our own decoder as a :class:`engine.decoding.base.Backend`, and what loading one returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from engine.decoding import method_factories
from engine.decoding.base import Backend, DecodingMethod
from engine.decoding.context import ContextDrafter
from engine.decoding.lookup import Lookup
from engine.errors import InvalidRequestError
from engine.models.decoder import Decoder
from engine.models.kv_cache import KVCache
from engine.models.stepper import make_stepper

if TYPE_CHECKING:
    from engine.decoding.m2r2 import M2R2
    from engine.experts.model import ExpertTiers
    from engine.models.stepper import Stepper

# Small enough that the stop flag is obeyed soon even on a large model, large enough for full speed.
PREFILL_CHUNK = 128


@dataclass(frozen=True)
class LoadedModel:
    """A backend with the facts about it that people are shown. ``load_fallback`` returns one as well."""

    backend: Backend
    architecture: str
    num_parameters: int
    weight_format: str
    device: str
    weight_bytes: int  # that one decoding step reads
    notes: tuple[str, ...] = ()


class DecoderBackend:
    """Decoder, stepper and the methods that run on them.

    Args:
        m2r2: accelerated decoding; None looks for an accelerator of this model.
        tiers: the experts of a model that are not all in memory.
    """

    prefill_chunk = PREFILL_CHUNK

    def __init__(
        self,
        decoder: Decoder,
        stepper: Stepper | None = None,
        m2r2: M2R2 | None = None,
        tiers: ExpertTiers | None = None,
    ) -> None:
        self.decoder = decoder
        self.tiers = tiers
        self.stepper = stepper or make_stepper(decoder)
        self.kernel = self.stepper.name
        self.context_length = decoder.config.context_length
        self.lookup = Lookup(self.stepper)
        self.m2r2, self.stream = (m2r2, None) if m2r2 else _m2r2(self.stepper, self.lookup.drafter)
        self.factories = method_factories(self.stepper, self.lookup, self.m2r2, self.stream)

    def methods(self) -> tuple[str, ...]:
        return tuple(self.factories)

    def method(self, name: str) -> DecodingMethod:
        if name not in self.factories:
            known = ", ".join(self.factories)
            raise InvalidRequestError(
                f"There is no decoding method {name!r} for this model; choose one of {known}."
            )
        return self.factories[name]()

    def new_cache(self, capacity: int) -> KVCache:
        return self.decoder.new_cache(capacity)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        self.stepper.prefill(ids, cache)

    def close(self) -> None:
        self.factories.clear()
        for accelerated in (self.m2r2, self.stream):
            if accelerated is not None:
                accelerated.keep()
        if self.tiers is not None:
            self.tiers.close()
        del (
            self.decoder,
            self.stepper,
            self.lookup,
            self.m2r2,
            self.stream,
            self.tiers,
        )  # running steps keep their own references to the end


def _m2r2(stepper: Stepper, context: ContextDrafter) -> tuple[M2R2 | None, M2R2 | None]:
    """Accelerated decoding, with drafts from the context and without, if there is an accelerator for this model."""
    from engine.decoding.controller_file import controller_path, load_controller, save_controller
    from engine.decoding.m2r2 import M2R2
    from engine.residuals.adapter_file import find_adapter, load_accelerator
    from engine.residuals.drafter import Drafter, make_drafter

    path = find_adapter(stepper.decoder)
    if path is None:
        return None, None

    @cache
    def drafter() -> Drafter:
        return make_drafter(stepper, load_accelerator(path, stepper.decoder))

    def method(name: str, context: ContextDrafter | None) -> M2R2:
        kept = controller_path(stepper, path, name)
        controller = load_controller(kept)
        return M2R2(drafter, controller, lambda: save_controller(kept, controller), context)

    return method("m2r2", context), method("stream", None)
