"""The accelerated stream that names experts: it changes no output, and training makes it name better."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import AdapterError, InvalidRequestError
from engine.experts.prediction.accelerated import Accelerated, StreamedDecoder
from engine.experts.prediction.next_gate import NextGate
from engine.experts.store import Key
from engine.kernels import expert_stepper
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, make_stepper
from engine.residuals.expert_files import find_stream, load_stream
from engine.residuals.expert_stream import ExpertStream, ExpertStreamConfig, run_slow, run_stream
from engine.residuals.expert_tuning import tune_stream
from engine.residuals.router_maps import router_logits
from engine.residuals.training import TrainingConfig
from engine.residuals.tuning import TuneRequest
from engine.residuals.tuning_data import DataConfig
from tests import tiny

TOKENS = list(range(40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(
        tmp_path_factory.mktemp("moe") / "qwen3_moe", "qwen3_moe", num_hidden_layers=8, mlp_only_layers=[0, 1]
    )


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, "fp32")


def make_stream(decoder: Decoder, spread: float, interval: int = 3) -> ExpertStream:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stream = ExpertStream(ExpertStreamConfig(interval, 8), decoder.config)
        for name, parameter in stream.named_parameters():
            if name.endswith("up"):
                torch.nn.init.normal_(parameter, std=spread)
    return stream.requires_grad_(False)


def logits_of(decoder: Decoder) -> torch.Tensor:
    """Step by step, then four rows at once."""
    stepper, cache = TorchStepper(decoder), decoder.new_cache(64)
    stepper.prefill(TOKENS[:8], cache)
    found = []
    for token in TOKENS[8:16]:
        hidden = stepper.run_layers(stepper.embed([token]), cache, cache.length, 0, decoder.config.num_layers)
        cache.length += 1
        found.append(stepper.logits(hidden))
    hidden = stepper.run_layers(stepper.embed(TOKENS[16:]), cache, cache.length, 0, decoder.config.num_layers)
    return torch.cat([*found, stepper.logits(hidden)])


def test_each_layer_is_named_once(decoder: Decoder) -> None:
    stream = make_stream(decoder, 0.0)
    assert stream.first == 1
    targets = [stream.target(layer) for layer in range(8)]
    # restarts at 1, 4 and 7; two layers of weights behind, three layers ahead
    assert targets == [None, 2, 4, 6, 5, 7, None, None]


@pytest.mark.parametrize("interval", [1, 3, 5])
@pytest.mark.parametrize("weight_format", ["int4", "fp32", "bf16"])
def test_the_slow_rows_do_not_notice(folder: Path, weight_format: str, interval: int) -> None:
    plain = load_decoder(folder, weight_format)
    streamed = StreamedDecoder(plain, make_stream(plain, 0.3, interval))
    if weight_format == "int4":
        assert torch.equal(logits_of(streamed), logits_of(plain))
    else:
        tolerance = 1e-4 if weight_format == "fp32" else 0.1
        torch.testing.assert_close(logits_of(streamed), logits_of(plain), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fresh", [0, 2])
@pytest.mark.parametrize("depth", [1, 2, 4, 6])
def test_rows_that_are_some_layers_deep_do_not_notice_either(
    folder: Path, depth: int, fresh: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drafts are verified: in one command, in which the stream begins behind the layers that some have gone through."""
    monkeypatch.setattr(expert_stepper, "forward_in_parts", None)
    plain, found = load_decoder(folder, "int4"), []
    for decoder in (plain, StreamedDecoder(plain, make_stream(plain, 0.3))):
        stepper, cache = make_stepper(decoder), decoder.new_cache(64)
        stepper.prefill(TOKENS[:12], cache)
        begun = [
            stepper.run_layers(stepper.embed([TOKENS[12 + row]]), cache, 12 + row, 0, depth)
            for row in range(2)
        ]
        states, logits = stepper.forward(TOKENS[14 : 14 + fresh], cache, begun, depth)
        found.append((states.clone(), logits.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Listener:
    """What a predictor says, by the layer where it says it, for the last row of a run."""

    def __init__(self, predictor: NextGate | Accelerated) -> None:
        self._predictor = predictor
        self.said: dict[int, list[Key]] = {}

    def watch(self, layer: int, hidden: torch.Tensor) -> None:
        self.said[layer] = list(self._predictor.predict(layer, hidden.flatten(0, -2)))


def test_without_training_it_is_the_next_gate(decoder: Decoder) -> None:
    streamed = StreamedDecoder(decoder, make_stream(decoder, 0.0))
    accelerated = Listener(Accelerated(streamed))
    streamed.watch = accelerated.watch
    logits_of(streamed)
    for lookahead in (1, 2, 3):
        free = Listener(NextGate(decoder, lookahead))
        plain = decoder.with_experts(lambda layer: decoder.layers[layer].ffn.experts)  # type: ignore[union-attr]
        plain.watch = free.watch
        logits_of(plain)
        for layer, keys in accelerated.said.items():
            if keys and keys[0][0] == layer + lookahead:
                assert keys == free.said[layer]


@pytest.mark.parametrize(("make", "tolerance"), [(TorchStepper, 1e-3), (make_stepper, 2e-2)])
def test_the_rows_travel_as_in_training(
    decoder: Decoder, make: Callable[[Decoder], Stepper], tolerance: float
) -> None:
    """The kernels round adapters to int8."""
    stream = make_stream(decoder, 0.3)
    tokens = torch.tensor([TOKENS])
    logits = run_stream(stream, decoder, run_slow(decoder, tokens))
    streamed = StreamedDecoder(decoder, stream)
    found: dict[tuple[int, int], torch.Tensor] = {}

    def watch(layer: int, hidden: torch.Tensor) -> None:
        target = stream.target(layer)
        if target is not None and streamed.state is not None:
            found[layer, target] = router_logits(streamed, target, streamed.state[0])

    streamed.watch = watch
    stepper, cache = make(streamed), streamed.new_cache(64)
    for token in TOKENS:
        stepper.run_layers(stepper.embed([token]), cache, cache.length, 0, 8)
        cache.length += 1
    assert found.keys() == logits.keys()
    for key, wanted in logits.items():
        torch.testing.assert_close(found[key], wanted[0, -1:], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def request_(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneRequest:
    prompts = tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 40)
    return TuneRequest(
        str(folder), prompts, training=TrainingConfig(tokens_per_batch=512, learning_rate=3e-3, warmup_steps=2),
        data=DataConfig(800, 24, num_held_out=6), steps=30, device="cpu",
        out=tmp_path_factory.mktemp("out") / "stream.safetensors",
    )  # fmt: skip


def test_training_makes_it_name_better(
    request_: TuneRequest, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tune_stream(request_, ExpertStreamConfig(rank=16), tmp_path / "work")
    recall = json.loads(path.with_suffix(".json").read_text())["measured"]["recall_by_lookahead"]
    for lookahead in (1, 2, 3):
        assert recall[f"stream {lookahead}"] > recall[f"next_gate {lookahead}"] + 0.05
    assert recall["ridge_gate 1"] > recall["next_gate 1"] + 0.05
    assert recall["next_token"] > 0.6 and recall["last_token"] > 0.6  # a tiny model repeats itself
    assert load_stream(path, decoder).maps.fitted
    assert load_stream(path, decoder).config.rank == 16
    monkeypatch.setattr("engine.residuals.expert_files.tuned_dir", lambda: tmp_path / "none")
    assert find_stream(decoder) is None
    monkeypatch.setattr("engine.residuals.expert_files.SHIPPED", path.parent.parent / "shipped")
    (path.parent.parent / "shipped").mkdir()
    path.parent.rename(path.parent.parent / "shipped" / "experts")
    assert find_stream(decoder) is not None


def test_bad_files_are_told(request_: TuneRequest, decoder: Decoder, tmp_path: Path) -> None:
    path = tune_stream(
        replace(request_, steps=1, out=tmp_path / "a.safetensors"), ExpertStreamConfig(), tmp_path / "w"
    )
    other = load_decoder(tiny.save_model(tmp_path / "other", "qwen3_moe", seed=2), "fp32")
    with pytest.raises(AdapterError, match="was trained for qwen3_moe, which is not the loaded model"):
        load_stream(path, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="damaged or incomplete"):
        load_stream(path, decoder)


def test_a_dense_model_has_no_experts_to_predict(request_: TuneRequest, tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense")
    with pytest.raises(InvalidRequestError, match="has no experts to predict"):
        tune_stream(replace(request_, source=str(dense)), ExpertStreamConfig(), tmp_path / "work")
