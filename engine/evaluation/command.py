"""The ``bench`` command: lanes from arguments, progress, report."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError
from engine.evaluation.report import text_table
from engine.evaluation.runner import (
    BenchSettings,
    LaneSpec,
    Samples,
    Worker,
    build_rows,
    load_samples,
    run_turns,
    save_report,
)
from engine.evaluation.suites import Prompt, load_prompts, suite_path
from engine.progress import format_seconds
from engine.requests import SamplingParams

PEERS = ("transformers", "llama.cpp")


def lane_specs(arguments: argparse.Namespace, source: str, threads: int) -> list[LaneSpec]:
    """One lane per format and method, then the peers.

    Raises:
        InvalidRequestError: an unknown peer, or no lane.
    """
    peers = _names(arguments.peers)
    for peer in peers:
        if peer not in PEERS:
            raise InvalidRequestError(f"Unknown peer {peer!r}; choose from {' and '.join(PEERS)}.")
    formats, methods = _names(arguments.formats), _names(arguments.methods)
    if not formats or not methods:
        raise InvalidRequestError("Name at least one format and one method.")
    ours = [
        LaneSpec("slipstream", source, threads, weights, method) for weights in formats for method in methods
    ]
    return [*ours, *(LaneSpec(peer, source, threads) for peer in peers)]


def pick_baseline(specs: list[LaneSpec], wanted: str | None) -> str:
    """The lane that ratios refer to: the named one, else the last peer, else the first lane."""
    names = [spec.name for spec in specs]
    if wanted is not None and wanted not in names:
        raise InvalidRequestError(
            f"There is no lane {wanted!r} for a baseline; choose from {', '.join(names)}."
        )
    peers = [spec.name for spec in specs if spec.peer != "slipstream"]
    return wanted or (peers[-1] if peers else names[0])


def bench(arguments: argparse.Namespace) -> int:
    """Run the comparison; Ctrl-C keeps the finished prompts."""
    from engine.hardware import usable_threads
    from engine.hub import DEFAULT_MODEL

    for name in ("limit", "max_tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    SamplingParams(
        arguments.temperature, top_p=arguments.top_p, repetition_penalty=arguments.repetition_penalty
    )  # says what is wrong with them
    if arguments.resume and not arguments.json:
        raise InvalidRequestError("--resume needs the report to go on with: give it by --json FILE.")
    source = arguments.model or DEFAULT_MODEL
    path = Path(arguments.prompts) if arguments.prompts else suite_path(arguments.suite)
    prompts = load_prompts(path, arguments.limit)
    suite = path.stem if arguments.prompts else arguments.suite
    threads = arguments.threads or usable_threads()
    settings = BenchSettings(
        source, suite, arguments.max_tokens, threads, arguments.temperature, arguments.ignore_eos,
        arguments.top_p, arguments.repetition_penalty,
    )  # fmt: skip
    specs = lane_specs(arguments, source, threads)
    baseline = pick_baseline(specs, arguments.baseline)
    target = Path(arguments.json) if arguments.json else None
    samples = load_samples(target, settings) if target and arguments.resume else {}
    workers: dict[str, Worker] = {}
    try:
        for spec in specs:
            workers[spec.name] = Worker(spec)
        for name, worker in workers.items():
            _tell(f"Loading {name} ...")
            _ = worker.facts
        return _run(workers, prompts, settings, samples, baseline, target)
    finally:
        for worker in workers.values():
            worker.close()


def _run(
    workers: dict[str, Worker],
    prompts: list[Prompt],
    settings: BenchSettings,
    samples: Samples,
    baseline: str,
    target: Path | None,
) -> int:
    from engine.evaluation.core_distance import CoreDistance
    from engine.hardware import copy_bandwidth, machine

    distance = CoreDistance(settings.threads)
    bandwidth = copy_bandwidth(settings.threads)
    facts = {**asdict(machine()), "threads_used": settings.threads, "read_bytes_per_second": bandwidth}
    first = next(iter(workers.values()))

    def encode(text: str) -> list[int]:
        ids: list[int] = first.ask({"encode": text})["ids"]
        return ids

    def report() -> dict[str, Any]:
        rows = build_rows(workers, samples, settings, baseline, bandwidth)
        kept = {lane: {i: asdict(s) for i, s in by_id.items()} for lane, by_id in samples.items()}
        seen = {**facts, "core_to_core_ns": distance.summary()}
        return {"machine": seen, "settings": asdict(settings), "rows": rows, "samples": kept}

    started, stopped, first_done = time.perf_counter(), False, None
    try:
        for done, total in run_turns(workers, prompts, encode, settings, samples):
            first_done = done - 1 if first_done is None else first_done
            distance.measure()
            left = (time.perf_counter() - started) / (done - first_done) * (total - done)
            _tell(f"{done} of {total} prompts, {format_seconds(left)} left")
            if target:
                save_report(target, report())
    except KeyboardInterrupt:
        stopped = True
        _tell("Stopped; the finished prompts count.")
    if any(samples.values()):
        final = report()
        if target:
            save_report(target, final)
        sys.stdout.write(
            f"{text_table(final['rows'])}\nMedians over prompts; ratios paired, to {baseline}.\n"
        )
    return 130 if stopped else 0


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _names(text: str) -> list[str]:
    """Comma-separated names, each once, in order."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
