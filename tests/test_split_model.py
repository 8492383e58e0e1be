"""A dense model split into experts: the parts of a sum, a recipe's file, and training that helps and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.errors import ModelFileError
from engine.experts import split as command
from engine.experts.healing import SplitModel, initialise
from engine.experts.split import split
from engine.experts.splitting import SplitConfig, fit_router, neuron_experts, order_neurons
from engine.loading import load_session
from engine.models.checkpoint import open_checkpoint
from engine.models.feed_forward import MixtureOfExperts
from engine.models.loader import load_decoder
from engine.models.split_checkpoint import CARD, TENSORS
from engine.requests import GenerationRequest
from engine.residuals import stages, tuning_data
from engine.residuals.corpus import Sequences
from engine.residuals.training import Batch, TrainingConfig, run_teacher
from engine.residuals.tuning import TuneRequest
from engine.residuals.tuning_data import DataConfig
from engine.residuals.tuning_store import TuningStoppedError
from tests import tiny

CONFIG = SplitConfig(num_experts=3, num_experts_per_tok=1, shared_size=32, dense_layers=1, rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("dense") / "tiny", num_hidden_layers=4)


@pytest.fixture(scope="module")
def request_(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneRequest:
    prompts = tiny.save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 40)
    return TuneRequest(
        str(model), prompts, training=TrainingConfig(tokens_per_batch=512, learning_rate=3e-3, warmup_steps=2),
        data=DataConfig(1500, 24, num_held_out=6), steps=40, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(request_: TuneRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe") / "split"
    split(request_, CONFIG, folder, tmp_path_factory.mktemp("work"))
    return folder


def test_neurons_are_divided_evenly_and_active_ones_shared() -> None:
    generator = torch.Generator().manual_seed(0)
    topics = torch.randint(0, 3, (500,), generator=generator)
    activity = 0.01 * torch.rand(500, 20, generator=generator)
    for topic in range(3):  # four neurons each that work together
        activity[:, topic * 4 : topic * 4 + 4] += (topics == topic)[:, None].float()
    activity[:, 12:] += 2.0
    order = order_neurons(activity, 8, 3)
    assert sorted(order.tolist()) == list(range(20))
    assert set(order[:8].tolist()) == set(range(12, 20))
    groups = {frozenset(group.tolist()) for group in order[8:].split(4)}
    assert groups == {frozenset(range(begin, begin + 4)) for begin in (0, 4, 8)}
    owner = neuron_experts(order, 8, 3)
    assert owner[12:].tolist() == [0] * 8 and len(set(owner[:4].tolist())) == 1


def test_a_router_in_closed_form_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(400, 16, generator=generator), torch.randn(5, 16, generator=generator)
    scores = inputs @ truth.T
    router = fit_router(inputs, scores, ridge=1e-6)
    centred = scores - scores.mean(dim=1, keepdim=True)
    assert ((inputs @ router.T).argmax(1) == centred.argmax(1)).float().mean() > 0.99


def test_with_all_experts_the_sum_is_the_dense_block(model: Path) -> None:
    """Routers whose experts weigh the same, and no corrections: only the order of the sum differs."""
    decoder = load_decoder(model, "fp32")
    everything = SplitModel(decoder, SplitConfig(3, 3, 32, 1, 4))
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = Batch(Sequences(tokens.int(), torch.tensor([1, 1]), torch.tensor([20, 20])))
    initialise(everything, [batch], 64)
    for layer in everything.layers:
        layer.router.data.zero_()
    states, _ = everything(tokens)
    torch.testing.assert_close(states, run_teacher(decoder, tokens, 0).final, rtol=1e-4, atol=1e-4)


def test_the_loaded_model_computes_what_was_trained(recipe: Path, model: Path) -> None:
    decoder = load_decoder(recipe, "fp32")
    experts = decoder.config.experts
    assert experts is not None and experts.num_experts == 3 and experts.intermediate_size == 32
    assert [isinstance(layer.ffn, MixtureOfExperts) for layer in decoder.layers] == [False, True, True, True]
    trained = SplitModel(load_decoder(model, "fp32"), CONFIG)
    from safetensors.torch import load_file

    tensors = load_file(recipe / TENSORS)
    for index in range(1, 4):
        layer = trained.layer(index)
        layer.order = tensors[f"{index}.order"].long()
        layer.owner = neuron_experts(layer.order, 32, 3)
        layer.router.data = tensors[f"{index}.router"].float()
        for name in ("gate", "up", "down"):
            getattr(layer, name).down.data = tensors[f"{index}.{name}.a"].float()
            getattr(layer, name).up.data = tensors[f"{index}.{name}.b"].float()
    tokens = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    ours = run_teacher(decoder, tokens, 0).final
    torch.testing.assert_close(ours, trained(tokens)[0], rtol=1e-3, atol=1e-3)


def test_healing_helps(recipe: Path) -> None:
    measured = json.loads((recipe / CARD).read_text())["measured"]
    assert measured["healed"]["kl"] < 0.9 * measured["before_healing"]["kl"]
    assert measured["healed"]["nll"] > 0 and 0 <= measured["healed"]["agreement"] <= 1


def test_a_recipe_chats_in_every_format(recipe: Path) -> None:
    for weight_format in ("int4", "int8", "bf16"):
        session = load_session("split", recipe, weight_format, "cpu")
        generation = session.stream_generate(
            GenerationRequest(prompt_ids=(5, 6, 7), max_new_tokens=6, ignore_eos=True)
        )
        assert sum(len(each.pieces) for each in generation) == 6
        session.close()


def test_stopped_it_goes_on_to_the_same_recipe(
    request_: TuneRequest, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(stages, "REPORT_SECONDS", -1.0)
    monkeypatch.setattr(tuning_data, "_SHARD_FLOPS", tuning_data._SHARD_FLOPS)

    class KilledError(Exception):
        pass

    def watch(progress: object) -> None:
        if progress.stage == "heal" and progress.done == 9:  # type: ignore[attr-defined]
            raise KilledError

    with pytest.raises((KilledError, TuningStoppedError)):
        split(request_, CONFIG, tmp_path / "again", tmp_path / "work", watch)
    starts: list[float] = []

    def note(progress: object) -> None:
        if progress.stage == "heal":  # type: ignore[attr-defined]
            starts.append(progress.done)  # type: ignore[attr-defined]

    split(request_, CONFIG, tmp_path / "again", tmp_path / "work", note)
    assert starts[0] == 9
    assert (tmp_path / "again" / TENSORS).read_bytes() == (recipe / TENSORS).read_bytes()


def test_what_cannot_be_used_is_said_in_a_sentence(recipe: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(recipe, broken)
    (broken / TENSORS).write_bytes((recipe / TENSORS).read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="recipe in broken is damaged or incomplete; fetch it again"):
        open_checkpoint(broken)
    from safetensors.torch import load_file, save_file

    tensors = load_file(recipe / TENSORS)
    for name, wrong in (
        ("2.router", None),
        ("1.up.b", torch.zeros(3, 4)),
        ("3.order", tensors["3.order"] * 0),
    ):
        changed = (
            {**tensors, name: wrong} if wrong is not None else {k: v for k, v in tensors.items() if k != name}
        )
        save_file(changed, broken / TENSORS)
        with pytest.raises(ModelFileError, match="damaged or incomplete"):
            open_checkpoint(broken)
    card = json.loads((recipe / CARD).read_text())
    (broken / CARD).write_text("{")
    with pytest.raises(ModelFileError, match="damaged or incomplete"):
        open_checkpoint(broken)
    other = tiny.save_model(tmp_path / "other", seed=1, num_hidden_layers=4)
    card["base_model"]["source"] = str(other)
    (broken / CARD).write_text(json.dumps(card))
    with pytest.raises(ModelFileError, match=r"is for .*other, which is not the base model"):
        open_checkpoint(broken)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("Error: ")
