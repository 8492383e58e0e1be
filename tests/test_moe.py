"""Mixture-of-experts models: logits against transformers', and rows that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import doctor
from engine.errors import ModelFileError
from engine.kernels import fused_unavailable, make_fused_stepper
from engine.loading import load_session
from engine.models.checkpoint import open_checkpoint
from engine.models.decoder import Decoder
from engine.models.feed_forward import MixtureOfExperts
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, forward_in_parts, make_stepper
from engine.requests import GenerationRequest
from tests import tiny
from tests.test_models import (  # noqa: F401  (the same tests, on the cases below)
    Case,
    run,
    test_layer_ranges_compose,
    test_prefill,
    test_ragged_chunks_after_a_rollback,
    test_step_by_step,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.MOE_FAMILIES},
    "mixtral, window": ("mixtral", {"sliding_window": 48}),
    "olmoe, normalised weights and clipped": ("olmoe", {"norm_topk_prob": True, "clip_qkv": 1.5}),
    "olmoe, biases": ("olmoe", {"attention_bias": True}),
    "qwen2_moe, dense layers": ("qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_moe, every second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "granitemoe, biases": ("granitemoe", {"attention_bias": True}),
    "granitemoe, one expert": ("granitemoe", {"num_experts_per_tok": 1}),
    "mixtral, all experts": ("mixtral", {"num_experts_per_tok": 8}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model") / "tiny", *CASES[request.param])


@pytest.fixture(params=["torch", "fused"])
def stepper(request: pytest.FixtureRequest, case: Case) -> Stepper:
    if request.param == "torch":
        return TorchStepper(case.decoder)
    if case.decoder.config.qkv_clip is not None:
        assert fused_unavailable(case.decoder) == "they do not clip queries and keys."
        pytest.skip("torch runs it")
    assert fused_unavailable(case.decoder) is None
    return make_fused_stepper(case.decoder)


@pytest.fixture(scope="module", params=tiny.MOE_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.mark.parametrize("name", ["fp32", "int4", "int8", "bf16"])
def test_a_row_does_not_depend_on_the_others(folder: Path, name: str) -> None:
    """Experts are shared by whichever rows ask for them."""
    layer = next(la for la in load_decoder(folder, name).layers if isinstance(la.ffn, MixtureOfExperts))
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = layer.ffn(rows)
    alone = torch.cat([layer.ffn(row[None]) for row in rows])
    if name == "int4":
        assert torch.equal(together, alone)
    else:
        torch.testing.assert_close(together, alone, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("make", [TorchStepper, make_stepper])
def test_int4_rows_are_the_same_in_any_company(folder: Path, make: Callable[[Decoder], Stepper]) -> None:
    """Through all layers, to the last bit: what lossless verification of drafts stands on."""
    stepper = make(load_decoder(folder, "int4"))
    ids = torch.randint(3, tiny.vocab_size(), (40,), generator=torch.Generator().manual_seed(3))
    caches = [stepper.decoder.new_cache(64) for _ in range(2)]
    for cache in caches:
        stepper.prefill(ids[:24].tolist(), cache)
    together = run(stepper, ids[24:], caches[0], 24)
    alone = torch.cat([run(stepper, ids[at : at + 1], caches[1], at) for at in range(24, 40)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["fp32", "int8", "bf16", "int4"])
def test_fused_rows_are_the_same_in_any_company_and_any_prefill(folder: Path, name: str) -> None:
    stepper = make_stepper(load_decoder(folder, name))
    assert stepper.name == "fused"
    ids = torch.randint(3, tiny.vocab_size(), (100,), generator=torch.Generator().manual_seed(3)).tolist()
    stepper.prefill(ids, whole := stepper.decoder.new_cache(128))
    pieces, at = stepper.decoder.new_cache(16), 0
    for size in (1, 2, 3, 5, 64, 25):
        hidden = stepper.run_layers(stepper.embed(ids[at : at + size]), pieces, at, 0, 3)
        pieces.length = at = at + size
    for one, other in zip(tiny.cached(whole, 100), tiny.cached(pieces, 100), strict=True):
        assert torch.equal(one, other)
    again = stepper.run_layers(stepper.embed(ids[-1:]), whole, 99, 0, 3)
    assert torch.equal(again[0], hidden[-1])


@pytest.mark.parametrize("name", ["fp32", "int8", "bf16", "int4"])
def test_a_pass_in_one_command_is_the_same_in_parts(case: Case, name: str) -> None:
    """Fresh rows, rows some layers deep, and alternatives to others; what many rows want in common as well."""
    decoder = load_decoder(case.folder, name)
    if fused_unavailable(decoder):
        pytest.skip("torch runs it")
    stepper = make_fused_stepper(decoder)
    ids = torch.randint(3, tiny.vocab_size(), (60,), generator=torch.Generator().manual_seed(3)).tolist()
    stepper.prefill(ids[:40], cache := decoder.new_cache(64))
    for rows, depth, instead_of in [(1, 0, ()), (2, 0, ()), (3, 1, ()), (5, 2, (1, 2)), (16, 0, ())]:
        tokens = ids[40 : 40 + rows]
        begun = [stepper.run_layers(stepper.embed(tokens[:1]), cache, 40, 0, depth)] if depth else []
        call = tokens[len(begun) :], cache, begun, depth, instead_of
        hidden, logits = (each.clone() for each in stepper.forward(*call))
        for one, other in zip((hidden, logits), forward_in_parts(stepper, *call), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["int4", "int8", "bf16"])
def test_quantized_experts_stay_close(folder: Path, name: str) -> None:
    exact, packed = load_decoder(folder, "fp32"), load_decoder(folder, name)
    for one, other in zip(exact.layers, packed.layers, strict=True):
        for matrix, quantized in zip(one.matrices(), other.matrices(), strict=True):
            wanted = matrix.dequantize()
            error = (quantized.dequantize() - wanted).norm() / wanted.norm()
            assert error < {"int4": 0.12, "int8": 0.01, "bf16": 0.005}[name]


def test_a_session_runs_and_says_what_it_holds(folder: Path) -> None:
    session = load_session("tiny", folder, "auto", "cpu")
    expected = "torch" if fused_unavailable(session.backend.decoder) else "fused"  # type: ignore[attr-defined]
    assert session.info.methods == ("plain", "lookup") and session.info.kernel == expected
    assert session.info.num_parameters == sum(
        parameter.numel() for parameter in tiny.build_model(folder.name).parameters()
    )
    dense_bytes = sum(m.nbytes for la in session.backend.decoder.layers for m in la.matrices())  # type: ignore[attr-defined]
    assert session.info.weight_bytes < dense_bytes  # a step reads some of the experts alone
    generation = session.stream_generate(
        GenerationRequest(prompt_ids=(5, 6, 7), max_new_tokens=5, ignore_eos=True)
    )
    assert sum(len(each.pieces) for each in generation) == 5
    report = doctor.examine_model(str(folder), "cpu")
    layers = session.backend.decoder.layers  # type: ignore[attr-defined]
    matrices = sum(m.in_features * m.out_features for layer in layers for m in layer.matrices())
    assert report.step_bytes is not None and report.weight_bytes is not None
    assert report.step_bytes < report.weight_bytes
    tied = folder.name not in ("mixtral", "olmoe")
    assert report.architecture == folder.name
    assert report.num_parameters == matrices + tiny.vocab_size() * 64 * (1 if tied else 2)


@pytest.mark.parametrize("chosen", [0, 9])
def test_a_description_that_cannot_be_is_refused(folder: Path, tmp_path: Path, chosen: int) -> None:
    import json

    broken = tiny.save_model(tmp_path / "broken", folder.name)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": chosen}))
    with pytest.raises(ModelFileError, match=f"{chosen} of 8 experts"):
        open_checkpoint(broken)


def test_missing_and_misshapen_experts_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tiny.save_model(tmp_path / "broken", folder.name)
    weights = load_file(broken / "model.safetensors")
    name = next(
        key
        for key in sorted(weights)
        if "experts.7.down" in key or "output_linear" in key or "experts.7.w2" in key
    )
    short = weights[name][:-1].contiguous()
    save_file({**weights, name: short}, broken / "model.safetensors")
    with pytest.raises(ModelFileError, match="download"):
        load_decoder(broken, "fp32")
    save_file({key: value for key, value in weights.items() if key != name}, broken / "model.safetensors")
    with pytest.raises(ModelFileError, match="lacks the weight"):
        load_decoder(broken, "fp32")
