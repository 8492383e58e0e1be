"""Training text: the model's own continuations of prompts, generated in large batches.

Self-distillation trains on what the model itself writes (on-policy), part greedy and part sampled, so
that the accelerated stream learns the distribution it will be asked to draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.decoder import Decoder, rms_norm, write_cache
from engine.models.kv_cache import KVCache


@dataclass(frozen=True)
class Sequences:
    """Token sequences, right-padded.

    Attributes:
        tokens: int32 ``[n, S]``.
        prompt_lengths, lengths: int32 ``[n]``; the continuation is ``tokens[i, prompt_lengths[i] : lengths[i]]``.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor

    @property
    def num_new_tokens(self) -> int:
        return int((self.lengths - self.prompt_lengths).sum())

    def select(self, rows: Tensor) -> Sequences:
        return Sequences(self.tokens[rows], self.prompt_lengths[rows], self.lengths[rows])

    @staticmethod
    def join(parts: Sequence[Sequences]) -> Sequences:
        width = max(part.tokens.shape[1] for part in parts)
        return Sequences(
            torch.cat([F.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )


@torch.inference_mode()
def generate_continuations(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    on_step: Callable[[int], bool] | None = None,
) -> Sequences:
    """Continue every prompt at once, one row each.

    Args:
        prompts: token ids; rows of similar length waste least.
        temperatures: per row; 0 is greedy.
        on_step: called with the number of steps done now and then; returning True stops early.
    """
    device = decoder.device
    batch, longest = len(prompts), max(map(len, prompts))
    width = -(-(longest + max_new_tokens) // 16) * 16
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(batch, width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(list(prompt), device=device)
    cache = decoder.new_cache(width, batch)
    decoder.rope.ensure(width)

    # Prefill all but each row's last token; rows shorter than the longest compute padding that later
    # steps overwrite before they could see it.
    for begin in range(0, batch, _PREFILL_ROWS):
        rows = slice(begin, begin + _PREFILL_ROWS)
        _prefill(decoder, cache, rows, tokens[rows, :longest])

    positions = lengths - 1
    current = tokens.gather(1, positions[:, None])
    heat = torch.tensor(temperatures, device=device, dtype=torch.float32)[:, None]
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(list(eos_ids), device=device)
    slots = torch.arange(cache.capacity, device=device)

    def step() -> None:
        logits = _decode_rows(decoder, cache, current, positions, slots)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
        chosen = torch.where(heat > 0, logits / heat.clamp(min=1e-4) + noise, logits).argmax(-1, keepdim=True)
        positions.add_(alive.long())
        kept = torch.where(alive[:, None], chosen, current)
        current.copy_(kept)
        tokens.scatter_(1, positions[:, None], kept)
        alive.logical_and_(~torch.isin(kept[:, 0], stop_ids))

    run = _as_graph(step, (positions, current, tokens, alive)) if device.type == "cuda" else step
    for count in range(max_new_tokens):
        run()
        if count % 16 == 15 and (not bool(alive.any()) or (on_step is not None and on_step(count + 1))):
            break
    return Sequences(tokens.int().cpu(), lengths.int().cpu(), (positions + 1).int().cpu())


_PREFILL_ROWS = 64


def _prefill(decoder: Decoder, cache: KVCache, rows: slice, tokens: Tensor) -> None:
    config = decoder.config
    hidden = decoder.embed(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    cos, sin = decoder.rope.rows(positions[:1])
    for index in range(config.num_layers):
        layer = decoder.layers[index]
        x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
        q, k, v = decoder.project_qkv(index, x, cos, sin)
        cache.keys[index][rows, :, : tokens.shape[1]] = k.transpose(1, 2)
        cache.values[index][rows, :, : tokens.shape[1]] = v.transpose(1, 2)
        hidden = hidden + layer.o(causal_attention(q, k, v))
        x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        hidden = hidden + decoder.layers[index].ffn(x)


def _decode_rows(
    decoder: Decoder, cache: KVCache, current: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """One token of every row: ``current [B, 1]`` at ``positions [B]`` -> logits ``[B, V]``."""
    config = decoder.config
    where = positions[:, None]
    cos, sin = decoder.rope.rows(where)
    visible = (slots <= where)[:, None, None]  # [B, 1, 1, S]
    hidden = decoder.embed(current)
    for index in range(config.num_layers):
        layer = decoder.layers[index]
        x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
        q, k, v = decoder.project_qkv(index, x, cos, sin)
        write_cache(cache, index, where, k, v)
        # The query heads of one KV head are the rows of one attention problem: no head is repeated.
        grouped = q.view(q.shape[0], config.num_kv_heads, config.group_size, config.head_dim)
        mask = visible.expand(-1, config.num_kv_heads, config.group_size, -1)
        mixed = F.scaled_dot_product_attention(
            grouped, cache.keys[index], cache.values[index], attn_mask=mask
        )
        hidden = hidden + layer.o(mixed.reshape(q.shape[0], 1, -1))
        x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        hidden = hidden + decoder.layers[index].ffn(x)
    return decoder.logits(hidden)[:, 0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole-sequence attention for training: ``q [B, T, Hq, hd]``, ``k, v [B, T, Hkv, hd] -> [B, T, Hq hd]``."""
    batch, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    return out.transpose(1, 2).reshape(batch, rows, -1)


def _as_graph(step: Callable[[], None], state: tuple[Tensor, ...]) -> Callable[[], None]:
    """Capture ``step`` as a CUDA graph: launching its thousand kernels one by one takes longer than they do."""
    saved = [t.clone() for t in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    return graph.replay
