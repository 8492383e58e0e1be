"""What runs on an NVIDIA GPU: CUDA graphs, drafts in them, experts in its memory. The graphs' bookkeeping is tested
everywhere, on graphs that run their computation anew each time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import paths
from engine.errors import OutOfMemoryError
from engine.experts.cache import LayerExperts, make_cache
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.memory_guard import MemoryGuard
from engine.experts.model import load_with_tiers, prepare_store
from engine.experts.planner import plan_memory
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prefetcher import Prefetcher
from engine.experts.slots import DeviceSlots
from engine.hardware import MemoryUse
from engine.models import cuda_graph, graph_stepper
from engine.models.cuda_graph import GraphedFeedForward
from engine.models.decoder import Decoder
from engine.models.feed_forward import MixtureOfExperts, ResidentExperts
from engine.models.graph_stepper import GraphStepper
from engine.models.loader import load_decoder
from engine.models.stepper import TorchStepper, make_stepper
from engine.quantization import get_format
from engine.residuals.drafter import GraphDrafter, make_drafter
from tests import tiny
from tests.test_m2r2 import PROMPT, accelerator, fixed, run

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
GPU = torch.device("cuda")


class Again:
    """In place of a graph: computes anew, on the inputs' copies, as a graph would."""

    def __init__(self, compute: Any, inputs: Sequence[Tensor], pool: object) -> None:
        self._compute, self._inputs = compute, [tensor.clone() for tensor in inputs]
        self._outputs: tuple[Tensor, ...] | None = None

    def __call__(self, *inputs: Tensor | int) -> tuple[Tensor, ...]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given if isinstance(given, Tensor) else torch.tensor(given))
        new = tuple(output.clone() for output in self._compute(*self._inputs))
        if self._outputs is None:
            self._outputs = new
        for own, given in zip(self._outputs, new, strict=True):
            own.copy_(given)
        return self._outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(
        tmp_path_factory.mktemp("model"), num_hidden_layers=4, max_position_embeddings=1024
    )


@pytest.fixture(params=["anew", pytest.param("graphs", marks=needs_gpu)])
def decoder(request: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    if request.param == "graphs":
        return load_decoder(folder, "fp64", GPU)
    for module in (graph_stepper, cuda_graph):
        monkeypatch.setattr(module, "Graph", Again)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return load_decoder(folder, "fp64")


def test_graphs_write_what_the_reference_writes(decoder: Decoder) -> None:
    """Over two growths of the cache, and again in a second conversation."""
    stepper = GraphStepper(decoder)
    expected, _ = run(TorchStepper(decoder), None, 600)
    for _ in range(2):
        assert run(stepper, None, 600)[0] == expected


@pytest.mark.parametrize("drafts", [1, 4, 7])
def test_drafts_in_graphs_change_nothing(decoder: Decoder, drafts: int) -> None:
    stepper = GraphStepper(decoder)
    drafter = make_drafter(stepper, accelerator(decoder))
    assert isinstance(drafter, GraphDrafter)
    expected, _ = run(stepper, None, 300)
    ids, rounds = run(stepper, fixed(drafter, drafts), 300)
    assert ids == expected
    plain = make_drafter(TorchStepper(decoder), accelerator(decoder))
    assert run(TorchStepper(decoder), fixed(plain, drafts), 300)[1] == rounds


def test_drafts_up_to_the_end_of_the_context(decoder: Decoder) -> None:
    """No row lies behind it, however many a graph would take."""
    stepper = GraphStepper(decoder)
    drafter = make_drafter(stepper, accelerator(decoder))
    prompt = [token % 100 + 3 for token in range(decoder.config.context_length - 20)]
    expected, _ = run(TorchStepper(decoder), None, 19, prompt)
    assert run(stepper, fixed(drafter, 4), 19, prompt)[0] == expected


@pytest.mark.parametrize("depth", [0, 2])
def test_alternatives_in_graphs(decoder: Decoder, depth: int) -> None:
    """They give what the reference gives, and one that is accepted leaves a cache as if it had always been there."""
    after = []
    for stepper in (TorchStepper(decoder), GraphStepper(decoder)):
        cache = decoder.new_cache(64)
        stepper.prefill(PROMPT[:-1], cache)
        start, tokens = cache.length, [PROMPT[-1], 5, 9, 7, 11]  # the last two instead of the two before
        begun = [stepper.run_layers(stepper.embed(tokens[:1]), cache, start, 0, depth)] if depth else []
        hidden, logits = stepper.forward(tokens[len(begun) :], cache, begun, depth, [1, 2])
        rows = hidden.cpu(), logits.cpu().clone()
        stepper.copy_slot(cache, start + 3, start + 1)
        cache.length = start + 2
        after.append((*rows, stepper.forward([61], cache)[1].cpu().clone()))
    for graphed, reference in zip(after[1], after[0], strict=True):
        torch.testing.assert_close(graphed, reference)
    fresh, stepper = decoder.new_cache(64), TorchStepper(decoder)
    stepper.prefill([*PROMPT, 7], fresh)
    torch.testing.assert_close(after[1][2], stepper.forward([61], fresh)[1].cpu())


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_graphs_up_to_the_routers_choice(
    family: str, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense layer between those with experts, blocks as graphs of their own, and every layer is watched."""
    changes: dict[str, Any] = {"mlp_only_layers": [1]} if family == "qwen2_moe" else {}
    folder = tiny.save_model(tmp_path, family, num_hidden_layers=4, **changes)
    sparse = load_decoder(folder, "fp64", decoder.device)
    expected, _ = run(TorchStepper(sparse), None, 60)
    sparse = sparse.with_experts(lambda layer: _Graphed(sparse, layer))
    seen: list[int] = []
    sparse.watch = lambda layer, hidden: seen.append(layer)
    assert run(GraphStepper(sparse), None, 60)[0] == expected
    assert seen[-4:] == [0, 1, 2, 3]
    drafter = make_drafter(GraphStepper(sparse), accelerator(sparse))
    assert run(drafter.stepper, fixed(drafter, 3), 60)[0] == expected


class _Graphed(ResidentExperts):
    """A layer's experts as graphs."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        source = decoder.layers[layer].ffn
        assert isinstance(source, MixtureOfExperts)
        pool = torch.cuda.graph_pool_handle()
        super().__init__([GraphedFeedForward(e.gate_up, e.down, pool) for e in source.experts.resident()])


def test_two_conversations_at_once_do_not_mix(decoder: Decoder) -> None:
    stepper, reference = GraphStepper(decoder), TorchStepper(decoder)
    prompts = ([5, 70, 9], [120, 7, 7, 61, 33])
    expected = [run(reference, None, 20, prompt)[0] for prompt in prompts]
    caches = [decoder.new_cache(64) for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    for text, cache in zip(texts, caches, strict=True):
        stepper.prefill(text[:-1], cache)
    for _ in range(20):
        for text, cache in zip(texts, caches, strict=True):
            hidden = stepper.run_layers(stepper.embed(text[-1:]), cache, cache.length, 0, 4)
            cache.length += 1
            text.append(int(stepper.logits(hidden)[0].argmax()))
    assert [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)] == [
        ids[-20:] for ids in expected
    ]


def test_a_conversation_that_has_ended_leaves_its_memory_to_the_next(decoder: Decoder) -> None:
    stepper = GraphStepper(decoder)
    places = set()
    for _ in range(3):
        cache = decoder.new_cache(64)
        stepper.prefill(PROMPT, cache)
        places.add(cache.keys[0].data_ptr())
        del cache
        gc.collect()
    assert len(places) == 1


@needs_gpu
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4", "nf4"])
def test_every_format_drafts_on_the_gpu(weight_format: str, tmp_path: Path) -> None:
    """Rows of different numbers may round differently there: that the text is the same is measured, not promised."""
    decoder = load_decoder(
        tiny.save_model(tmp_path, hidden_size=128, num_hidden_layers=4), weight_format, GPU
    )
    stepper = make_stepper(decoder)
    assert isinstance(stepper, GraphStepper)
    ids, rounds = run(stepper, fixed(make_drafter(stepper, accelerator(decoder)), 3), 40)
    assert len(ids) == 40 and sum(drafted for drafted, _ in rounds) > 0
    expected, _ = run(TorchStepper(decoder), None, 40)
    assert ids[:4] == expected[:4]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(paths.HOME_VARIABLE, str(tmp_path))
    return tmp_path


@needs_gpu
@pytest.mark.parametrize("weight_format", ["fp64", "int4"])
@pytest.mark.parametrize("host_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_slots", [1, 7, 24])
def test_experts_on_the_gpu(home: Path, num_slots: int, host_share: float, weight_format: str) -> None:
    """With slots and pinned RAM of any size the output is the resident model's."""
    folder = tiny.save_model(home / "moe", "qwen2_moe", num_hidden_layers=3, hidden_size=128)
    resident = load_decoder(folder, weight_format, GPU)
    expected, _ = run(make_stepper(resident), None, 30)
    store = prepare_store(folder, weight_format, device=GPU)
    slots = DeviceSlots(store.layout, GPU, int(host_share * len(store.keys) * store.layout.nbytes))
    cache = make_cache(store, num_slots, EVICTION_POLICIES["lru"], slots=slots)
    try:
        decoder = resident.with_experts(lambda layer: LayerExperts(cache, layer))
        decoder.watch = Prefetcher(cache, NextGate(decoder), always=True)
        for _ in range(2):  # with cold and with warm RAM
            assert run(make_stepper(decoder), None, 30)[0] == expected
        assert cache.stats.bytes_loaded > 0 and cache.device.type == "cuda"
    finally:
        cache.close()


@needs_gpu
def test_a_model_on_the_gpu_stays_within_its_plan(home: Path) -> None:
    folder = tiny.save_model(home / "moe", "mixtral", num_hidden_layers=3)
    config, fmt = load_decoder(folder, "bf16").config, get_format("bf16")
    whole = plan_memory(config, fmt, 1 << 40, device="cuda")
    plan = plan_memory(config, fmt, whole.total - 20 * whole.expert, device="cuda")
    assert plan.num_slots == 4 and plan.host > 0 and "RAM" in str(plan)
    decoder, tiers = load_with_tiers(folder, "bf16", plan, device="cuda")
    try:
        expected, _ = run(make_stepper(load_decoder(folder, "bf16", GPU)), None, 20)
        assert run(make_stepper(decoder), None, 20)[0] == expected
        assert tiers.cache.num_slots == 4
        MemoryGuard(tiers.cache, plan, "cuda", lambda: MemoryUse(99, 100)).look()
        assert tiers.cache.num_slots < 4
        assert run(make_stepper(decoder), None, 20)[0] == expected
    finally:
        tiers.close()


@needs_gpu
def test_too_many_slots_for_the_gpu(home: Path) -> None:
    folder = tiny.save_model(home / "moe", "mixtral", num_hidden_layers=3)
    store = prepare_store(folder, "bf16", device=GPU)
    with pytest.raises(OutOfMemoryError, match="memory for the model's experts"):
        make_cache(store, 1 << 24, EVICTION_POLICIES["lru"], slots=DeviceSlots(store.layout, GPU))
    store.close()
