"""The kernels' inner loops alone: the same bits whichever instructions there are, and whatever shares a tile."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import binding, ir
from numba import njit
from torch import Tensor

from engine.kernels.attention_tiles import (
    TOGETHER,
    copy_key,
    mix_tile,
    score_alone,
    score_tile,
    spread_row,
)
from engine.kernels.byte_dots import SMALL, WHOLE, ByteDots, available
from engine.kernels.int4_tiles import int4_tile
from engine.kernels.int8_tiles import int8_tile
from engine.kernels.intrinsics import put_f32
from engine.kernels.native import register_symbols
from engine.kernels.rounding import round_row
from engine.kernels.tiles import DOTS, MOST_ROWS, PAIRS, has_pairs
from engine.models.kv_cache import KEY_BLOCK
from engine.quantization.int8_layout import tile


@cache
def compiled_tile(kind: str, rows: int, name: str) -> Any:
    made = int4_tile(rows, SMALL[name]) if kind == "int4" else int8_tile(rows, WHOLE[name])

    @njit
    def run(
        weights: int, scales: int, count: int, x: int, inputs: int, extras: int, step: int, out: int
    ) -> None:
        made(weights, scales, count, x, inputs, extras, step, out, 40)

    return run


def run_tile(kind: str, name: str, weights: Tensor, scales: Tensor, x: Tensor, extras: Tensor) -> Tensor:
    """Rounded inputs ``x`` through a tile made of the instructions ``name``."""
    rows, inputs = x.shape
    width, count = (32, inputs // 32) if kind == "int4" else (16, inputs)
    out = torch.full((rows, 40), 7.0)
    addresses = (tensor.data_ptr() for tensor in (weights, scales, x, extras, out))
    weights_at, scales_at, x_at, extras_at, out_at = addresses
    compiled_tile(kind, rows, name)(
        weights_at, scales_at, count, x_at, inputs, extras_at, extras[0].nbytes, out_at
    )
    assert (out[:, width:] == 7).all()
    return out[:, :width]


def rounded_rows(rows: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random rounded inputs, what is kept beside them, and the numbers that they stand for."""
    codes = torch.randint(-127, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    codes[0], codes[-1, ::2] = 127, -127  # the largest sums that there are
    groups = -(-inputs // 32)
    steps = torch.rand(rows, groups, generator=generator)
    sums = torch.nn.functional.pad(codes, (0, -inputs % 32)).view(rows, groups, 32).sum(-1)
    whole = [(factor * sums).int().view(torch.float32) for factor in (-8, -128)]
    exact = codes.double() * steps.double().repeat_interleave(32, dim=1)[:, :inputs]
    return codes, torch.stack((steps, sums.float(), *whole), dim=-1), exact


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_every_instruction_gives_the_same_bits(name: str, rows: int) -> None:
    """All that this CPU has, and plain integer arithmetic, which stands for those that it has not."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (32, 96), generator=generator, dtype=torch.uint8)
    codes[0], codes[17] = 15, 0
    scales = (torch.randn(3, 32, 2, generator=generator) / 10).bfloat16()
    x, extras, exact = rounded_rows(rows, 96, generator)
    low, high = codes.view(2, 16, 24, 4)
    tensors = (low | high << 4).transpose(0, 1).contiguous(), scales, x, extras
    got, plain = (run_tile("int4", each, *tensors) for each in (name, "generic"))
    scale, zero = (part.double().T.repeat_interleave(32, dim=1) for part in scales.unbind(-1))
    wanted = exact @ ((codes.double() - 8) * scale + zero).T
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.equal(got, plain)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("inputs", [16, 96, 112])
def test_every_instruction_gives_the_same_bits_with_int8(name: str, rows: int, inputs: int) -> None:
    """Whole groups and a half one; sums that 16 bits do not hold."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (16, inputs), generator=generator, dtype=torch.int8)
    weight[0], weight[1], weight[2] = 127, -127, -128
    scales = (torch.randn(16, generator=generator) / 10).bfloat16()
    x, extras, exact = rounded_rows(rows, inputs, generator)
    tiled = weight.clone()
    tile(tiled)
    tensors = tiled, scales, x, extras
    got, plain = (run_tile("int8", each, *tensors) for each in (name, "generic"))
    wanted = exact @ (weight.double() * scales.double()[:, None]).T
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.equal(got, plain)


@cache
def compiled_dots(pairs: bool, rows: int, dtype: torch.dtype) -> Any:
    made = (PAIRS if pairs else DOTS)[rows - 1]
    tag = np.float32(0) if dtype == torch.float32 else np.uint16(0)

    @njit
    def run(weights: int, count: int, x: int, out: int) -> None:
        made(tag, weights, count, x, count, out, 3)

    return run


@pytest.mark.parametrize("count", [16, 32, 48, 64, 112, 576])
@pytest.mark.parametrize(
    ("dtype", "pairs"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_rows_that_share_a_tile_have_the_bits_of_one_alone(
    dtype: torch.dtype, pairs: bool, count: int
) -> None:
    if pairs and not has_pairs():
        pytest.skip("this processor multiplies no pairs of bfloat16")
    register_symbols()
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(count, generator=generator).to(dtype)
    x = torch.randn(MOST_ROWS, count, generator=generator)
    x = x.bfloat16() if pairs else x
    wanted = x.double() @ weight.double()
    for rows in range(1, MOST_ROWS + 1):
        together, alone = torch.full((rows, 3), 7.0), torch.full((rows, 3), 7.0)
        compiled_dots(pairs, rows, dtype)(weight.data_ptr(), count, x.data_ptr(), together.data_ptr())
        for row in range(rows):
            compiled_dots(pairs, 1, dtype)(weight.data_ptr(), count, x[row].data_ptr(), alone[row].data_ptr())
        assert torch.equal(together, alone) and (together[:, 1:] == 7).all()
        torch.testing.assert_close(together[:, 0].double(), wanted[:rows], rtol=1e-5, atol=1e-4)


@njit
def _round(x: int, codes: int, extras: int, inputs: int) -> None:
    round_row(x, codes, extras, inputs)


@pytest.mark.parametrize("inputs", [16, 64, 80])
def test_rows_are_rounded_group_by_group(inputs: int) -> None:
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(inputs))
    x[0], x[-1] = 100, -50  # one group must not spoil the others
    if inputs == 64:
        x[32:] = 0
    groups = -(-inputs // 32)
    codes, extras = torch.full((inputs + 16,), 99, dtype=torch.int8), torch.full((groups + 1, 4), 7.0)
    _round(x.data_ptr(), codes.data_ptr(), extras.data_ptr(), inputs)
    assert (codes[inputs:] == 99).all() and (extras[groups:] == 7).all()
    for number, (group, own) in enumerate(zip(x.split(32), codes[:inputs].split(32), strict=True)):
        step, sum_ = extras[number, :2].tolist()
        too_much = extras[number, 2:].view(torch.int32).tolist()
        assert step == pytest.approx(float(group.abs().max()) / 127)
        assert sum_ == own.sum() and too_much == [-8 * own.sum(), -128 * own.sum()]
        assert (own * step - group).abs().max() <= 0.501 * step
        assert own.abs().max() == (127 if step else 0)


@pytest.mark.parametrize(("lanes", "vectors"), [(16, 4), (16, 2), (8, 4), (8, 2), (4, 4)])
@pytest.mark.parametrize("queries", [1, 3, TOGETHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_share_a_tile_keep_their_bits(
    queries: int, dtype: torch.dtype, lanes: int, vectors: int
) -> None:
    """On processors with other registers too; those of 16 bytes are ARM's."""
    tag = np.float32(0) if dtype == torch.float32 else np.uint16(0)
    generator = torch.Generator().manual_seed(queries)
    x, slots = (
        torch.randn(queries, 80, generator=generator),
        torch.randn(64, 80, generator=generator).to(dtype),
    )
    keys, bytes_ = slots.T.contiguous(), slots.itemsize  # a block: slot beside slot
    together, mixed = score_tile(queries, vectors, lanes), mix_tile(queries, vectors, lanes)
    mixed_alone, width, few = mix_tile(1, 2, 4), lanes * vectors, 8

    @njit
    def share(x: int, keys: int, values: int, scores: int, out: int) -> None:
        together(tag, x, 320, keys, 5, 59, 80, np.float32(0.5), scores, 256, 0)
        mixed(tag, scores, 256, values, 80 * bytes_, 5, 59, out, 320, 0)

    @njit
    def one(x: int, keys: int, values: int, scores: int, out: int) -> None:
        for slot in range(64):
            put_f32(scores + 4 * slot, score_alone(tag, x, keys + slot * bytes_, 80, np.float32(0.5)))
        for first, last in ((5, 9), (9, 59)):  # cut wherever
            for at in range(0, width, few):
                mixed_alone(
                    tag, scores, 0, values + at * bytes_, 80 * bytes_, first, last, out + 4 * at, 0, 0
                )

    shared, own = torch.full((2, queries, 64), 7.0), torch.zeros(2, queries, 80)
    share(x.data_ptr(), keys.data_ptr(), slots.data_ptr(), shared[0].data_ptr(), own[0].data_ptr())
    for query in range(queries):
        rows = (shared[1, query].data_ptr(), own[1, query].data_ptr())
        one(x[query].data_ptr(), keys.data_ptr(), slots.data_ptr(), *rows)
    scores = 0.5 * x @ slots.float().T
    torch.testing.assert_close(shared[1], scores)
    begin, end = 5 // width * width, -(-59 // width) * width  # whole vectors
    assert torch.equal(shared[0, :, begin:end], shared[1, :, begin:end])
    assert (shared[0, :, :begin] == 7).all() and (shared[0, :, end:] == 7).all()
    assert torch.equal(*own) and not own[:, :, width:].any()
    torch.testing.assert_close(own[0, :, :width], scores[:, 5:59] @ slots[5:59, :width].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_written_and_copied_slot_by_slot(dtype: torch.dtype) -> None:
    tag = np.float32(0) if dtype == torch.float32 else np.uint16(0)
    key, block = torch.randn(48), torch.full((48, KEY_BLOCK), 7.0).to(dtype)

    @njit
    def write(key: int, block: int, step: int) -> None:
        spread_row(tag, block + 3 * step, key, 48)
        copy_key(tag, block + 60 * step, block + 3 * step, 48)

    write(key.data_ptr(), block.data_ptr(), block.itemsize)
    assert torch.equal(block[:, 3], key.to(dtype)) and torch.equal(block[:, 60], key.to(dtype))
    assert (block[:, [*range(3), *range(4, 60), *range(61, 64)]] == 7).all()


@pytest.mark.parametrize(("kinds", "flips"), [(SMALL, 0), (WHOLE, 2)])
def test_the_instruction_for_arm_is_one(kinds: dict[str, ByteDots], flips: int) -> None:
    """It cannot run here, but LLVM can say what it becomes."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "arm64-apple-darwin"
    words, bytes_ = ir.VectorType(ir.IntType(32), 8), ir.VectorType(ir.IntType(8), 32)
    function = ir.Function(module, ir.FunctionType(words, [words, bytes_, bytes_]), "dots")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(kinds["neon-dotprod"].add(builder, *function.args))
    target = binding.Target.from_triple("arm64-apple-darwin")
    machine = target.create_target_machine(cpu="apple-m1")
    code = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert len(re.findall(r"\bsdot", code)) == 2 and "mul" not in code
    assert len(re.findall(r"\beor", code)) == flips  # codes become the numbers that they stand for
