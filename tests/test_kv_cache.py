"""The key/value cache: growth keeps what is there, and a smaller length rolls back."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from engine.errors import OutOfMemoryError
from engine.models.config import ModelConfig, RopeConfig
from engine.models.kv_cache import KVCache
from tests.tiny import cached

CONFIG = ModelConfig(
    model_type="llama", hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=288, context_length=500, norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=True,
)  # fmt: skip


def fill(cache: KVCache, start: int, count: int, seed: int = 0) -> None:
    """Random keys and values of every layer at positions ``start ..``."""
    generator = torch.Generator().manual_seed(seed)
    batch = cache.values[0].shape[0]
    positions = torch.arange(start, start + count).expand(batch, count)
    for layer in range(CONFIG.num_layers):
        k, v = torch.randn(2, batch, count, 2, 16, generator=generator)
        cache.write(layer, positions, k, v)


@pytest.mark.parametrize("batch", [1, 2])  # one sequence alone has its keys in blocks
def test_growth_keeps_the_content_and_clears_the_rest(batch: int) -> None:
    cache = KVCache(CONFIG, 64, batch)
    fill(cache, 0, 64)
    before = [part.clone() for part in cached(cache, 64)]
    cache.length = 64
    cache.ensure(65)
    assert cache.capacity == 128 and cache.length == 64 and cache.generation == 2
    for old, new in zip(before, cached(cache, 128), strict=True):
        assert old.any() and torch.equal(new[:, :, :64], old) and not new[:, :, 64:].any()
    cache.ensure(128)
    assert cache.generation == 2  # there was room


@pytest.mark.parametrize(
    ("asked", "capacity"), [(1, 64), (64, 64), (65, 128), (0, 64), (10_000, 512), (499, 512)]
)
def test_capacity_is_whole_blocks_within_the_context(asked: int, capacity: int) -> None:
    cache = KVCache(CONFIG, asked)
    assert cache.capacity == capacity and cache.generation == 1
    assert all(part.shape == (1, 2, capacity, 16) for part in cached(cache, capacity))


def test_capacity_doubles_up_to_the_context() -> None:
    """A chat of many steps must not copy its cache at every step."""
    cache = KVCache(CONFIG, 64)
    capacities = []
    for length in range(1, 501):
        cache.ensure(length)
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [64, 128, 256, 512] and cache.generation == 4


def test_bytes_are_accounted() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = KVCache(CONFIG, 128, dtype=dtype)
        assert cache.nbytes == 2 * 3 * 2 * 128 * 16 * size
        cache.ensure(129)
        assert cache.nbytes == 2 * 3 * 2 * 256 * 16 * size


def test_rollback_moves_nothing_and_later_writes_replace() -> None:
    rolled, straight = KVCache(CONFIG, 64), KVCache(CONFIG, 64)
    fill(rolled, 0, 20)
    pointers = [tensor.data_ptr() for tensor in (*rolled.keys, *rolled.values)]
    fill(rolled, 20, 9, seed=1)  # drafts
    rolled.length = 20
    fill(rolled, 20, 12, seed=2)
    rolled.length = 32
    fill(straight, 0, 20)
    fill(straight, 20, 12, seed=2)
    assert pointers == [tensor.data_ptr() for tensor in (*rolled.keys, *rolled.values)]
    for one, other in zip(cached(rolled, 32), cached(straight, 32), strict=True):
        assert torch.equal(one, other)


def test_growth_after_a_rollback_keeps_the_rolled_back_part() -> None:
    cache = KVCache(CONFIG, 64)
    fill(cache, 0, 64)
    kept = [part.clone() for part in cached(cache, 30)]
    cache.length = 30
    cache.ensure(200)
    assert cache.length == 30
    assert all(torch.equal(now, before) for now, before in zip(cached(cache, 30), kept, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_written_is_read_back(batch: int) -> None:
    """In slots of several blocks at once, and of some of the sequences; a slot's copy is the same."""
    cache, generator = KVCache(CONFIG, 192, batch), torch.Generator().manual_seed(0)
    slots = torch.tensor([[3, 63, 64, 130]])
    k, v = torch.randn(2, 1, 4, 2, 16, generator=generator)
    cache.write(1, slots, k, v, batch - 1)
    for part, wanted in zip(cache.read(1, 131), (k, v), strict=True):
        assert part.shape == (batch, 2, 131, 16)
        assert torch.equal(part[-1:, :, slots[0]], wanted.transpose(1, 2))
        assert part.count_nonzero() == wanted.count_nonzero()
    cache.copy_slot(130, 7)
    assert all(torch.equal(part[:, :, 7], part[:, :, 130]) for part in cache.read(1, 131))


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_no_memory_for_some_layers_leaves_all_as_they_were(
    monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    cache, zeros, calls = KVCache(CONFIG, 64), torch.zeros, [0]
    fill(cache, 0, 64)
    before = [part.clone() for part in cached(cache, 64)]

    def refuse_one(*arguments: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == fails + 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", refuse_one)
    with pytest.raises(OutOfMemoryError):
        cache.ensure(65)
    assert cache.capacity == 64 and cache.generation > 1  # whoever keeps addresses looks again
    for old, part in zip(before, cached(cache, 64), strict=True):
        assert part.shape == old.shape and torch.equal(part, old)
    assert len({part.shape for part in cache.keys}) == len({part.shape for part in cache.values}) == 1


def test_growth_takes_little_beside_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, resized, most = KVCache(CONFIG, 64), KVCache._resized, 0
    fill(cache, 0, 64)
    layer = cache.nbytes // CONFIG.num_layers
    seen = [weakref.ref(part) for part in (*cache.keys, *cache.values)]

    def watch(self: KVCache, old: torch.Tensor, form: Any) -> torch.Tensor:
        nonlocal most
        new = resized(self, old, form)
        seen.append(weakref.ref(new))
        most = max(most, sum(part.nbytes for reference in seen if (part := reference()) is not None))
        return new

    monkeypatch.setattr(KVCache, "_resized", watch)
    cache.ensure(128)
    assert len(seen) == 4 * CONFIG.num_layers and cache.nbytes <= most <= cache.nbytes + layer


def test_no_memory_is_a_sentence_and_leaves_the_cache_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(CONFIG, 64)
    fill(cache, 0, 64)
    before = cache.keys[0].clone()

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(OutOfMemoryError) as caught:
        cache.ensure(300)
    message = str(caught.value)
    assert "320 tokens" in message and message.endswith(".") and "\n" not in message
    assert cache.capacity == 64 and cache.generation == 1 and torch.equal(cache.keys[0], before)
