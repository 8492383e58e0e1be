"""What it brings that a team does without a thread whose core others want (:mod:`engine.kernels.crowding`).

``python -m engine.evaluation.busy_cores --json FILE``. While so many other processes compute all the time, plain steps run
in turns with as many threads as are worth it, with all, and with a single one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from engine import hub
from engine.atomic import replacing
from engine.errors import SlipstreamError, UnsupportedModelError
from engine.hardware import machine, usable_threads
from engine.kernels.crowding import Crowding
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.threads import set_threads, use_threads

_CONTEXT = 200  # tokens before the step's own


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.evaluation.busy_cores", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--busy", default="0,1,2", help="how many other processes compute meanwhile")
    parser.add_argument("--turns", type=int, default=12, help="of each way")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(argv)
    threads = usable_threads()
    set_threads(threads)
    try:
        steps = _Steps(options.model, options.format, threads)
        rows = [steps.compare(int(busy), options.turns, options.seconds) for busy in options.busy.split(",")]
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        report = {"machine": asdict(machine()), "format": options.format, "threads": threads, "rows": rows}
        with replacing(options.json) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
    return 0


class _Steps:
    """Plain steps of one model."""

    def __init__(self, model: str, weight_format: str, threads: int) -> None:
        decoder = load_decoder(hub.resolve(model).path, weight_format)
        stepper: Any = make_stepper(decoder)
        if stepper.name != "fused":
            raise UnsupportedModelError("Only the fused kernels have a team; choose another format.")
        self._stepper, self._cache = stepper, decoder.new_cache(_CONTEXT + 1)
        with use_threads(1):
            stepper.prefill([number % decoder.config.vocab_size for number in range(_CONTEXT)], self._cache)
        self._ways = {
            "as many as are worth it": Crowding(threads),
            "all threads": None,
            "one thread": Crowding(1),
        }

    def compare(self, busy: int, turns: int, seconds: float) -> dict[str, Any]:
        """Steps per second of each way: medians, and of the ratios to ``all threads``, turn by turn."""
        rates: dict[str, list[float]] = {name: [] for name in self._ways}
        with _others(busy):
            for turn in range(turns):
                order = list(self._ways)
                for name in order if turn % 2 else reversed(order):
                    rates[name].append(self._rate(name, seconds))
        row: dict[str, Any] = {"busy processes": busy}
        for name, found in rates.items():
            ratios = [one / all_of_them for one, all_of_them in zip(found, rates["all threads"], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            row[name] = {
                "steps_per_second": round(median(found), 1),
                "ratio": [round(value, 3) for value in (low, middle, high)],
            }
        print(json.dumps(row), flush=True)
        return row

    def _rate(self, name: str, seconds: float) -> float:
        self._stepper.team.crowding = self._ways[name]
        count, began = 0, time.perf_counter()
        with use_threads(1):
            while time.perf_counter() - began < seconds:
                self._stepper.forward([5], self._cache)
                count += 1
        return count / (time.perf_counter() - began)


@contextmanager
def _others(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
