"""GGUF files: every family against transformers, every tensor type against the gguf package, 4-bit codes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import _type_traits

from engine.errors import ModelFileError, UnsupportedModelError
from engine.models.checkpoint import GgufCheckpoint, open_checkpoint
from engine.models.gguf_file import GgufFile
from engine.models.loader import load_decoder
from engine.quantization import get_format
from engine.quantization.int4 import quantize_groups
from tests import tiny
from tests.tiny_gguf import gguf_name, random_blocks, save_gguf

CPU = torch.device("cpu")
TYPES = sorted(kind.name for kind in _type_traits)
CODES_KEPT = ("Q4_0", "Q4_1", "Q4_K")
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, biases and own head": ("llama", {"attention_bias": True, "tie_word_embeddings": False}, {}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "mistral, window": ("mistral", {}, {"attention.sliding_window": 48}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}, {}),
    **{family: (family, {}, {}) for family in ("mixtral", "olmoe", "granitemoe")},
    "olmoe, clipped": ("olmoe", {"clip_qkv": 1.5}, {"attention.clamp_kqv": 1.5}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}, {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, {}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64,
            }
        },
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes, extra = CASES[name]
    model = tiny.build_model(family, **changes)
    decoder = load_decoder(save_gguf(tmp_path / "tiny.gguf", model, extra=extra), "fp32")
    ids = torch.randint(3, tiny.vocab_size(), (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
    hidden = decoder.run_layers(decoder.embed(ids), torch.arange(100)[None], decoder.new_cache(100), 0, 3, 0)
    assert (decoder.logits(hidden) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_rotary_factors_of_llama3(tmp_path: Path) -> None:
    """llama.cpp stores them ready-made."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    trained = {"original_max_position_embeddings": 64, "rope_theta": 500.0}
    model = tiny.build_model("llama", rope_parameters={"rope_type": "llama3", **scaling, **trained})
    plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 7 and factors.min() == 1
    path = save_gguf(tmp_path / "tiny.gguf", model)
    checkpoint = GgufCheckpoint(with_tensor(path, "rope_freqs.weight", factors.numpy()))
    from engine.models.rope import inverse_frequencies

    inverse, factor = inverse_frequencies(checkpoint.config)
    assert torch.allclose(inverse, model.model.rotary_emb.inv_freq, rtol=1e-5) and factor == 1


def with_tensor(path: Path, name: str, values: np.ndarray) -> Path:
    """A copy of a GGUF file with one more tensor."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("more.gguf")
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def one_tensor(path: Path, kind: str, blocks: np.ndarray) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_that_the_package_knows_is_read(kind: str, tmp_path: Path) -> None:
    blocks = random_blocks(kind, 48, 512)
    file = one_tensor(tmp_path / "one.gguf", kind, blocks)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(48, 512)
    assert np.isfinite(expected).all() and np.unique(expected).size > 2
    assert np.array_equal(file.dequantize("weight").numpy(), expected)
    linear = get_format("int4").pack(file.groups("weight") or file.dequantize("weight"), None, CPU)
    step = (expected.max() - expected.min()) / 15
    assert (linear.dequantize() - torch.from_numpy(expected)).abs().max() <= 0.6 * step


@pytest.mark.parametrize("kind", CODES_KEPT)
def test_four_bit_codes_are_kept(kind: str, tmp_path: Path) -> None:
    """What comes out differs from the file by the rounding of scales and zeros to bf16, and by no more."""
    blocks = random_blocks(kind, 64, 512)
    file = one_tensor(tmp_path / "one.gguf", kind, blocks)
    groups = file.groups("weight")
    assert groups is not None and groups.codes.dtype == torch.uint8
    expected = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(64, 512))
    assert torch.allclose(groups.dequantize(), expected, rtol=1e-6, atol=1e-6)
    linear: Any = get_format("int4").pack(groups, None, CPU)
    scale, zero = linear.scales_and_zeros.permute(2, 1, 0)  # [N, K / 32] each
    assert torch.equal(scale, groups.scale.bfloat16())
    assert torch.equal(zero, (groups.minimum + 8 * groups.scale).bfloat16())
    wide_scale, wide_zero = (part.float().repeat_interleave(32, dim=1) for part in (scale, zero))
    wanted = (groups.codes.float() - 8) * wide_scale + wide_zero
    # torch's kernel hands them out in bf16
    assert torch.allclose(linear.dequantize(), wanted, rtol=2**-7, atol=1e-3)
    largest = (groups.codes.float() - 8).abs() * wide_scale.abs() + wide_zero.abs()
    assert ((wanted - expected).abs() <= largest * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in CODES_KEPT])
def test_other_types_have_no_groups(kind: str, tmp_path: Path) -> None:
    assert one_tensor(tmp_path / "one.gguf", kind, random_blocks(kind, 32, 256)).groups("weight") is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_loaded_model_holds_the_codes_of_the_file(family: str, tmp_path: Path) -> None:
    """Rotary rows in order, matrices joined, also where one of them is stored in another type."""
    path = save_gguf(tmp_path / "tiny.gguf", tiny.build_model(family), "Q4_1")
    checkpoint, decoder = open_checkpoint(path), load_decoder(path, "int4")
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    stored = torch.cat([checkpoint.tensor(name) for name in names])
    held = decoder.layers[1].qkv.dequantize()
    assert (held - stored).abs().max() < 2**-6 * stored.abs().max()
    assert decoder.weights.lm_head.nbytes == tiny.vocab_size() * 64 * 5 // 8


def test_only_what_is_not_in_groups_is_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q4_K_M files store some value matrices in Q6_K: queries and keys beside them keep their codes."""
    path = save_gguf(tmp_path / "tiny.gguf", tiny.build_model("llama"), "Q4_0")
    kept = GgufCheckpoint.groups
    monkeypatch.setattr(
        GgufCheckpoint, "groups", lambda self, name: None if ".v_proj." in name else kept(self, name)
    )
    checkpoint, decoder = open_checkpoint(path), load_decoder(path, "int4")
    linear: Any = decoder.layers[0].qkv
    scales = linear.scales_and_zeros[..., 0].T  # [N, K / 32]
    groups = [checkpoint.groups(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qk"]
    assert torch.equal(scales[:96], torch.cat([g.scale for g in groups if g is not None]).bfloat16())
    values = quantize_groups(checkpoint.tensor("model.layers.0.self_attn.v_proj.weight"))
    assert torch.equal(scales[96:], values.scale.bfloat16())


# -- Files that cannot be used -------------------------------------------------------------------------


def assert_sentence(message: str, *words: str) -> None:
    assert message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("weight_format", ["int4", "fp32"])
@pytest.mark.parametrize(
    "missing", ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"]
)
def test_a_weight_that_is_missing(
    weight_format: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_model("llama")
    weights = {name: value for name, value in model.state_dict().items() if name != missing}
    monkeypatch.setattr(model, "state_dict", lambda: weights)
    with pytest.raises(ModelFileError) as caught:
        load_decoder(save_gguf(tmp_path / "tiny.gguf", model, "Q4_0"), weight_format)
    assert_sentence(str(caught.value), "tiny.gguf", missing)
    assert gguf_name(missing).startswith("blk.")


def test_weights_of_another_shape(tmp_path: Path) -> None:
    model = tiny.build_model("llama")
    model.config.intermediate_size = 192
    with pytest.raises(ModelFileError) as caught:
        load_decoder(save_gguf(tmp_path / "tiny.gguf", model, "Q4_0"), "int4")
    assert_sentence(str(caught.value), "128 x 64", "384 x 64")


def test_what_this_version_cannot_run(tmp_path: Path) -> None:
    experts = save_gguf(tmp_path / "experts.gguf", tiny.build_model("llama"), extra={"expert_count": 8})
    with pytest.raises(ModelFileError) as missing:
        open_checkpoint(experts)
    assert_sentence(str(missing.value), "experts.gguf", "expert_used_count")
    other = tmp_path / "other.gguf"
    other.write_bytes(
        save_gguf(tmp_path / "t.gguf", tiny.build_model("llama")).read_bytes().replace(b"llama", b"falco")
    )
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(other)
    assert_sentence(str(caught.value), "other.gguf", "falco")


def test_a_stack_with_too_few_experts_is_named(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "few.gguf", tiny.build_model("qwen3_moe"), extra={"note": "x"})
    file = GgufFile(path)
    with pytest.raises(ModelFileError) as caught:
        file.find("blk.0.ffn_up_exps.weight[8]")
    assert_sentence(str(caught.value), "few.gguf", "expert 8")


@pytest.mark.parametrize("family", tiny.MOE_FAMILIES)
def test_quantized_experts_keep_their_codes(family: str, tmp_path: Path) -> None:
    """Each matrix of a stack goes into int4 code by code, as a matrix of its own would."""
    path = save_gguf(tmp_path / "tiny.gguf", tiny.build_model(family), "Q4_1")
    checkpoint, decoder = open_checkpoint(path), load_decoder(path, "int4")
    for number, expert in enumerate(decoder.layers[1].ffn.experts.resident()):  # type: ignore[union-attr]
        name = f"model.layers.1.mlp.experts.down_proj.weight[{number}]"
        scale = 0.4 if family == "granitemoe" else 1.0
        wanted, found = checkpoint.tensor(name) * scale, expert.down.dequantize()
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # scales are rounded to bf16
