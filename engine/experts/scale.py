"""Full-size random models within a memory budget: what they take, and how fast they are.

``python -m engine.experts.scale olmoe-1b-7b --memory 1.5GB --json FILE``. The model runs in a process of its own,
whose peak memory the system reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from engine import paths
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.progress import Progress


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    from engine.experts.planner import parse_memory
    from engine.experts.random_model import SHAPES

    parser = argparse.ArgumentParser(prog="python -m engine.experts.scale", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--prompt", type=int, default=960, help="tokens of it")
    parser.add_argument("--tokens", type=int, default=32, help="measured, behind a few for warming up")
    parser.add_argument("--direct", action="store_true", help="bypass the system's file cache")
    parser.add_argument("--folder", type=Path, default=None, help="where the experts lie")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="add the result to this file")
    options = parser.parse_args(argv)
    folder = options.folder or paths.cache_dir() / "experts"
    try:
        with get_context("spawn").Pool(1) as pool:
            result = pool.apply(
                _measure,
                (
                    options.shape,
                    parse_memory(options.memory),
                    options.prompt,
                    options.tokens,
                    options.direct,
                    folder,
                ),
            )
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1))
    if options.json is not None:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else []
        with replacing(options.json) as file:
            file.write((json.dumps([*earlier, result], indent=1) + "\n").encode())
    return 0


def _measure(
    shape: str, budget: int, num_prompt_tokens: int, num_tokens: int, direct: bool, folder: Path
) -> dict[str, Any]:
    import torch

    from engine.evaluation.worker import peak_memory_mb
    from engine.experts.cache import ExpertCache, LayerExperts
    from engine.experts.eviction import EVICTION_POLICIES
    from engine.experts.model import ExpertTiers
    from engine.experts.planner import plan_memory
    from engine.experts.prediction.next_gate import NextGate
    from engine.experts.prefetcher import Prefetcher
    from engine.experts.random_model import RandomModel, sample
    from engine.hardware import machine
    from engine.models.stepper import make_stepper
    from engine.quantization import get_format

    model = RandomModel.of(shape)
    store = model.store(folder / f"random-{shape}.experts", _show, direct=direct)
    plan = plan_memory(model.config, get_format("int4"), budget, store.layout.nbytes)
    print(f"\r\033[K{plan}", file=sys.stderr)
    cache = ExpertCache(store, plan.num_slots, EVICTION_POLICIES["lru"]())
    decoder = model.decoder(lambda layer: LayerExperts(cache, layer))
    tiers = ExpertTiers(cache, Prefetcher(cache, NextGate(decoder)), plan)
    decoder.watch = tiers.watch
    stepper, kv = make_stepper(decoder), decoder.new_cache()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (num_prompt_tokens,), generator=generator).tolist()
    began = perf_counter()
    stepper.prefill(prompt[:-1], kv)
    prefill_seconds = perf_counter() - began
    token, seconds = prompt[-1], list[float]()
    warm_up = max(4, num_tokens // 4)
    before = tiers.report().stats
    for step in range(warm_up + num_tokens):
        if step == warm_up:
            before = tiers.report().stats
        began = perf_counter()
        hidden = stepper.run_layers(stepper.embed([token]), kv, kv.length, 0, model.config.num_layers)
        kv.length += 1
        token = sample(stepper.logits(hidden)[0], generator)
        seconds.append(perf_counter() - began)
        print(f"\r\033[K{step + 1} of {warm_up + num_tokens} tokens", end="", file=sys.stderr)
    print(file=sys.stderr)
    report = tiers.report()
    stats = report.stats.since(before)
    seconds = seconds[warm_up:]
    tiers.close()
    uses = torch.tensor(report.uses).double()
    return {
        "shape": shape, "machine": machine().cpu, "threads": torch.get_num_threads(), "direct": direct,
        "budget": budget, "plan": plan.total, "plan_text": str(plan), "peak_memory": int((peak_memory_mb() or 0) * 1e6),
        "num_slots": report.num_slots, "num_experts": plan.num_experts, "expert_bytes": report.expert_bytes,
        "num_prompt_tokens": num_prompt_tokens, "num_tokens": num_tokens, "tokens_per_second": len(seconds) / sum(seconds), "seconds": seconds, "prefill_seconds": prefill_seconds,
        "hit_rate": stats.hit_rate, "prefetch_precision": stats.prefetch_precision,
        "prefetch_recall": stats.prefetch_recall, "bytes_per_token": stats.bytes_loaded / num_tokens,
        "stall_share": stats.stall_seconds / sum(seconds),
        "most_used_quarter": float(uses.sort(dim=1, descending=True).values[:, : uses.shape[1] // 4].sum() / uses.sum()),
    }  # fmt: skip


def _show(progress: Progress) -> None:
    print(f"\r\033[K{progress.message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
