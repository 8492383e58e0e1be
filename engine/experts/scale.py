"""Full-size random models within a memory budget: what they take, and how fast they are.

``python -m engine.experts.scale olmoe-1b-7b --memory 1.5GB --json FILE``. The model runs in a process of its own,
whose peak memory is measured. With several ``--lanes`` it runs in each of these ways in turns, on the same text: the
peak is then that of all together.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from engine import paths
from engine.atomic import replacing
from engine.decoding.sampling import Sampler
from engine.errors import SlipstreamError
from engine.evaluation.peers import peak_memory_mb
from engine.experts.cache import LayerExperts, make_cache
from engine.experts.eviction import EVICTION_POLICIES
from engine.experts.in_place import find_in_place
from engine.experts.model import ExpertTiers
from engine.experts.planner import MemoryPlan, plan_memory, spare_memory
from engine.experts.prediction.next_gate import NextGate
from engine.experts.prefetcher import Prefetcher
from engine.experts.random_model import RandomModel
from engine.experts.slots import SlotMaker, slot_maker
from engine.experts.store import ExpertStore
from engine.hardware import gpu_memory, machine, return_free_memory
from engine.metrics import ExpertStats
from engine.models.decoder import Decoder
from engine.models.feed_forward import ResidentExperts
from engine.models.stepper import make_stepper
from engine.progress import Progress
from engine.quantization import get_format
from engine.requests import SamplingParams
from engine.threads import use_threads

LANES = ("app", "next-gate", "lfu", "lru", "on-demand", "resident")


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    from engine.experts.planner import parse_memory
    from engine.experts.random_model import SHAPES

    parser = argparse.ArgumentParser(prog="python -m engine.experts.scale", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--memory", default="1.5GB", help="of the device")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: what does not fit there waits in RAM")
    parser.add_argument(
        "--layers", type=int, default=None, help="fewer than the shape has, for a smaller store"
    )
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=["app"])
    parser.add_argument("--prepare", action="store_true", help="write the experts, and measure nothing")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each lane")
    parser.add_argument("--prompt", type=int, default=960, help="tokens of it")
    parser.add_argument("--tokens", type=int, default=32, help="measured, behind a few for warming up")
    parser.add_argument("--direct", action="store_true", help="bypass the system's file cache")
    parser.add_argument("--folder", type=Path, default=None, help="where the experts lie")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="add the results to this file"
    )
    options = parser.parse_args(argv)
    options.folder = options.folder or paths.cache_dir() / "experts"
    try:
        options.memory = parse_memory(options.memory)
        with get_context("spawn").Pool(1) as pool:
            results = pool.apply(_measure, (options,))
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(results, indent=1))
    if options.json is not None:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else []
        with replacing(options.json) as file:
            file.write((json.dumps([*earlier, *results], indent=1) + "\n").encode())
    return 0


class _Lane:
    """One way of having the model's experts, with a text of its own. ``app`` is what the app does with a model that no
    maps were fitted for."""

    def __init__(
        self, name: str, model: RandomModel, dense: Decoder, store: ExpertStore, plan: MemoryPlan, slots: SlotMaker,
        alone: bool,
    ) -> None:  # fmt: skip
        num_slots = {"on-demand": plan.least_slots, "resident": plan.num_experts}.get(name, plan.num_slots)
        policy = "lru" if name == "lru" else "lfu"
        lying = find_in_place(store, slots) if name == "app" else None
        if lying is not None:
            lying.warm(spare_memory(plan))
            lying.wait_for_warmth()  # a person takes longer to type something
        cache = make_cache(store, num_slots, EVICTION_POLICIES[policy], slots=slots, in_place=lying)
        decoder = dense.with_experts(lambda layer: LayerExperts(cache, layer))
        prefetcher = Prefetcher(cache, NextGate(decoder)) if name in ("app", "next-gate") else None
        self.name, self.tiers = name, ExpertTiers(cache, prefetcher, plan if alone else None)
        decoder.watch = self.tiers
        self._stepper, self._kv = make_stepper(decoder), decoder.new_cache()
        # as a generation does: a second thread of torch's would wait for a core of the kernels'
        self._threads = 1 if self._stepper.name == "fused" else None
        # the most likely tokens of a random model soon repeat themselves
        self._sampler = Sampler(SamplingParams(temperature=1.0, seed=1))
        self.ids: list[int] = []
        self.seconds: list[float] = []
        self.stats = ExpertStats()

    def read(self, prompt: list[int]) -> float:
        """The prompt but for its last token; returns the seconds."""
        began = perf_counter()
        with use_threads(self._threads):
            self._stepper.prefill(prompt[:-1], self._kv)
        self.ids.append(prompt[-1])
        return perf_counter() - began

    def write(self, num_tokens: int, counted: bool) -> None:
        """That many tokens more."""
        before = replace(self.tiers.cache.stats)
        for _ in range(num_tokens):
            began = perf_counter()
            with use_threads(self._threads):
                _, logits = self._stepper.forward(self.ids[-1:], self._kv)
                self._kv.length += 1
                self.ids.append(self._sampler.choose(logits[0], self.ids))
            if counted:
                self.seconds.append(perf_counter() - began)
        if counted:
            self.stats = self.stats.plus(self.tiers.cache.stats.since(before))


@torch.inference_mode()
def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    changes = {} if options.layers is None else {"num_hidden_layers": options.layers}
    model = RandomModel.of(options.shape, device=options.device, **changes)
    suffix = "".join(f"-{part}" for part in (options.layers, options.device) if part not in (None, "cpu"))
    file = options.folder / f"random-{options.shape}{suffix}.experts"
    store = model.store(file, _show, direct=options.direct)
    if options.prepare:
        store.close()
        return []
    expert = store.layout.nbytes
    plan = plan_memory(model.config, get_format("int4"), options.memory, expert, options.device)
    print(f"\r\033[K{plan}", file=sys.stderr)
    slots = slot_maker(
        store, model.device, plan.host
    )  # all lanes' slots take their experts from the same RAM
    dense = model.decoder(lambda layer: ResidentExperts(()))
    return_free_memory()  # what making it up has left behind
    alone = len(options.lanes) == 1  # several together outgrow the memory that each is planned for
    lanes = [_Lane(name, model, dense, store, plan, slots, alone) for name in options.lanes]
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (options.prompt,), generator=generator).tolist()
    prefill_seconds = {lane.name: lane.read(prompt) for lane in lanes}
    for lane in lanes:
        lane.write(max(4, options.tokens // 4), counted=False)
    for number in range(options.rounds):
        for lane in lanes if number % 2 == 0 else reversed(lanes):
            lane.write(options.tokens // options.rounds, counted=True)
        print(f"\r\033[K{number + 1} of {options.rounds} rounds", end="", file=sys.stderr)
    print(file=sys.stderr)
    peak = _peak_memory(options.device, plan)
    results = [
        {
            "lane": lane.name, "shape": options.shape, "num_layers": model.config.num_layers,
            "machine": _machine_name(options.device), "device": options.device, "threads": torch.get_num_threads(),
            "direct": options.direct, "budget": options.memory, "plan": plan.total, "plan_text": str(plan),
            "peak_memory": peak, "lanes_in_peak": len(lanes), "expert_bytes": expert,
            "num_prompt_tokens": options.prompt, "prefill_seconds": prefill_seconds[lane.name],
            **_row(lane, plan), "same_text": lane.ids == lanes[0].ids,
        }
        for lane in lanes
    ]  # fmt: skip
    for lane in lanes:
        lane.tiers.cache.stop()
    store.close()
    return results


def _row(lane: _Lane, plan: MemoryPlan) -> dict[str, Any]:
    report, stats, seconds = lane.tiers.report(), lane.stats, lane.seconds
    uses = torch.tensor(report.uses).double()
    quarter = uses.sort(dim=1, descending=True).values[:, : uses.shape[1] // 4].sum() / uses.sum()
    return {
        "num_slots": report.num_slots, "num_experts": plan.num_experts, "num_tokens": len(seconds),
        "tokens_per_second": len(seconds) / sum(seconds), "seconds": seconds, "hit_rate": stats.hit_rate,
        "prefetch_precision": stats.prefetch_precision, "prefetch_recall": stats.prefetch_recall,
        "bytes_per_token": stats.bytes_loaded / len(seconds), "stall_share": stats.stall_seconds / sum(seconds),
        "most_used_quarter": float(quarter),
    }  # fmt: skip


def _peak_memory(device: str, plan: MemoryPlan) -> int:
    """Bytes: of the process, or of the GPU what torch took at most and CUDA's own, as planned."""
    if device == "cpu":
        return int((peak_memory_mb() or 0) * 1e6)
    return torch.cuda.max_memory_reserved(device) + _cuda_own(device)


def _cuda_own(device: str) -> int:
    """What is in use on the GPU and is not torch's: CUDA itself, as nothing else runs there."""
    return gpu_memory(device).used - torch.cuda.memory_reserved(device)


def _machine_name(device: str) -> str:
    return machine().cpu if device == "cpu" else torch.cuda.get_device_name(device)


def _show(progress: Progress) -> None:
    print(f"\r\033[K{progress.message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
