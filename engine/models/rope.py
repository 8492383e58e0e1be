"""Rotary position embedding: tables for every scaling variant, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.errors import ModelFileError, UnsupportedModelError
from engine.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies ``[hd/2]`` (float32) and the factor on cos and sin.

    Variants follow transformers' ``modeling_rope_utils``: default, linear, dynamic (at the trained
    length, that is: unscaled), llama3, yarn, longrope.

    Raises:
        UnsupportedModelError: the scaling variant is unknown.
        ModelFileError: an entry that it needs is missing or makes no sense.
    """
    try:
        return _variant(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ModelFileError(
            "The model's description of its rotary embedding is damaged; download the model again."
        ) from error


def _variant(config: ModelConfig) -> tuple[Tensor, float]:
    rope, dim = config.rope, config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inverse = 1.0 / (rope.theta**exponent)
    if rope.factors is not None:
        return inverse / torch.tensor(rope.factors), 1.0
    kind = rope.scaling.get("rope_type", rope.scaling.get("type", "default"))
    if kind in ("default", "dynamic"):
        return inverse, 1.0
    if kind == "linear":
        return inverse / rope.scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inverse, rope.scaling), 1.0
    if kind == "yarn":
        return _yarn(config)
    if kind == "longrope":
        return _longrope(config)
    raise UnsupportedModelError(f"The rotary embedding variant {kind!r} is not known to this version.")


def _llama3(inverse: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, middle ones interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > trained / low, inverse / factor, inverse)
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    middle = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(middle, blended, scaled)


def _yarn(config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp between interpolated and original frequencies, and an attention factor."""
    scaling, dim, base = config.rope.scaling, config.head_dim, config.rope.theta
    factor = scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config.context_length
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")

    def scale(m: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        attention = scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale()

    def correction(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(scaling.get("beta_fast") or 32), correction(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    frequencies = base ** (torch.arange(0, dim, 2).float() / dim)
    return (1.0 / (factor * frequencies)) * ramp + (1.0 / frequencies) * (1 - ramp), float(attention)


def _longrope(config: ModelConfig) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): per-frequency divisors, one set for short contexts and one for long ones.

    The model's context length decides, once for all conversations, as it does in llama.cpp: the short
    set if the model was trained on all of it, else the long one. transformers instead takes the short set
    until a sequence outgrows the trained length, so its logits for shorter sequences differ from ours, and
    from then on the long one, while the keys in its cache stay rotated by the short one. Ours never change
    within a conversation, and drafts, reused caches and single steps all see the same rotation.
    """
    scaling, dim = config.rope.scaling, config.head_dim
    trained = scaling.get("original_max_position_embeddings") or config.context_length
    factor = scaling.get("factor") or config.context_length / trained
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    divisors = scaling["long_factor"] if config.context_length > trained else scaling["short_factor"]
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (torch.tensor(divisors) * config.rope.theta**exponent), float(attention)


class RopeTable:
    """cos and sin ``[S, hd/2]`` in float32, grown on demand."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._inverse, self._factor = inverse_frequencies(config)
        self._device = device
        self.cos = self.sin = torch.empty(0, config.head_dim // 2, device=device)
        self.num_positions = self.generation = 0  # S; +1 at each reallocation, as in KVCache

    def ensure(self, num_positions: int) -> None:
        """Make the tables cover positions ``[0, num_positions)``."""
        if num_positions <= self.num_positions:
            return
        size = max(num_positions, 2 * self.num_positions, 256)
        angles = torch.outer(torch.arange(size).float(), self._inverse)
        self.cos = (angles.cos() * self._factor).to(self._device)
        self.sin = (angles.sin() * self._factor).to(self._device)
        self.num_positions = size
        self.generation += 1

    def rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What :func:`rotate` takes for integer ``positions [...]``, each ``[..., hd]``; call ``ensure`` first."""
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, T, H, hd]``: the two halves of a head form the pairs.

    Args:
        cos, sin: ``[B, T, hd]``, each twice, for both halves; the first half's sin negated.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((second, first), dim=-1) * sin.unsqueeze(-2)
