"""The fused CPU kernels against plain torch arithmetic, and the promise that rows never depend on each other."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from numba import njit
from torch import Tensor

from engine.kernels import control, fused_unavailable, make_fused_stepper
from engine.kernels.adapter_phases import add_raised_rows, lower
from engine.kernels.adapters import describe_adapter
from engine.kernels.intrinsics import streaming_locality
from engine.kernels.tiles import has_pairs
from engine.models.config import ModelConfig, RopeConfig
from engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from engine.models.feed_forward import FeedForward
from engine.models.kv_cache import KVCache
from engine.models.rope import rotate
from engine.models.stepper import forward_in_parts
from engine.quantization import get_format
from engine.quantization.base import Tileable
from engine.quantization.int4_layout import torch_block
from engine.residuals.accelerator import LowRank
from tests import tiny

FORMATS = ("int4", "int8", "bf16", "fp32")
# Sizes that leave rests: a vocabulary of 4.5 blocks, and three query heads per KV head.
PLAIN = {"num_heads": 6, "num_kv_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "biases": {**PLAIN, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qk_norm": {"num_heads": 4, "num_kv_heads": 4, "qk_norm": True},
    "window": {"num_heads": 4, "num_kv_heads": 1, "sliding_windows": (5, None, 3)},
    "split_inputs": {**PLAIN, "intermediate_size": 640},
}


def make_decoder(weight_format: str, num_layers: int = 3, **changes: Any) -> Decoder:
    """A random decoder, hidden size 96, heads of 32."""
    fields = {
        "intermediate_size": 192, "qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False,
        "sliding_windows": (), "vocab_size": 288, **changes,
    }  # fmt: skip
    config = ModelConfig(
        model_type="llama", hidden_size=96, num_layers=num_layers, head_dim=32, context_length=512,
        norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=False, **fields,
    )  # fmt: skip
    packer, cpu = get_format(weight_format), torch.device("cpu")
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(outputs: int, inputs: int, bias: bool = False) -> Any:
        return packer.pack(
            random(outputs, inputs) / math.sqrt(inputs), random(outputs) if bias else None, cpu
        )

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * random(size)

    heads, size, inner = config.num_heads, config.hidden_size, config.intermediate_size
    layers = [
        LayerWeights(
            attn_norm=norm(size),
            qkv=linear((heads + 2 * config.num_kv_heads) * 32, size, config.qkv_bias),
            o=linear(size, heads * 32, config.output_bias),
            mlp_norm=norm(size),
            ffn=FeedForward(linear(2 * inner, size, config.mlp_bias), linear(size, inner, config.mlp_bias)),
            q_norm=norm(32) if config.qk_norm else None,
            k_norm=norm(32) if config.qk_norm else None,
        )
        for _ in range(num_layers)
    ]
    table = random(config.vocab_size, size).to(packer.activation_dtype)
    weights = DecoderWeights(table, tuple(layers), norm(size), linear(config.vocab_size, size))
    return Decoder(config, weights, packer.activation_dtype, cpu)


def exact(linear: Any, x: Tensor) -> Tensor:
    """``x`` times the unpacked weights in float64; integer weights have their inputs rounded to 8 bits first, bfloat16
    ones to bfloat16, where pairs of it are multiplied."""
    if isinstance(linear, Tileable):
        x = torch.cat([rounded(group) for group in x.float().split(32, dim=-1)], dim=-1)
    elif has_pairs() and linear.weight.dtype == torch.bfloat16:
        x = x.float().bfloat16()
    return x.double() @ linear.dequantize().double().T


def rounded(group: Tensor) -> Tensor:
    step = group.abs().amax(-1, keepdim=True) / 127
    return (group / step).round() * step


def expected_layers(decoder: Decoder, hidden: Tensor, positions: list[int], last: int = 3) -> Tensor:
    """The first layers on rows that start an empty sequence, in float64 on unpacked weights."""
    config, where = decoder.config, torch.tensor(positions)
    decoder.rope.ensure(max(positions) + 1)
    cos, sin = decoder.rope.rows(where[None], torch.float64)
    group = config.num_heads // config.num_kv_heads

    def apply(linear: Any, x: Tensor) -> Tensor:
        y = exact(linear, x)
        return y if linear.bias is None else y + linear.bias.double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight.double()

    h = hidden.double()
    for index, layer in enumerate(decoder.layers[:last]):
        heads = apply(layer.qkv, norm(h, layer.attn_norm)).view(len(positions), -1, config.head_dim)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k = rotate(q[None], cos, sin)[0], rotate(k[None], cos, sin)[0]
        k, v = (t.to(decoder.dtype).double().repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.head_dim)
        visible = where[None] <= where[:, None]
        window = config.sliding_window(index)
        if window is not None:
            visible &= where[None] > where[:, None] - window
        mixed = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v.transpose(0, 1)
        h = h + apply(layer.o, mixed.transpose(0, 1).flatten(1))
        gate, up = apply(layer.dense.gate_up, norm(h, layer.mlp_norm)).chunk(2, dim=-1)
        h = h + apply(layer.dense.down, torch.nn.functional.silu(gate) * up)
    return h


def rows_for(decoder: Decoder, count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, decoder.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def filled_cache(decoder: Decoder, length: int = 37) -> KVCache:
    """Random earlier positions."""
    cache, generator = decoder.new_cache(64), torch.Generator().manual_seed(9)
    config = decoder.config
    for layer in range(config.num_layers):
        k, v = torch.randn(2, 1, length, config.num_kv_heads, config.head_dim, generator=generator)
        cache.write(layer, torch.arange(length)[None], k, v)
    cache.length = length
    return cache


@pytest.fixture(scope="module", params=FORMATS)
def weight_format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_plain_arithmetic(weight_format: str, variant: str) -> None:
    decoder = make_decoder(weight_format, **VARIANTS[variant])
    stepper = make_fused_stepper(decoder, num_threads=2)
    hidden = rows_for(decoder, 11)
    # Inputs and a bf16 cache's keys that differ in the last bit of float32 are rounded apart now and then, and a row
    # then goes its own way: in more than one layer, that is.
    for last, tolerance in ((1, 1e-5), (3, 1e-5 if decoder.dtype == torch.float32 else 8e-3)):
        out = stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, last)
        expected = expected_layers(decoder, hidden, list(range(11)), last)
        assert (out - expected).abs().max() <= tolerance * expected.abs().max()

    logits = stepper.logits(out)
    normed = out.double() * torch.rsqrt(out.double().square().mean(-1, keepdim=True) + 1e-5)
    wanted = exact(decoder.weights.lm_head, normed * decoder.weights.final_norm)
    assert logits.shape == (11, 288)
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_rows_do_not_depend_on_the_batch(weight_format: str) -> None:
    decoder = make_decoder(weight_format, **VARIANTS["split_inputs"])
    stepper = make_fused_stepper(decoder, num_threads=2)
    hidden = rows_for(decoder, 9)
    alone, cache = [], filled_cache(decoder)
    for row in range(9):
        out = stepper.run_layers(hidden[row : row + 1], cache, 37 + row, 0, 3)
        alone.append((out, stepper.logits(out)))
    for count in range(1, 10):
        batch = hidden[:count].clone()
        out = stepper.run_layers(batch, filled_cache(decoder), 37, 0, 3)
        logits = stepper.logits(out)
        for row in range(count):
            assert torch.equal(out[row], alone[row][0][0])
            assert torch.equal(logits[row], alone[row][1][0])
        batch[count // 2 :] = 3 * rows_for(decoder, count, seed=count)[count // 2 :]  # later rows: noise
        noisy = stepper.run_layers(batch, filled_cache(decoder), 37, 0, 3)
        assert torch.equal(noisy[: count // 2], out[: count // 2])


def test_ranges_compose_and_rollback_leaves_no_trace(weight_format: str) -> None:
    decoder = make_decoder(weight_format, **VARIANTS["biases"])
    stepper = make_fused_stepper(decoder, num_threads=2)
    hidden = rows_for(decoder, 4)
    whole = stepper.run_layers(hidden, filled_cache(decoder), 37, 0, 3)
    cache = filled_cache(decoder)
    stepper.run_layers(rows_for(decoder, 6, seed=8), cache, 37, 0, 3)  # drafts that are rejected
    lower = torch.cat([stepper.run_layers(hidden[r : r + 1], cache, 37 + r, 0, 1) for r in range(4)])
    assert torch.equal(stepper.run_layers(lower, cache, 37, 1, 3), whole)
    assert torch.equal(stepper.run_layers(hidden, cache, 37, 2, 2), hidden)


def test_any_number_of_threads_gives_the_same_bits(weight_format: str) -> None:
    decoder = make_decoder(weight_format, **VARIANTS["split_inputs"])
    hidden, results = rows_for(decoder, 5), []
    for num_threads in (1, 2, 3):  # three on a two-core machine: waiting threads must give way
        stepper = make_fused_stepper(decoder, num_threads=num_threads)
        results.append(stepper.logits(stepper.run_layers(hidden, filled_cache(decoder), 37, 0, 3)))
        stepper.close()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_prompt_is_read_as_if_it_were_decoded(weight_format: str) -> None:
    """Keys and values of a prefill are those of single steps, bit for bit."""
    decoder = make_decoder(weight_format, **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=2)
    ids = [(7 * i) % decoder.config.vocab_size for i in range(stepper.max_rows + 9)]
    at_once, stepwise = decoder.new_cache(128), decoder.new_cache(128)
    stepper.prefill(ids[:3], at_once)
    stepper.prefill(ids[3:], at_once)
    for position, token in enumerate(ids):
        stepper.run_layers(stepper.embed([token]), stepwise, position, 0, 3)
    assert at_once.length == len(ids)
    for one, other in zip(tiny.cached(at_once, len(ids)), tiny.cached(stepwise, len(ids)), strict=True):
        assert torch.equal(one, other)


def test_a_row_that_only_reads_leaves_the_cache_alone() -> None:
    decoder = make_decoder("int4", **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=2)
    hidden, cache = rows_for(decoder, 2), filled_cache(decoder)
    slow = stepper.run_layers(hidden[:1], cache, 37, 0, 3)
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    both = stepper.run_rows(hidden, cache, [37, 37], [37, -1], 0, 3)
    assert torch.equal(both[:1], slow)
    assert all(torch.equal(a, b) for a, b in zip(before, (*cache.keys, *cache.values), strict=True))
    assert not torch.equal(both[1], both[0])


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_what_torch_does_in_a_pass_it_does_on_one_thread(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that grows would else wake threads that stay awake for a while, on the cores of the kernels' own."""
    decoder, seen, before = make_decoder("int4", **PLAIN), [], torch.get_num_threads()
    stepper, cache, allocate = (
        make_fused_stepper(decoder, num_threads=2),
        decoder.new_cache(64),
        KVCache._allocate,
    )

    def watched(self: KVCache, capacity: int) -> None:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        allocate(self, capacity)

    monkeypatch.setattr(KVCache, "_allocate", watched)
    torch.set_num_threads(2)
    try:
        while cache.length < 150:
            stepper.forward([7] * num_tokens, cache)
            cache.length += num_tokens
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert cache.capacity > 64 and set(seen) == {(1, True)}
    stepper.close()


def test_follows_a_growing_cache_and_a_second_one() -> None:
    decoder = make_decoder("bf16", **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=2)
    hidden = rows_for(decoder, 3)
    roomy = decoder.new_cache(512)
    wanted = [stepper.run_layers(hidden, roomy, start, 0, 3) for start in range(0, 300, 3)]
    growing = decoder.new_cache(64)
    for start, expected in zip(range(0, 300, 3), wanted, strict=True):
        assert torch.equal(stepper.run_layers(hidden, growing, start, 0, 3), expected)
    assert growing.generation > 1


# Half groups, split inputs that end with one, halves of a matrix that begin within a block of outputs; a vocabulary that
# leaves half a block and less than a tile.
RESTS = {**PLAIN, "intermediate_size": 656, "vocab_size": 309, "mlp_bias": True}


def test_int8_leaves_nothing_out() -> None:
    decoder = make_decoder("int8", **RESTS)
    hidden, results = rows_for(decoder, 6), []
    for num_threads in (1, 2):
        stepper = make_fused_stepper(decoder, num_threads)
        results.append(stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, 3))
        results.append(stepper.logits(results[-1]))
        alone = stepper.run_layers(hidden[:1], decoder.new_cache(64), 0, 0, 3)
        assert torch.equal(alone, results[-2][:1])
        assert torch.equal(stepper.logits(alone), results[-1][:1])
        stepper.close()
    assert all(torch.equal(one, other) for one, other in zip(results[:2], results[2:], strict=True))
    out, logits = results[:2]
    expected = expected_layers(decoder, hidden, list(range(6)))
    assert (out - expected).abs().max() <= 8e-3 * expected.abs().max()
    normed = out.double() * torch.rsqrt(out.double().square().mean(-1, keepdim=True) + 1e-5)
    wanted = exact(decoder.weights.lm_head, normed * decoder.weights.final_norm)
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@njit
def _adapt(own: int, adapter: int, x: int, rows: int, out: int) -> None:
    lower(own, adapter, x, rows)
    add_raised_rows(own, adapter, rows, out)


@pytest.mark.parametrize("rank", [8, 16, 40, 64, 128])
def test_adapters_of_any_rank(rank: int) -> None:
    stepper = make_fused_stepper(make_decoder("fp32", num_layers=1, **PLAIN), num_threads=1)
    stepper.reserve_adapters(rank)
    generator = torch.Generator().manual_seed(rank)
    adapter, x = LowRank(96, 48, rank), torch.randn(3, 96, generator=generator)
    for matrix in (adapter.down, adapter.up):
        matrix.data = torch.randn(matrix.shape, generator=generator)
    described = describe_adapter(stepper.table, adapter)
    own = stepper.team.control[control.RANKS :].ctypes.data

    def adapt(rows: Tensor) -> Tensor:
        out = torch.ones(len(rows), 48)
        _adapt(own, described.ctypes.data, rows.data_ptr(), len(rows), out.data_ptr())
        return out

    together, wanted = adapt(x), 1 + adapter(x)
    assert (together - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert torch.equal(adapt(x[1:2]), together[1:2])


def test_matmul_takes_another_head() -> None:
    decoder = make_decoder("int4", **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=2)
    head = get_format("int4").pack(torch.randn(64, 96), None, torch.device("cpu"))
    x = rows_for(decoder, 2)
    wanted = exact(head, x)
    assert (stepper.matmul(head, x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_unavailable(make_decoder("int4", **PLAIN)) is None
    assert "float64" in str(fused_unavailable(make_decoder("fp64", **PLAIN)))
    monkeypatch.setattr("engine.kernels.torch_block", lambda: None)
    assert "an order that they do not know" in str(fused_unavailable(make_decoder("int4", **PLAIN)))
    monkeypatch.undo()
    mixed = make_decoder("int4", **PLAIN)
    head = get_format("bf16").pack(torch.randn(288, 96), None, torch.device("cpu"))
    weights = DecoderWeights(mixed.weights.embedding, mixed.layers, mixed.weights.final_norm, head)
    assert "one format" in str(fused_unavailable(Decoder(mixed.config, weights, mixed.dtype, mixed.device)))


def test_int4_layout_is_recognised_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_block() in (32, 64)
    monkeypatch.setattr(
        torch, "_convert_weight_to_int4pack_for_cpu", lambda codes, tiles: codes[:, ::2].to(torch.uint8)
    )
    assert torch_block.__wrapped__() is None


@pytest.mark.parametrize("windows", [(), (70, None, 3)])
def test_rows_keep_their_bits_wherever_chunks_end(windows: tuple[int | None, ...]) -> None:
    """150 rows in calls of 64, 3 and 1: chunks end within calls, windows begin within chunks, and a call may have more
    rows than an attention task."""
    changes = {**PLAIN, "num_heads": 6, "num_kv_heads": 2, "sliding_windows": windows}
    decoder = make_decoder("fp32", **changes)
    stepper = make_fused_stepper(decoder, num_threads=3)
    hidden, results = torch.randn(150, decoder.config.hidden_size), []
    for count in (64, 3, 1):
        cache = decoder.new_cache(160)
        pieces = [
            stepper.run_layers(rows, cache, count * number, 0, 3)
            for number, rows in enumerate(hidden.split(count))
        ]
        results.append(torch.cat(pieces))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    wanted = expected_layers(decoder, hidden, list(range(150)))
    torch.testing.assert_close(results[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp32", "int4"])
@pytest.mark.parametrize(("begun", "fresh"), [(0, 1), (0, 4), (1, 0), (1, 1), (3, 2)])
def test_a_whole_pass_equals_its_parts(name: str, begun: int, fresh: int) -> None:
    """Rows that are some layers deep, and tokens behind them, in one command: bit for bit, the cache as well."""
    decoder, ids = make_decoder(name, **PLAIN), [5, 3, 17, 3, 40, 2, 8]
    stepper = make_fused_stepper(decoder, num_threads=2)
    results = []
    for whole in (True, False):
        cache = decoder.new_cache(16)
        stepper.prefill(ids[: 7 - begun - fresh], cache)
        rows = [
            stepper.run_layers(stepper.embed([token]), cache, cache.length + place, 0, 2)
            for place, token in enumerate(ids[7 - begun - fresh : 7 - fresh])
        ]
        if whole:
            hidden, logits = stepper.forward(ids[7 - fresh :] if fresh else [], cache, rows, 2)
        else:
            hidden, logits = forward_in_parts(stepper, ids[7 - fresh :] if fresh else [], cache, rows, 2, ())
        results.append((hidden, logits.clone(), *(part.clone() for part in tiny.cached(cache, 7))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_idle_workers_use_no_cpu() -> None:
    decoder = make_decoder("fp32", **PLAIN)
    stepper = make_fused_stepper(decoder, num_threads=3)
    hidden = rows_for(decoder, 1)
    first = stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, 3)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2  # a spinning worker alone would use 0.5
    assert torch.equal(stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, 3), first)  # and they wake


_CHILD = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from test_kernels import PLAIN, make_decoder, rows_for
from engine.kernels import make_fused_stepper
torch.set_num_threads(1)
decoder = make_decoder("fp32", **PLAIN)
stepper = make_fused_stepper(decoder, num_threads=2)
hidden = rows_for(decoder, 2)
first = stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, 3)
if {fork} and hasattr(os, "fork"):
    child = os.fork()
    again = stepper.run_layers(hidden, decoder.new_cache(64), 0, 0, 3)
    assert torch.equal(first, again)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.parametrize("fork", [False, True])
def test_workers_end_with_the_program_and_survive_a_fork(fork: bool) -> None:
    here = Path(__file__).resolve().parent
    code = _CHILD.format(tests=str(here), root=str(here.parent), fork=fork)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_only_zen_reads_weights_past_the_last_level_cache() -> None:
    zen = [name for name in ("znver3", "znver5", "alderlake", "rocketlake", "apple-m1", "generic", "") if
           streaming_locality(name) != streaming_locality("sapphirerapids")]  # fmt: skip
    assert zen == ["znver3", "znver5"]
