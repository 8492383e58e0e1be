"""Ways of having a model's experts in memory, side by side: ``python -m engine.experts.benchmark --model FOLDER``.

One process, one decoder: the lanes take turns prompt by prompt in balanced order, each with slots of its own, and all
have to write the same text. The slow tier is an imitated link whose bandwidth stands for real hardware relative to
the time that this machine needs for a layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine import hub
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.evaluation.statistics import balanced_order, quartiles
from engine.evaluation.suites import load_prompts, suite_path
from engine.experts.lanes import RESIDENT, Lane, RunningLane, lanes, record_trace
from engine.experts.model import prepare_store
from engine.experts.reader import Link
from engine.experts.store import ExpertStore
from engine.experts.tables import experts_table
from engine.hardware import machine
from engine.metrics import ExpertStats
from engine.models.decoder import Decoder
from engine.models.loader import load_decoder
from engine.requests import Message
from engine.residuals.adapter_file import find_adapter, load_accelerator
from engine.residuals.expert_files import find_stream
from engine.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Hardware:
    """A slow tier to stand for, and the machine that it feeds. Our assumptions; a link's *weight* is the time that it
    takes for one layer's active experts, against the time in which the layer is computed.

    Attributes:
        bandwidth: bytes per second.
        tokens_per_second: of Qwen3-30B-A3B in int4 there, were all of it in fast memory.
    """

    bandwidth: float
    tokens_per_second: float

    @property
    def weight(self) -> float:
        """Of Qwen3-30B-A3B: 48 layers, 8 of 128 experts of 3 * 768 * 2048 weights, five bits each."""
        load = 8 * 3 * 768 * 2048 * 0.625 / self.bandwidth
        return load / (1 / (48 * self.tokens_per_second))


LINKS = {
    "nvme": Hardware(3.5e9, 15.0),  # a laptop without a GPU
    "pcie3x8": Hardware(7e9, 40.0),  # a laptop's GPU
    "pcie4x16": Hardware(25e9, 60.0),
}


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.experts.benchmark", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--cache", default="10,25,50", help="per cent of the experts, comma separated")
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--lanes", default=None, help="names, comma separated with ';'; default: all")
    parser.add_argument("--suite", default="mt_bench")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        report = run(options)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(experts_table(report))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All settings, each with its lanes over all prompts; written after each setting."""
    path = hub.resolve(options.model).path
    decoder = load_decoder(path, options.format)
    store = prepare_store(path, options.format)
    tokenizer = load_tokenizer(path)
    prompts = load_prompts(suite_path(options.suite), options.limit)
    encoded = [tokenizer.encode_chat([Message("user", prompt.turns[0])]) for prompt in prompts]
    layer_seconds = seconds_per_layer(decoder, encoded[0], options.max_tokens)
    traces = [record_trace(decoder, store, ids, options.max_tokens) for ids in encoded]
    experts = decoder.config.experts
    assert experts is not None
    report: dict[str, Any] = {
        "model": options.model, "format": options.format, "suite": options.suite, "machine": asdict(machine()),
        "threads": torch.get_num_threads(), "prompts": [prompt.id for prompt in prompts],
        "max_tokens": options.max_tokens, "seconds_per_layer": layer_seconds,
        "expert_bytes": store.layout.nbytes, "num_experts": len(store.keys), "settings": [],
    }  # fmt: skip
    active = experts.num_experts_per_tok * store.layout.nbytes
    for link_name in options.links.split(","):
        bandwidth = active / (LINKS[link_name].weight * layer_seconds)
        for share in options.cache.split(","):
            chosen = lanes(int(share) / 100)
            if options.lanes:
                chosen = tuple(lane for lane in chosen if lane.name in options.lanes.split(";"))
            samples = run_setting(chosen, decoder, store, bandwidth, encoded, traces, options.max_tokens)
            report["settings"].append(
                {
                    "link": link_name, "weight": LINKS[link_name].weight, "bandwidth": bandwidth,
                    "cache_percent": int(share), "rows": rows(samples), "samples": samples,
                }
            )  # fmt: skip
            with replacing(options.json) as file:
                file.write((json.dumps(report, indent=1) + "\n").encode())
            print(experts_table({**report, "settings": report["settings"][-1:]}), flush=True)
    return report


def run_setting(
    chosen: Sequence[Lane], decoder: Decoder, store: ExpertStore, bandwidth: float,
    prompts: Sequence[Sequence[int]], traces: Sequence[tuple[Any, tuple[int, ...]]], max_tokens: int,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Samples of each lane, one per prompt, in turns."""
    stream, adapter = find_stream(decoder), find_adapter(decoder)
    accelerator = None if adapter is None else load_accelerator(adapter, decoder)
    usable = [
        lane
        for lane in chosen
        if (lane.predictor not in ("accelerated", "ridge-gate") or stream is not None)
        and (not lane.drafts or accelerator is not None)
    ]
    running = {
        lane.name: RunningLane(lane, decoder, store, Link(bandwidth), stream, accelerator) for lane in usable
    }
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    try:
        for lane in running.values():  # fill the slots
            lane.answer(prompts[-1], min(16, max_tokens), traces[-1][0])
        for turn, (ids, (trace, expected)) in enumerate(zip(prompts, traces, strict=True)):
            for name in balanced_order(list(running), turn):
                sample = running[name].answer(ids, max_tokens, trace)
                identical = sample.token_ids == expected
                samples[name].append({**sample.as_json(), "identical": identical})
    finally:
        for lane in running.values():
            lane.close()
    return samples


def seconds_per_layer(decoder: Decoder, ids: Sequence[int], num_tokens: int) -> float:
    """What a layer takes for one token when all experts are resident: the median of three answers."""
    lane = RunningLane(RESIDENT, decoder, None, None, None, None)  # type: ignore[arg-type]
    seconds = [lane.answer(ids, num_tokens, ()).seconds / num_tokens for _ in range(3)]
    return median(seconds) / decoder.config.num_layers


def rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row of figures for each lane; ratios are medians of those prompt by prompt, with their quartiles."""
    rates = {name: [s["num_tokens"] / s["seconds"] for s in lane] for name, lane in samples.items()}

    def ratio(name: str, base: str) -> list[float] | None:
        if base not in rates:
            return None
        pairs = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
        return [median(pairs), *(quartiles(pairs) or ())]

    found = []
    for name, lane in samples.items():
        totals = {key: sum(s["experts"][key] for s in lane) for key in lane[0]["experts"]}
        tokens, asked = sum(s["num_tokens"] for s in lane), ExpertStats(**totals).num_asked
        rounds = sum(s["speculation"]["num_rounds"] for s in lane)
        accepted = sum(s["speculation"]["num_accepted_tokens"] for s in lane)
        found.append(
            {
                "lane": name, "tokens_per_second": median(rates[name]), "spread": quartiles(rates[name]),
                "to_on_demand": ratio(name, "on-demand"), "to_lru": ratio(name, "lru"),
                "to_oracle": ratio(name, "oracle bound"), "to_resident": ratio(name, "resident"),
                "bytes_per_token": totals["bytes_loaded"] / tokens,
                "hit_rate": totals["expert_hits"] / asked if asked else None,
                "prefetch_precision": _share(totals["prefetch_used"], totals["prefetch_issued"]),
                "prefetch_recall": _share(
                    totals["prefetch_used"], totals["prefetch_used"] + totals["expert_misses"]
                ),
                "stall_share": totals["stall_seconds"] / sum(s["seconds"] for s in lane),
                "mean_acceptance_length": 1 + accepted / rounds,
                "identical_share": sum(s["identical"] for s in lane) / len(lane),
            }
        )  # fmt: skip
    return found


def _share(part: float, whole: float) -> float | None:
    # What was loaded ahead in the prompt may be used behind it, so a part can be a little more than the whole.
    return min(1.0, part / whole) if whole else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
