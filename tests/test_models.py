"""Our decoder's logits against transformers', on a tiny random model of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import fused_unavailable, make_fused_stepper
from engine.models.checkpoint import open_checkpoint
from engine.models.decoder import Decoder
from engine.models.families import config_from_hf
from engine.models.loader import load_decoder
from engine.models.rope import RopeTable, inverse_frequencies
from engine.models.stepper import Stepper, TorchStepper
from tests import tiny

LENGTH = 110  # more than the sliding window, a prefill block and the rows of whole-matrix attention
TOLERANCE = 1e-4  # of the largest logit
RAGGED = (1, 3, 7, 2, 8, 1, 5, 4)


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [1.0, 1.5, 2.5, 4, 6, 9, 13, 20],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, own head": ("llama", {"tie_word_embeddings": False}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, heads wider than the model": ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama, other base and epsilon": ("llama", {**rope("default"), "rms_norm_eps": 1e-2}),
    "mistral": ("mistral", {}),
    "mistral, tied head": ("mistral", {"tie_word_embeddings": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, own head": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2, window in the last layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, own head": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "linear": ("llama", rope("linear", factor=3.0)),
    "dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": ("qwen2", rope("yarn", **YARN)),
    "yarn, attention factor": ("llama", rope("yarn", **YARN, attention_factor=0.9, beta_fast=16, beta_slow=2)),
    "yarn, mscale": ("llama", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False)),
    "longrope, trained on less": ("llama", rope("longrope", **LONGROPE, original_max_position_embeddings=64)),
    "longrope, trained on all": (
        "mistral", rope("longrope", **LONGROPE, factor=4.0, original_max_position_embeddings=tiny.CONTEXT_LENGTH),
    ),
}  # fmt: skip


class Case:
    """One model in both forms, and what transformers computes for a sequence."""

    def __init__(self, folder: Path, family: str, changes: dict[str, Any]) -> None:
        self.folder = tiny.save_model(folder, family, **changes)
        model = tiny.build_model(family, **changes)
        self.ids = torch.randint(3, tiny.vocab_size(), (LENGTH,), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.expected = model(self.ids[None]).logits[0]  # [T, V]
        self.decoder = load_decoder(self.folder, "fp32")

    def assert_close(self, logits: Tensor, rows: slice) -> None:
        assert logits.dtype == torch.float32
        difference = (logits - self.expected[rows]).abs().max() / self.expected.abs().max()
        assert difference < TOLERANCE


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model") / "tiny", *CASES[request.param])


@pytest.fixture(params=["torch", "fused"])
def stepper(request: pytest.FixtureRequest, case: Case) -> Stepper:
    if request.param == "torch":
        return TorchStepper(case.decoder)
    assert fused_unavailable(case.decoder) is None
    return make_fused_stepper(case.decoder, num_threads=1)


def run(stepper: Stepper, ids: Tensor, cache: Any, start: int) -> Tensor:
    """Logits ``[T, V]`` of ``ids`` at positions ``start ..``."""
    layers = stepper.decoder.config.num_layers
    return stepper.logits(stepper.run_layers(stepper.embed(ids.tolist()), cache, start, 0, layers))


def test_prefill(case: Case) -> None:
    """All rows at once, and the last row behind chunks of any length."""
    decoder, ids = case.decoder, case.ids
    cache, positions = decoder.new_cache(LENGTH), torch.arange(LENGTH)[None]
    for start in (0, None):  # the prefill's attention, and the one that rows of a batch use
        hidden = decoder.run_layers(decoder.embed(ids[None]), positions, cache, 0, 3, start)
        case.assert_close(decoder.logits(hidden)[0], slice(None))
    for chunk in (LENGTH, 33, 7):
        state = decoder.prefill(ids.tolist(), decoder.new_cache(16), chunk=chunk)
        case.assert_close(decoder.logits(state), slice(LENGTH - 1, None))


def test_step_by_step(case: Case, stepper: Stepper) -> None:
    cache = case.decoder.new_cache(16)
    rows = [run(stepper, case.ids[at : at + 1], cache, at) for at in range(LENGTH)]
    case.assert_close(torch.cat(rows), slice(None))


def test_ragged_chunks_after_a_rollback(case: Case, stepper: Stepper) -> None:
    """A prefill, drafts that are rejected, and then the sequence in chunks of many sizes, more of them rejected."""
    cache, at = case.decoder.new_cache(16), 41
    case.decoder.prefill(case.ids[:64].tolist(), cache)
    run(stepper, case.ids[:8], cache, cache.length)
    cache.length = at
    while at < LENGTH:
        size = min(RAGGED[at % len(RAGGED)], LENGTH - at)
        rejected = case.ids.flip(0)[: min(size, 4)]
        run(stepper, rejected, cache, at)
        case.assert_close(run(stepper, case.ids[at : at + size], cache, at), slice(at, at + size))
        at += size
        cache.length = at


def test_layer_ranges_compose(case: Case, stepper: Stepper) -> None:
    cache, ids = case.decoder.new_cache(LENGTH), case.ids
    case.decoder.prefill(ids[:90].tolist(), cache)
    lower = [stepper.run_layers(stepper.embed([int(ids[at])]), cache, at, 0, 2) for at in range(90, 98)]
    hidden = stepper.run_layers(torch.cat(lower), cache, 90, 2, 3)
    case.assert_close(stepper.logits(hidden), slice(90, 98))


# -- Config files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope, trained on less"])
def test_older_config_files_describe_the_same_rotation(kind: str) -> None:
    """``rope_scaling`` with ``type``, and ``rope_theta`` beside it, as before transformers 5."""
    raw = json.loads(tiny.hf_config("llama", **CASES[kind][1]).to_json_string())
    scaling = {**raw.pop("rope_parameters")}
    theta = scaling.pop("rope_theta")
    wanted = config_from_hf({**raw, "rope_parameters": {**scaling, "rope_theta": theta}})
    for name in ("rope_type", "type"):
        renamed = {name if key == "rope_type" else key: value for key, value in scaling.items()}
        older = config_from_hf({**raw, "rope_theta": theta, "rope_scaling": renamed})
        assert torch.equal(inverse_frequencies(older)[0], inverse_frequencies(wanted)[0])
        assert inverse_frequencies(older)[1] == inverse_frequencies(wanted)[1]


@pytest.mark.parametrize("attention_factor", [None, 1.25])
@pytest.mark.parametrize(("trained", "factors"), [(64, "long"), (tiny.CONTEXT_LENGTH, "short")])
def test_the_context_length_picks_the_set_of_longrope(
    trained: int, factors: str, attention_factor: float | None
) -> None:
    """Whatever the sequence: the set that transformers takes for one as long as the context."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LONGROPE, "original_max_position_embeddings": trained, "attention_factor": attention_factor}
    hf = tiny.hf_config("llama", **rope("longrope", **scaling))
    config = config_from_hf(json.loads(hf.to_json_string()))
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["longrope"](hf, "cpu", seq_len=tiny.CONTEXT_LENGTH)
    inverse, factor = inverse_frequencies(config)
    assert torch.equal(inverse, wanted) and factor == wanted_factor
    exponent = torch.arange(8) / 8
    torch.testing.assert_close(inverse, 1 / (torch.tensor(LONGROPE[f"{factors}_factor"]) * 1000.0**exponent))
    table = RopeTable(config)
    table.ensure(10)
    few = table.cos[:10].clone()
    table.ensure(trained + 1)  # the sequence outgrows what the model was trained on
    assert torch.equal(table.cos[:10], few)


def test_the_trained_length_may_stand_beside_the_rotation() -> None:
    """As in Phi-3's config.json, where it wins over the other one."""
    raw = json.loads(tiny.hf_config("llama", **CASES["longrope, trained on less"][1]).to_json_string())
    wanted = inverse_frequencies(config_from_hf(raw))
    raw["original_max_position_embeddings"] = raw["rope_parameters"].pop("original_max_position_embeddings")
    for other in ({}, {"original_max_position_embeddings": tiny.CONTEXT_LENGTH}):
        beside = {**raw, "rope_parameters": {**raw["rope_parameters"], **other}}
        inverse, factor = inverse_frequencies(config_from_hf(beside))
        assert torch.equal(inverse, wanted[0]) and factor == wanted[1]


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    whole = load_decoder(tiny.save_model(tmp_path / "whole", "qwen3"), "fp32")
    folder = tmp_path / "sharded"
    tiny.build_model("qwen3").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for one, other in zip(whole.layers, load_decoder(folder, "fp32").layers, strict=True):
        assert torch.equal(one.qkv.dequantize(), other.qkv.dequantize())
        assert torch.equal(one.dense.down.dequantize(), other.dense.down.dequantize())


def test_weights_are_stored_in_any_float_type(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.build_model("llama").to(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        table = load_decoder(tmp_path / str(dtype), "fp32").weights.embedding
        assert torch.equal(table, model.model.embed_tokens.weight.float())


def test_a_prefill_can_be_stopped(tmp_path: Path) -> None:
    decoder: Decoder = load_decoder(tiny.save_model(tmp_path / "tiny"), "fp32")
    cache, seen = decoder.new_cache(16), []

    def stop(done: int) -> bool:
        seen.append(done)
        return done >= 20

    assert decoder.prefill([5] * 64, cache, stop, chunk=10) is None
    assert seen == [10, 20] and cache.length == 20


def test_configs_name_the_family(tmp_path: Path) -> None:
    for family in tiny.FAMILIES:
        config = open_checkpoint(tiny.save_model(tmp_path / family, family)).config
        assert config.model_type == family
        assert config.tie_embeddings == (family != "mistral")
        assert config.qk_norm == (family == "qwen3") and config.qkv_bias == (family == "qwen2")
        assert {config.sliding_window(layer) for layer in range(3)} == {48 if family == "mistral" else None}
        assert config.matrix_shapes()[-1] == (tiny.vocab_size(), 64)
