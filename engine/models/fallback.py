"""Architectures that our own decoder does not know, run by transformers' modules: no acceleration.

Decoding is transformers' own forward pass with its own cache, as ``generate`` runs it; only the choice of the
next token, the streaming and the stopping are ours. Code that comes with a model is never run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, _meta_registrations

from engine.backend import PREFILL_CHUNK, LoadedModel
from engine.decoding.base import DecodingMethod, Step, TokenSequence
from engine.errors import InvalidRequestError, ModelFileError, OutOfMemoryError, UnsupportedModelError
from engine.requests import Provenance

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What forward calls its cache, by version of transformers and by architecture.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
_DEFAULT_CONTEXT = 2048  # for a config that names no length


def load_fallback(
    path: Path, weight_format: str, device: str, on_progress: Callable[[float], None]
) -> LoadedModel:
    """Load the HF folder at ``path`` with transformers.

    Args:
        weight_format: ``fp32``, ``bf16``, or ``auto`` for bf16.
        on_progress: called with the share done, 0 to 1.

    Raises:
        ModelFileError: a file is missing or damaged.
        UnsupportedModelError: transformers does not know the architecture either, or not in that format.
        OutOfMemoryError: it does not fit.
    """
    kind = _model_type(path)
    chosen = "bf16" if weight_format == "auto" else weight_format
    if chosen not in _DTYPES:
        raise UnsupportedModelError(
            f"{path.name} is a {kind} model, which runs through transformers and so not as {chosen}; "
            "choose auto, bf16 or fp32."
        )
    # Transformers makes tensors without data first, for which the app has not loaded this until it is asked.
    _meta_registrations.activate_meta  # noqa: B018
    model = _load(path, kind, _DTYPES[chosen]).to(device).eval()
    on_progress(1.0)
    note = f"Acceleration is off: {kind} is no architecture of ours, so transformers runs this model."
    backend = TransformersBackend(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return LoadedModel(backend, kind, num_parameters, chosen, device, _step_bytes(model), (note,))


class TransformersBackend:
    """A transformers model behind the interface of our own decoder."""

    kernel = "transformers"
    prefill_chunk = PREFILL_CHUNK

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
        takes = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in takes), None)
        # Without it the logits of a whole prompt would be computed.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def methods(self) -> tuple[str, ...]:
        return ("plain",)

    def method(self, name: str) -> DecodingMethod:
        if name != "plain":
            raise InvalidRequestError(
                f"There is no decoding method {name!r} for this model; choose one of plain."
            )
        return TransformersDecoding(self)

    def new_cache(self, capacity: int) -> TransformersCache:
        return TransformersCache()

    def prefill(self, ids: Sequence[int], cache: TransformersCache) -> None:
        if cache.takes_chunks:
            self.forward(ids, cache)
        else:
            cache.defer(ids)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], cache: TransformersCache) -> Tensor:
        """Append ``ids`` to the cache; the last one's logits ``[V]`` in float32."""
        if len(ids) > 1 and not cache.takes_chunks:
            cache.defer([])
        tokens = torch.tensor([[*cache.pending, *ids]], device=self.model.device)
        known = {self._cache_name: cache.past} if self._cache_name else {}
        out = self.model(tokens, use_cache=True, **known, **self._options)
        cache.append(ids, next((out[name] for name in _CACHE_NAMES if out.get(name) is not None), None))
        logits: Tensor = out.logits[0, -1].float()
        return logits

    def close(self) -> None:
        del self.model


class TransformersCache:
    """transformers' own cache, with the ids that it holds.

    Not every cache can be cut: a sliding window or a recurrent state has forgotten what came before. And
    a recurrent state goes on by single tokens only: transformers reads several as a new text. Then the cache
    is thrown away, and all tokens are read again with the next call.
    """

    def __init__(self) -> None:
        self.past: Any = None
        self.pending: list[int] = []  # tokens that count, but must be read again
        self.takes_chunks = True  # several tokens at once can be appended
        self._ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self._ids)

    @length.setter
    def length(self, length: int) -> None:
        removed = len(self._ids) - length
        if removed <= 0:
            return
        del self._ids[length:]
        if self.past is not None and not self.pending and _can_be_cut(self.past):
            self.past.crop(-removed)
        else:
            self.defer([])

    def defer(self, ids: Sequence[int]) -> None:
        """Append ``ids`` without reading them yet; the next call reads the whole text."""
        self._ids.extend(ids)
        self.past, self.pending = None, list(self._ids)

    @property
    def nbytes(self) -> int:
        return _tensor_bytes([vars(layer) for layer in getattr(self.past, "layers", ())])

    def append(self, ids: Sequence[int], past: Any) -> None:
        """Note that ``past`` now holds all tokens so far and ``ids``; None for a model that keeps nothing."""
        self._ids.extend(ids)
        self.past, self.pending = past, list(self._ids) if past is None else []
        self.takes_chunks = past is None or _takes_chunks(past)


class TransformersDecoding:
    """Plain decoding, one token a step."""

    name = "plain"
    lossless = True

    def __init__(self, backend: TransformersBackend) -> None:
        self._backend = backend

    def start(self, sequence: TokenSequence) -> None:
        self._sequence = sequence

    def step(self, max_tokens: int) -> Step:
        started = perf_counter()
        sequence = self._sequence
        logits = self._backend.forward(sequence.ids[-1:], sequence.cache)
        token = sequence.sampler.choose(logits, sequence.ids)
        sequence.ids.append(token)
        return Step((token,), (Provenance.VERIFIED,), verify_seconds=perf_counter() - started)


def _takes_chunks(past: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = getattr(past, "layers", None) or []
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def _can_be_cut(past: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = getattr(past, "layers", None) or []
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)  # and no subclass


def _tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _model_type(path: Path) -> str:
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{path / 'config.json'} cannot be read; download the model again.") from error


def _load(path: Path, kind: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if not any(path.glob("*.safetensors")):
        raise ModelFileError(f"{path.name} holds no .safetensors files; choose a model that has them.")
    try:
        # A folder of ours, so that nothing is asked of the network; remote code and pickles are refused.
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        mapping: Any = AutoModelForCausalLM._model_mapping
        known = type(config) in mapping
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"The architecture {kind!r} can be run neither by Slipstream nor by the installed transformers."
        ) from error
    except Exception as error:  # transformers checks configs with exceptions of its own
        raise ModelFileError(f"{path / 'config.json'} is damaged; download the model again.") from error
    if not known:
        raise UnsupportedModelError(f"{path.name} is a {kind} model, which writes no text; choose another.")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            raise OutOfMemoryError(
                f"{path.name} does not fit into the memory; choose a smaller model."
            ) from error
        raise ModelFileError(
            f"The weights in {path.name} are damaged or incomplete; download the model again."
        ) from error
    except MemoryError as error:
        raise OutOfMemoryError(
            f"{path.name} does not fit into the memory; choose a smaller model."
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ModelFileError(f"{path.name} lacks the weight {missing[0]}; download the model again.")
    return model


def _step_bytes(model: Any) -> int:
    """Bytes of weights that one step reads: all but an embedding table that is not the head as well."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None or table.weight is head.weight:
        return total
    return int(total - table.weight.nbytes)
