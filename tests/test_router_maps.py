"""Maps that foretell routers: what can be foretold they do foretell, and they know how well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.experts.eviction.foreseen import LeastForeseen
from engine.experts.eviction.lru import LeastRecentlyUsed
from engine.experts.prediction.ridge_gate import RidgeGate
from engine.models.checkpoint import open_checkpoint
from engine.models.config import ModelConfig
from engine.residuals.router_maps import RouterFit, RouterMaps
from tests import tiny

NOISE = 0.2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("moe") / "qwen3_moe"
    tiny.save_model(folder, "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0])
    return open_checkpoint(folder).config


class World:
    """Routers that say a linear function of two states, and some noise."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.experts is not None
        self.config, self.generator = config, torch.Generator().manual_seed(0)
        self.maps = RouterMaps(config)
        shape = self.maps.ahead.shape
        self.ahead = torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5
        self.again = torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5

    def sequences(
        self, batch: int = 24, length: int = 40
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        states = {
            layer: 5 * torch.randn(batch, length, self.config.hidden_size, generator=self.generator)
            for layer in range(self.config.num_layers)
        }
        logits = {}
        for place, layer in enumerate(self.maps.sparse):
            said = self.maps.inputs(states[layer - 1]) @ self.ahead[place].T
            said = said + (self.maps.inputs(states[layer]) @ self.again[place].T).roll(1, dims=1)
            noise = torch.randn(said.shape, generator=self.generator)
            shift = 10 * torch.randn(batch, length, 1, generator=self.generator)  # it decides nothing
            logits[layer] = said + NOISE * noise + shift
        lengths = torch.randint(length // 2, length + 1, (batch,), generator=self.generator)
        return states, logits, lengths


def test_what_is_linear_is_found(config: ModelConfig) -> None:
    world = World(config)
    fit = RouterFit(world.maps)
    assert not world.maps.fitted
    for _ in range(12):
        fit.add(*world.sequences())
    fit.solve()
    assert world.maps.fitted
    for found, true, other, error in (
        (world.maps.ahead, world.ahead, world.again, world.maps.ahead_error),
        (world.maps.again, world.again, world.ahead, world.maps.again_error),
    ):
        centred = true - true.mean(dim=1, keepdim=True)
        # As much of it as 10,000 rows show through what the other map explains.
        assert torch.nn.functional.cosine_similarity(found.flatten(), centred.flatten(), dim=0) > 0.98
        unexplained = (NOISE**2 + other.square().sum(dim=-1).mean(dim=-1)) * (1 - 1 / true.shape[1])
        torch.testing.assert_close(error, unexplained.sqrt(), rtol=0.15, atol=0)


def test_a_fit_goes_on_where_it_was_stopped(config: ModelConfig) -> None:
    batches = [World(config).sequences() for _ in range(3)]
    whole, first = RouterFit(RouterMaps(config)), RouterFit(RouterMaps(config))
    maps = RouterMaps(config)
    second = RouterFit(maps)
    for batch in batches:
        whole.add(*batch)
    first.add(*batches[0])
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, 1)
    for batch in batches[1:]:
        second.add(*batch)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name])


@pytest.fixture
def maps(config: ModelConfig) -> RouterMaps:
    world = World(config)
    maps = world.maps
    maps.ahead.copy_(world.ahead)
    maps.again.copy_(world.again)
    maps.ahead_error.fill_(0.1)
    maps.again_error.fill_(0.1)
    return maps


def test_it_names_those_that_the_router_will_probably_choose(maps: RouterMaps, config: ModelConfig) -> None:
    assert config.experts is not None
    chosen = config.experts.num_experts_per_tok
    gate = RidgeGate(maps, chosen)
    for seed in range(20):
        hidden = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        logits = (maps.inputs(hidden) @ maps.ahead[0].T)[0]
        named = gate.predict(0, hidden)  # layer 0 has no experts of its own, layer 1 has
        best = [(1, number) for number in logits.argsort(descending=True).tolist()]
        assert named == best[: len(named)] and len(named) <= chosen + 1
        clear = bool(logits.sort().values[-chosen] - logits.sort().values[-chosen - 1] > 0.3)
        if clear:
            assert len(named) == chosen
        # Two rows want what either of them wants.
        both = gate.predict(0, torch.cat((hidden, -hidden)))
        assert set(named) | set(gate.predict(0, -hidden)) <= set(both)
    assert gate.predict(config.num_layers - 1, hidden) == []  # no layer comes behind it


def test_dense_layers_around_those_with_experts_say_nothing(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 1, 4, 5])
    config = open_checkpoint(tmp_path / "moe").config
    assert config.experts is not None
    world = World(config)
    fit = RouterFit(world.maps)
    fit.add(*world.sequences())
    fit.solve()
    hidden = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for chosen in (config.experts.num_experts_per_tok, config.experts.num_experts):
        policy = LeastForeseen((config.num_layers, config.experts.num_experts))
        gate = RidgeGate(world.maps, chosen, policy)
        named = {layer: gate.predict(layer, hidden) for layer in range(config.num_layers)}
        assert [layer for layer, keys in named.items() if keys] == [1, 2]
        assert {key[0] for keys in named.values() for key in keys} == {2, 3}
        assert [bool(row.any()) for row in policy.worth] == [False, False, True, True, False, False]


def test_the_policy_is_told_of_the_next_token(maps: RouterMaps, config: ModelConfig) -> None:
    assert config.experts is not None
    chosen = config.experts.num_experts_per_tok
    maps.again_error.fill_(5.0)  # so that no chance is as good as certain
    policy = LeastForeseen((config.num_layers, config.experts.num_experts))
    gate = RidgeGate(maps, chosen, policy)
    assert gate.informs and not RidgeGate(maps, chosen, LeastRecentlyUsed(policy.worth.shape)).informs
    hidden = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(1))
    gate.predict(2, hidden)
    policy.used(2, ())
    logits = (maps.inputs(hidden[-1:]) @ maps.again[1].T)[0]
    assert np.array_equal(policy.worth[2].argsort(), logits.argsort().numpy())
    assert policy.worth[1].max() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_native_code_says_what_torch_says(maps: RouterMaps, config: ModelConfig, rows: int) -> None:
    assert config.experts is not None
    maps.ahead_error.fill_(2.0)
    maps.again_error.fill_(3.0)
    native, torchs = (LeastForeseen((config.num_layers, config.experts.num_experts)) for _ in range(2))
    for chosen in (1, config.experts.num_experts_per_tok, config.experts.num_experts):
        gate, reference = RidgeGate(maps, chosen, native), RidgeGate(maps, chosen, torchs)
        for reader in reference._readers.values():
            assert reader.rows is not None
            reader.rows = None
        for seed in range(10):
            for layer in range(config.num_layers):
                hidden = 4 * torch.randn(
                    rows, config.hidden_size, generator=torch.Generator().manual_seed(10 * seed + layer)
                )
                assert gate.predict(layer, hidden) == reference.predict(layer, hidden)
        assert np.allclose(native.worth, torchs.worth, atol=1e-5) and native.worth.any()


def test_without_native_code_torch_reads(
    maps: RouterMaps, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError("no LLVM")

    monkeypatch.setattr("engine.experts.prediction.foretelling.load_foretell", broken)
    assert RidgeGate(maps, 2).predict(0, torch.ones(1, config.hidden_size))
