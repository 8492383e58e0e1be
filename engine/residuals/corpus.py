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

from engine.models.decoder import Decoder, rms_norm
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

    heat = torch.tensor(temperatures, device=device, dtype=torch.float32)[:, None]
    stop_ids = torch.tensor(list(eos_ids), device=device)
    running, ends = _Running(decoder, cache, tokens, lengths, heat, stop_ids), lengths.clone()
    leg = _CUDA_LEG if device.type == "cuda" else _LEG
    for done in range(0, max_new_tokens, leg):
        steps = min(leg, max_new_tokens - done)
        running.advance(steps, longest + done + steps)
        running.leave(tokens, ends)
        if not running.num_rows or (on_step is not None and on_step(done + steps)):
            break
    running.leave(tokens, ends, all_of_them=True)
    return Sequences(tokens.int().cpu(), lengths.int().cpu(), ends.int().cpu())


# Steps between two times that finished rows leave; on a GPU a graph is captured anew each time.
_LEG, _CUDA_LEG = 16, 64


class _Running:
    """The rows that still write, and what one step does to them."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, tokens: Tensor, lengths: Tensor, heat: Tensor, stop_ids: Tensor
    ) -> None:  # fmt: skip
        self._decoder, self._cache, self._stop_ids = decoder, cache, stop_ids
        self._numbers = torch.arange(len(tokens), device=tokens.device)  # which rows they are
        self._tokens, self._heat, self._positions = tokens.clone(), heat, lengths - 1
        self._current = tokens.gather(1, self._positions[:, None])
        self._alive = torch.ones_like(lengths, dtype=torch.bool)

    @property
    def num_rows(self) -> int:
        return len(self._numbers)

    def advance(self, steps: int, reach: int) -> None:
        """Write up to ``steps`` tokens in each row, none of them at position ``reach`` or beyond."""
        num_slots = min(self._cache.capacity, -(-reach // 64) * 64)
        slots = torch.arange(num_slots, device=self._tokens.device)
        state = self._positions, self._current, self._tokens, self._alive

        def step() -> None:
            self._step(slots)

        run = _as_graph(step, state) if self._tokens.is_cuda else step
        for _ in range(steps):
            run()

    def leave(self, tokens: Tensor, ends: Tensor, all_of_them: bool = False) -> None:
        """Finished rows go to their places in ``tokens`` and ``ends``, once they are a quarter of all or more."""
        finished = torch.ones_like(self._alive) if all_of_them else ~self._alive
        count = int(finished.sum())
        if not all_of_them and 4 * count < self.num_rows:
            return
        gone = self._numbers[finished]
        tokens[gone], ends[gone] = self._tokens[finished], self._positions[finished] + 1
        kept = (~finished).nonzero()[:, 0]
        for name in ("_numbers", "_tokens", "_heat", "_positions", "_current", "_alive"):
            setattr(self, name, getattr(self, name)[kept])
        for parts in (self._cache.keys, self._cache.values):
            for index, part in enumerate(parts):  # one after the other, or both would have to fit
                parts[index] = part[kept]

    def _step(self, slots: Tensor) -> None:
        positions, alive, heat = self._positions, self._alive, self._heat
        logits = _decode_rows(self._decoder, self._cache, self._current, positions, slots).float()
        # One random number a row, found among the sums of chances: one for each token takes longer than the model.
        sums = (logits / heat.clamp(min=1e-4)).softmax(-1).cumsum(-1)
        point = torch.rand_like(heat) * sums[:, -1:]
        sampled = torch.searchsorted(sums, point, right=True).clamp(max=logits.shape[-1] - 1)
        chosen = torch.where(heat > 0, sampled, logits.argmax(-1, keepdim=True))
        positions.add_(alive.long())
        kept = torch.where(alive[:, None], chosen, self._current)
        self._current.copy_(kept)
        self._tokens.scatter_(1, positions[:, None], kept)
        alive.logical_and_(~torch.isin(kept[:, 0], self._stop_ids))


_PREFILL_ROWS = 64


def _prefill(decoder: Decoder, cache: KVCache, rows: slice, tokens: Tensor) -> None:
    config = decoder.config
    hidden = decoder.embed(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    cos, sin = decoder.rope.rows(positions[:1], decoder.dtype)
    for index in range(config.num_layers):
        layer = decoder.layers[index]
        x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
        q, k, v = decoder.project_qkv(index, x, cos, sin)
        cache.write(index, positions, k, v, rows.start)
        hidden = hidden + layer.o(causal_attention(q, k, v))
        x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        hidden = hidden + decoder.layers[index].ffn(x)


def _decode_rows(
    decoder: Decoder, cache: KVCache, current: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """One token of every row: ``current [B, 1]`` at ``positions [B]`` -> logits ``[B, V]``."""
    config = decoder.config
    where = positions[:, None]
    cos, sin = decoder.rope.rows(where, decoder.dtype)
    visible = (slots <= where)[:, None, None]  # [B, 1, 1, S]
    hidden = decoder.embed(current)
    for index in range(config.num_layers):
        layer = decoder.layers[index]
        x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
        q, k, v = decoder.project_qkv(index, x, cos, sin)
        cache.write(index, where, k, v)
        # The query heads of one KV head are the rows of one attention problem: no head is repeated.
        grouped = q.view(q.shape[0], config.num_kv_heads, config.group_size, config.head_dim)
        mask = visible.expand(-1, config.num_kv_heads, config.group_size, -1)
        keys, values = cache.read(index, len(slots))
        # One query for each of thousands of rows: two plain products are faster there than a fused attention, which is
        # made for many queries of one row.
        scores = (grouped @ keys.transpose(-1, -2)) * config.head_dim**-0.5
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ values
        hidden = hidden + layer.o(mixed.reshape(q.shape[0], 1, -1))
        x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        hidden = hidden + decoder.layers[index].ffn(x)
    return decoder.logits(hidden)[:, 0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole-sequence attention for training: ``q [B, T, Hq, hd]``, ``k, v [B, T, Hkv, hd] -> [B, T, Hq hd]``."""
    batch, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _plain_attention(q, k, v)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    return out.transpose(1, 2).reshape(batch, rows, -1)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As :func:`causal_attention`, as plain products. Torch's fused attention finds gradients of keys and values as well, which
    nobody asks for, and takes up to seven times as long with bfloat16 on a CPU."""
    batch, rows, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # The query heads of one KV head are the rows of one attention problem: no head is repeated.
    queries = (
        q.view(batch, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4).reshape(-1, group * rows, size)
    )
    keys, values = k.permute(0, 2, 3, 1).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    mask = torch.full((rows, rows), -torch.inf, dtype=q.dtype).triu(1).repeat(group, 1)
    weights = torch.baddbmm(mask.expand(len(keys), -1, -1), queries, keys, alpha=size**-0.5).softmax(-1)
    out = (weights @ values).view(batch, kv_heads, group, rows, size)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, rows, -1)


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
