"""Weight formats: what packing keeps, what a multiplication computes, bytes, and shapes that do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import doctor
from engine.backend import DecoderBackend
from engine.errors import UnsupportedModelError
from engine.kernels import fused_unavailable
from engine.loading import load_session, pick_format
from engine.models.checkpoint import open_checkpoint
from engine.models.loader import load_decoder
from engine.models.stepper import TorchStepper
from engine.quantization import WEIGHT_FORMATS, GroupQuantized, get_format, int8_layout
from engine.quantization.int4 import quantize_groups
from engine.quantization.int4_layout import (
    some_codes,
    tile,
    tiled_scales,
    torch_block,
    unpack,
    untile,
)
from engine.quantization.int8 import Int8Linear
from engine.requests import GenerationRequest
from tests import tiny

CPU = torch.device("cpu")
NEEDS_BITSANDBYTES = ("nf4", "bnb_int8")
# The quantiles that QLoRA (arXiv 2305.14314, appendix E) defines as NF4.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(params=WEIGHT_FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_sentence(message: str, *words: str) -> None:
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


def nearest(weight: Tensor, name: str) -> Tensor:
    """The closest weight that the format can hold, written out slowly."""
    if name.startswith(("fp", "bf")):
        return weight.to(get_format(name).activation_dtype).float()
    if name == "int8":
        scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
        return (weight / scale).round().clamp(-127, 127) * scale
    if name == "bnb_int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    if name == "nf4":
        blocks = weight.bfloat16().float().view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        codes = (blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)
        return (NF4[codes] * scale).view(weight.shape).bfloat16().float()
    groups = weight.view(weight.shape[0], -1, 32)
    scale = ((groups.amax(-1) - groups.amin(-1)) / 15).bfloat16().float()[..., None]
    zero = (groups.amin(-1)[..., None] + 8 * scale).bfloat16().float()
    return (((groups - zero) / scale).round().clamp(-8, 7) * scale + zero).view(weight.shape)


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (2080, 192)])
def test_packing_rounds_to_the_nearest(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    weight[0] *= 100  # one row or group must not spoil the others
    held = get_format(name).pack(weight, None, CPU).dequantize()
    assert held.dtype == torch.float32 and held.shape == shape
    # int4's kernel, and nf4's, hand the weights out in bf16
    assert torch.allclose(held, nearest(weight, name), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_multiplication_is_that_of_the_unpacked_weights(name: str, with_bias: bool) -> None:
    packer = get_format(name)
    weight, bias = random(96, 128), random(96, seed=1) if with_bias else None
    linear = packer.pack(weight, bias, CPU)
    assert (linear.out_features, linear.in_features) == (96, 128)
    exact = linear.dequantize().double()
    for shape in ((128,), (1, 128), (5, 128), (40, 128), (2, 3, 128)):
        x = random(*shape, seed=2).to(packer.activation_dtype)
        y = linear(x)
        wanted = x.double() @ exact.T + (0 if bias is None else bias.to(packer.activation_dtype).double())
        assert y.dtype == x.dtype and y.shape == (*shape[:-1], 96)
        # bnb_int8 rounds the activations to 8 bits as well; fp32 weights may be held in fp64
        tolerance = {"fp64": 1e-6, "fp32": 1e-5, "bnb_int8": 3e-2}.get(name, 1e-2)
        assert (y.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", *NEEDS_BITSANDBYTES])
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    if name in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    linear = get_format(name).pack(random(96, 128), random(96), CPU)
    x = random(16, 128, seed=3).bfloat16()
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (2, 5, 8, 16):
        assert torch.equal(linear(x[:count]), alone[:count])


def test_bytes_are_those_of_what_is_held(name: str) -> None:
    packer = get_format(name)
    linear = packer.pack(random(512, 1024), None, CPU)
    tensors = [value for value in vars(linear).values() if isinstance(value, Tensor)]
    if name == "nf4":
        tensors.append(linear.state.absmax)  # type: ignore[attr-defined]
    assert linear.nbytes == sum(tensor.nbytes for tensor in tensors)
    # a scale per row is left out of the figure: it is small on real matrices
    assert linear.nbytes / (512 * 1024) == pytest.approx(packer.bytes_per_weight(), rel=0.005)


def test_zeros_and_extremes_stay_finite(name: str) -> None:
    weight = torch.zeros(32, 64)
    weight[1] = 3e4
    weight[2, 5] = -1e-30
    linear = get_format(name).pack(weight, None, CPU)
    held = linear.dequantize()
    assert held.isfinite().all() and held[0].abs().max() < 1e-6
    assert torch.allclose(held[1], weight[1], rtol=1e-2)
    x = torch.zeros(2, 64, dtype=get_format(name).activation_dtype)
    assert torch.equal(linear(x), torch.zeros(2, 32, dtype=x.dtype))


def test_activations_beyond_float16_do_not_overflow(name: str) -> None:
    linear = get_format(name).pack(torch.eye(64), None, CPU)
    x = torch.full((1, 64), 3e5, dtype=get_format(name).activation_dtype)
    assert torch.allclose(linear(x).float(), x.float(), rtol=2e-2)


# -- int4 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [32, 96, 576])
def test_single_rows_come_out_with_their_own_codes(columns: int) -> None:
    """Packed again, they equal the rows of the whole matrix bit for bit."""
    weight = get_format("int4").pack(torch.randn(96, columns), torch.ones(96), CPU)
    keep = torch.randperm(96)[:64]
    again = get_format("int4").pack(weight.rows(keep), None, CPU)
    assert torch.equal(again.dequantize(), weight.dequantize()[keep])
    assert torch.equal(again(torch.eye(columns).bfloat16()).T, again.dequantize().bfloat16())


def torchs_order(codes: torch.Tensor, block: int) -> torch.Tensor:
    """Codes ``[N, K]`` as torch packs them on CPUs that take ``block`` outputs at once."""
    whole = codes.shape[0] // block * block
    halves = codes[:whole].view(-1, 2, block // 2, codes.shape[1])
    full = (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2)  # [blocks, K, bytes]
    tail = (codes[whole::2] | codes[whole + 1 :: 2] << 4).T
    return torch.cat((full.flatten(), tail.flatten()))


def test_torchs_order_on_this_machine() -> None:
    codes = torch.randint(0, 16, (272, 96), dtype=torch.uint8)
    block = torch_block()
    assert block in (32, 64)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(packed.flatten(), torchs_order(codes, block))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("outputs", [16, 32, 80, 272, 4144])
def test_tiles_hold_the_same_codes(block: int, outputs: int) -> None:
    """From either of torch's orders, whole blocks and narrower last ones, one piece and several."""
    codes = torch.randint(0, 16, (outputs, 96), dtype=torch.uint8)
    scales = torch.randn(3, outputs, 2).bfloat16()
    packed, moved = torchs_order(codes, block), scales.clone()
    assert torch.equal(unpack(packed, 96, block), codes)
    tile(packed, moved, 96, block)
    assert torch.equal(untile(packed, 96), codes) and torch.equal(tiled_scales(moved), scales)
    keep = torch.randperm(outputs)[: outputs // 2]
    assert torch.equal(some_codes(packed, 96, keep, None), codes[keep])


def test_a_tile_is_what_the_kernels_expect() -> None:
    """Byte 4 j + i of a line: input i of outputs j and j + 16; scales of a block side by side."""
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scales = torch.randn(2, 64, 2).bfloat16()
    packed, moved = torchs_order(codes, 32), scales.clone()
    tile(packed, moved, 64, 32)
    block, line, output, i = 1, 9, 5, 3
    byte = int(packed.view(2, 16, 64)[block, line, 4 * output + i])
    assert byte & 15 == codes[32 * block + output, 4 * line + i]
    assert byte >> 4 == codes[32 * block + 16 + output, 4 * line + i]
    assert torch.equal(moved.view(2, 2, 32, 2)[block, 1, output], scales[1, 32 * block + output])


def test_tiled_weights_give_the_same_products() -> None:
    linear = get_format("int4").pack(random(272, 128), random(272), CPU)
    x, keep = random(5, 128, seed=3).bfloat16(), torch.tensor([3, 200, 271])
    before = linear(x), linear.dequantize(), linear.rows(keep).codes
    for _ in range(2):
        linear.tile()
    after = linear(x), linear.dequantize(), linear.rows(keep).codes
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_codes_go_in_as_they_are() -> None:
    """Groups with bf16 scales come out exactly; a matrix of many pieces equals its pieces."""
    codes = torch.randint(0, 16, (2 * 1024 + 48, 96), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    scale = random(codes.shape[0], 3).abs().bfloat16().float()
    groups = GroupQuantized(codes, scale, -8 * scale)  # zero is 0, and code times scale fits bf16's 8 bits
    held = get_format("int4").pack(groups, None, CPU).dequantize()
    wanted = (codes.float() - 8) * scale.repeat_interleave(32, dim=1)
    assert torch.equal(held, wanted)


def test_other_formats_take_groups_too(name: str) -> None:
    groups = quantize_groups(random(64, 128))
    held = get_format(name).pack(groups, None, CPU).dequantize()
    assert torch.allclose(held, nearest(groups.dequantize(), name), rtol=2**-7, atol=1e-2)


def test_rounding_twice_changes_little() -> None:
    once = quantize_groups(random(64, 256))
    twice = quantize_groups(once.dequantize())
    assert (once.dequantize() - twice.dequantize()).abs().max() < 0.02


# -- int8 ----------------------------------------------------------------------------------------------


def random_codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("outputs", [7, 16, 32, 53, 4144])
def test_int8_tiles_hold_the_same_codes(outputs: int) -> None:
    """Whole tiles and rows that are too few for one, one piece and several."""
    weight = random_codes(outputs, 48)
    tiled = weight.clone()
    int8_layout.tile(tiled)
    assert torch.equal(tiled, weight) == (outputs < 16)
    assert torch.equal(int8_layout.untile(tiled), weight)
    keep = torch.randperm(outputs)[: outputs // 2]
    assert torch.equal(int8_layout.rows_of(tiled, keep), weight[keep])


def test_an_int8_tile_is_what_the_kernels_expect() -> None:
    """Byte 4 j + i of a line: input i of output j, plus 128."""
    weight = random_codes(32, 64)
    tiled = weight.clone()
    int8_layout.tile(tiled)
    block, line, output, i = 1, 9, 5, 3
    byte = int(tiled.view(torch.uint8).view(2, 16, 64)[block, line, 4 * output + i])
    assert byte - 128 == weight[16 * block + output, 4 * line + i]


def test_tiled_int8_weights_give_the_same_products() -> None:
    linear = get_format("int8").pack(random(77, 48), random(77), CPU)
    assert isinstance(linear, Int8Linear)
    x, keep = random(5, 48, seed=3).bfloat16(), torch.tensor([3, 70, 76, 3])
    before = linear(x), linear.dequantize(), linear.rows(keep)(x)
    for _ in range(2):
        linear.tile()
    assert linear.with_tensors(linear.tensors()).tiled
    after = linear(x), linear.dequantize(), linear.rows(keep)(x)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(linear.dequantize()[keep], linear.rows(keep).dequantize())


# -- Shapes, and formats that cannot be used -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("int4", (64, 48)), ("int4", (33, 64)), ("int8", (64, 33)), ("int8", (64, 40)),
        ("nf4", (64, 96)), ("bnb_int8", (64, 40)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_a_sentence(name: str, shape: tuple[int, int]) -> None:
    """torch crashes on some of these, so they must be refused before it sees them."""
    if name in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(UnsupportedModelError) as caught:
        get_format(name).pack(random(*shape), None, CPU)
    wrong = next(str(size) for size in shape if size != 64)
    assert_sentence(str(caught.value), name, wrong, "choose")


def test_an_unknown_format_is_a_sentence() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        get_format("int3")
    assert_sentence(str(caught.value), "int3", *WEIGHT_FORMATS)


@pytest.mark.parametrize("name", ["int4", "int8", *NEEDS_BITSANDBYTES])
def test_devices_without_kernels_are_named(name: str) -> None:
    if name in NEEDS_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    packer = get_format(name)
    assert packer.unavailable(CPU) is None
    assert_sentence(str(packer.unavailable(torch.device("meta"))), "meta")


@pytest.mark.parametrize("name", NEEDS_BITSANDBYTES)
def test_without_bitsandbytes_the_format_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.quantization.nf4.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError) as caught:
        load_decoder(tiny.save_model(tmp_path / "tiny"), name)
    assert_sentence(str(caught.value), name, "bitsandbytes", "not installed")
    reasons = {option.name: option.reason for option in doctor.formats("cpu")}
    assert "not installed" in str(reasons[name]) and reasons["int4"] is None


@pytest.mark.parametrize("name", NEEDS_BITSANDBYTES)
def test_bitsandbytes_formats_chat_on_the_torch_stepper(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.save_model(tmp_path / "tiny", "qwen2")
    session = load_session("tiny", folder, name, "cpu")
    assert isinstance(session.backend, DecoderBackend)
    assert isinstance(session.backend.stepper, TorchStepper) and session.info.kernel == "torch"
    assert fused_unavailable(session.backend.decoder) is not None
    request = GenerationRequest(prompt_ids=[9, 200, 31], max_new_tokens=8, ignore_eos=True)
    generation = session.stream_generate(request)
    list(generation)
    assert len(generation.result.token_ids) == 8
    ids = torch.tensor([[9, 200, 31, 77]])
    decoder, exact = session.backend.decoder, load_decoder(folder, "fp32")
    rough, wanted = (
        each.logits(each.run_layers(each.embed(ids), torch.arange(4)[None], each.new_cache(16), 0, 3))
        for each in (decoder, exact)
    )
    similarity = torch.nn.functional.cosine_similarity(rough.flatten(), wanted.flatten(), dim=0)
    assert similarity > (0.97 if name == "nf4" else 0.99)


def test_engine_imports_bitsandbytes_only_when_used() -> None:
    code = "import sys, engine.loading, engine.quantization; sys.exit('bitsandbytes' in sys.modules)"
    root = str(Path(__file__).resolve().parent.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


# -- auto ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "picked", "words"),
    [
        ({}, "int4", ()),
        ({"vocab_size": 289}, "int8", ("int4", "289 outputs")),
        ({"intermediate_size": 136}, "bf16", ("int4", "int8", "136 inputs")),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    tmp_path: Path, changes: dict[str, Any], picked: str, words: tuple[str, ...]
) -> None:
    folder = tiny.save_model(tmp_path / "tiny", "llama", **changes)
    name, notes = pick_format(open_checkpoint(folder).config, "auto", "cpu")
    assert name == picked and bool(notes) == bool(words)
    for note in notes:
        assert_sentence(note)
    assert all(word in " ".join(notes) for word in words)
    session = load_session("tiny", folder, "auto", "cpu")
    assert session.info.weight_format == picked and session.info.notes == notes
    report = doctor.examine_model(str(folder), "cpu")
    assert report.weight_format == picked and (report.reason or "") == " ".join(notes)
