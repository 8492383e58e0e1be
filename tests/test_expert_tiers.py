"""Experts in slots: whatever the slots, policies, predictors and delays, the output is that of the resident model."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import paths
from engine.experts.cache import LayerExperts, make_cache
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.eviction.base import EvictionPolicy
from engine.experts.eviction.belady import Belady
from engine.experts.in_place import InPlace
from engine.experts.model import ExpertTiers, prepare_store
from engine.experts.prediction.accelerated import Accelerated, StreamedDecoder
from engine.experts.prediction.base import Predictor
from engine.experts.prediction.draft_union import UnionDrafter
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prediction.replay import AlwaysWrong, Oracle
from engine.experts.prediction.ridge_gate import RidgeGate
from engine.experts.prefetcher import Prefetcher
from engine.experts.reader import Link
from engine.experts.store import ExpertStore, Key, Shape
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.models.stepper import Stepper, TorchStepper, make_stepper
from engine.residuals.drafter import make_drafter
from engine.residuals.expert_stream import ExpertStream, ExpertStreamConfig
from tests import tiny
from tests.test_m2r2 import Scripted, accelerator, fixed, run

PROMPT = list(range(40, 75))
NUM_LAYERS, NUM_EXPERTS = 3, 8  # of the tiny models
SLOW = Link(200e6, 3e-4)
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere nothing tells what is in the file cache"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv(paths.HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
    yield
    patch.undo()


class Model:
    """A tiny model, resident, with what it writes and which experts that takes."""

    def __init__(self, folder: Path, weight_format: str, make: Callable[[Decoder], Stepper]) -> None:
        self.folder, self.format, self.make = folder, weight_format, make
        self.resident = load_decoder(folder, weight_format)
        with Tiers(self, NUM_LAYERS * NUM_EXPERTS, EVICTION_POLICIES["lru"]) as tiers:
            tiers.cache.recording = []
            self.logits, self.tokens = write(make(tiers.decoder))
            self.trace = tuple(tiers.cache.recording)
        resident_logits, resident_tokens = write(make(self.resident))
        assert torch.equal(self.logits, resident_logits) and self.tokens == resident_tokens


class Tiers:
    """A model with slots, to be used in a ``with`` block."""

    def __init__(
        self,
        model: Model,
        num_slots: int,
        eviction: Callable[[Shape], EvictionPolicy],
        predictor: Callable[[Decoder], Predictor] | None = None,
        link: Link | None = None,
        num_threads: int = 2,
        direct: bool = False,
        in_place: Callable[[ExpertStore], InPlace] | None = None,
    ) -> None:
        store = prepare_store(model.folder, model.format, direct=direct)
        lying = in_place and in_place(store)
        self.cache = make_cache(store, num_slots, eviction, link, num_threads, in_place=lying)
        self.decoder = model.resident.with_experts(lambda layer: LayerExperts(self.cache, layer))
        prefetcher = predictor and Prefetcher(self.cache, predictor(self.decoder), always=True)
        self.tiers = ExpertTiers(self.cache, prefetcher)
        self.decoder.watch = self.tiers

    def __enter__(self) -> Tiers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tiers.close()


def write(stepper: Stepper, num_tokens: int = 12) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt's end and of each token behind it, and the tokens."""
    decoder = stepper.decoder
    cache = decoder.new_cache(64)
    stepper.prefill(PROMPT[:-1], cache)
    token, tokens, logits = PROMPT[-1], [], []
    for _ in range(num_tokens):
        logits.append(stepper.forward([token], cache)[1][0].clone())
        cache.length += 1
        token = int(logits[-1].argmax())
        tokens.append(token)
    return torch.stack(logits), tokens


FUSED, TORCH = make_stepper, TorchStepper
MODELS: list[tuple[str, str, Callable[[Decoder], Stepper]]] = [
    *((family, "fp32", FUSED) for family in tiny.MOE_FAMILIES),
    *(("qwen2_moe", weight_format, FUSED) for weight_format in ("int4", "int8", "bf16")),
    ("mixtral", "fp32", TORCH),
    ("qwen2_moe", "int4", TORCH),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}-{param[2].__name__}")
def model(request: Any, home: None, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, weight_format, make = request.param
    folder = tiny.save_model(tmp_path_factory.mktemp("model") / family, family, num_hidden_layers=NUM_LAYERS)
    return Model(folder, weight_format, make)


def check(model: Model, tiers: Tiers) -> None:
    logits, tokens = write(model.make(tiers.decoder))
    assert tokens == model.tokens
    assert torch.equal(logits, model.logits)


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, NUM_LAYERS * NUM_EXPERTS])
def test_output_does_not_depend_on_the_slots(model: Model, num_slots: int, policy: str) -> None:
    with Tiers(model, num_slots, EVICTION_POLICIES[policy]) as tiers:
        check(model, tiers)
        slots = tiers.cache.store.layout.nbytes * num_slots
        assert tiers.cache.resident_bytes == slots
        assert len(tiers.cache.residents()) <= num_slots


def predictors(model: Model) -> dict[str, Callable[[Decoder], Predictor]]:
    return {
        **{f"next-gate {n}": lambda decoder, n=n: NextGate(decoder, n) for n in (1, 2)},  # type: ignore[misc]
        "all": lambda decoder: NextGate(decoder, 1, NUM_EXPERTS),
        "oracle": lambda decoder: Oracle(model.trace),
        "oracle 2": lambda decoder: Oracle(model.trace, 2),
        "always wrong": lambda decoder: AlwaysWrong(model.trace, NUM_EXPERTS),
    }


@pytest.mark.parametrize("name", ["next-gate 1", "next-gate 2", "all", "oracle", "oracle 2", "always wrong"])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_output_does_not_depend_on_predictions(model: Model, name: str, num_slots: int) -> None:
    """On a slow link, so that loads are late, overtake each other and are taken back."""
    for policy, link, python in (("lru", SLOW, False), ("belady", None, False), ("lru", SLOW, True)):
        eviction = partial(Belady, model.trace) if policy == "belady" else EVICTION_POLICIES[policy]
        with pytest.MonkeyPatch.context() as patch:
            if python:
                patch.setattr("engine.experts.cache.find_spec", lambda name: None)
            with Tiers(model, num_slots, eviction, predictors(model)[name], link, 3) as tiers:
                check(model, tiers)
                assert tiers.cache.stats.prefetch_used <= tiers.cache.stats.prefetch_issued


def test_an_oracle_is_never_missed(model: Model) -> None:
    with Tiers(model, 16, partial(Belady, model.trace), predictors(model)["oracle"]) as tiers:
        check(model, tiers)
        stats = tiers.cache.stats
        first = [number for _, number in _of_layer(model, 0)]
        # Nothing can be known ahead of the first layer of a pass.
        assert stats.expert_misses <= len(first)
        assert stats.prefetch_used == stats.prefetch_issued


def test_a_wrong_predictor_is_never_right(model: Model) -> None:
    with Tiers(model, 12, EVICTION_POLICIES["lru"], predictors(model)["always wrong"]) as tiers:
        check(model, tiers)
        assert tiers.cache.stats.prefetch_used == 0 < tiers.cache.stats.prefetch_issued


@pytest.mark.parametrize("num_slots", [1, 5, NUM_LAYERS * NUM_EXPERTS])
@pytest.mark.parametrize("drafts", [1, 4])
def test_output_does_not_depend_on_speculation(model: Model, num_slots: int, drafts: int) -> None:
    """Verification asks for the experts of several tokens at once."""
    expected = [*PROMPT, *model.tokens]

    def right_and_wrong(place: int) -> int:
        return expected[place] if place < len(expected) and place % 3 else 7

    for choose in (None, right_and_wrong, lambda place: 7):
        with Tiers(model, num_slots, EVICTION_POLICIES["lru"], lambda d: NextGate(d, 1)) as tiers:
            stepper = model.make(tiers.decoder)
            drafter = make_drafter(stepper, accelerator(tiers.decoder))
            method = fixed(Scripted(drafter, choose) if choose else drafter, drafts)
            tokens, rounds = run(stepper, method, len(model.tokens), PROMPT)
            assert tokens == model.tokens
            assert sum(drafted for drafted, _ in rounds) > 0


class Forgetful(InPlace):
    """The system has given up every second expert, others each time."""

    def __init__(self, store: ExpertStore) -> None:
        super().__init__(store)
        self.at_once, self._random = 1, random.Random(0)

    def holds(self, key: Key) -> bool:
        return self._random.random() < 0.5 and super().holds(key)

    def trusted_until(self, key: Key) -> float:
        return 0.0


@LINUX
@pytest.mark.parametrize("num_slots", [1, 6])
@pytest.mark.parametrize("make", [InPlace, Forgetful])
def test_output_does_not_depend_on_what_is_computed_in_place(
    model: Model, num_slots: int, make: type[InPlace]
) -> None:
    for policy in ("lru", "lfu"):
        with Tiers(
            model, num_slots, EVICTION_POLICIES[policy], predictors(model)["next-gate 1"], in_place=make
        ) as tiers:
            check(model, tiers)
            stats = tiers.cache.stats
            assert stats.expert_in_place > 0
            assert (stats.expert_misses == 0) == (make is InPlace)
            assert stats.prefetch_used <= stats.prefetch_issued
            assert len(tiers.cache.residents()) <= num_slots


@LINUX
def test_a_store_that_there_is_room_for_is_read_into_the_file_cache(model: Model) -> None:
    store = prepare_store(model.folder, model.format)
    size = store.file.stat().st_size
    os.fsync(store.descriptor)
    os.posix_fadvise(store.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    lying = InPlace(store)
    try:
        lying.warm(size - 1)
        assert not [thread for thread in threading.enumerate() if thread.name == "experts-warming"]
        lying.warm(size)
        deadline = time.monotonic() + 20
        while not all(lying.holds(key) for key in store.keys):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        lying.close()
        store.close()


@LINUX
def test_what_is_often_computed_in_place_gets_a_slot(model: Model) -> None:
    with Tiers(model, NUM_LAYERS * NUM_EXPERTS, EVICTION_POLICIES["lfu"], in_place=InPlace) as tiers:
        check(model, tiers)
        before = tiers.cache.stats.expert_in_place
        check(model, tiers)  # by now all of them have one
        assert tiers.cache.stats.expert_in_place == before
        assert tiers.cache.stats.expert_misses == 0


@pytest.mark.parametrize("num_slots", [1, 6])
def test_output_does_not_depend_on_the_ridge_gate(model: Model, num_slots: int) -> None:
    """With maps that say anything, and the policy that listens to them."""
    foreseen = EVICTION_POLICIES["foreseen"]
    with Tiers(model, num_slots, foreseen, link=SLOW) as tiers:
        maps, experts = random_stream(tiers.decoder).maps, tiers.decoder.config.experts
        assert experts is not None
        gate = RidgeGate(maps, experts.num_experts_per_tok, tiers.cache.eviction)
        tiers.decoder.watch = Prefetcher(tiers.cache, gate, always=True)
        check(model, tiers)
        assert tiers.cache.stats.prefetch_issued > 0 or num_slots == 1


@pytest.mark.parametrize("num_slots", [1, 6])
def test_output_does_not_depend_on_the_accelerated_stream(model: Model, num_slots: int) -> None:
    """Alone, and with drafts whose experts the union map names."""
    with Tiers(model, num_slots, EVICTION_POLICIES["least-stale"], link=SLOW) as tiers:
        stream = random_stream(tiers.decoder)
        decoder = StreamedDecoder(tiers.decoder, stream)
        prefetcher = Prefetcher(tiers.cache, Accelerated(decoder), always=True)
        decoder.watch = prefetcher
        logits, tokens = write(model.make(decoder))
        assert tokens == model.tokens
        if model.make is FUSED or model.format == "int4":
            assert torch.equal(logits, model.logits)
        else:  # how torch sums two rows may differ from how it sums one
            torch.testing.assert_close(logits, model.logits, rtol=1e-4, atol=1e-4)
        assert tiers.cache.stats.prefetch_issued > 0 or num_slots == 1
        stepper = model.make(decoder)
        drafter = UnionDrafter(make_drafter(stepper, accelerator(decoder, depth=1)), stream, tiers.cache)
        assert run(stepper, fixed(drafter, 3), len(model.tokens), PROMPT)[0] == model.tokens


def random_stream(decoder: Decoder) -> ExpertStream:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stream = ExpertStream(ExpertStreamConfig(rank=4, draft_depth=1), decoder.config)
        for parameter in (*stream.parameters(), *stream.buffers()):
            torch.nn.init.normal_(parameter, std=0.1)
        for error in (stream.maps.ahead_error, stream.maps.again_error):
            error.fill_(0.3)
    return stream


def test_belady_loads_least(model: Model) -> None:
    loaded = {}
    for policy in (*EVICTION_POLICIES.values(), partial(Belady, model.trace)):
        with Tiers(model, 10, policy) as tiers:
            check(model, tiers)
            loaded[tiers.cache.eviction.name] = tiers.cache.stats.bytes_loaded
    assert loaded["belady"] == min(loaded.values())


def test_reads_may_bypass_the_file_cache(model: Model) -> None:
    with Tiers(model, 2, EVICTION_POLICIES["lru"], direct=True) as tiers:
        check(model, tiers)


def _of_layer(model: Model, layer: int) -> list[Key]:
    return [(layer, number) for own, numbers in model.trace if own == layer for number in numbers]
