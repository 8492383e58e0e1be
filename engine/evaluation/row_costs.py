"""What a pass of so many rows costs, and a draft: the figures that speculation lives on.

``python -m engine.evaluation.row_costs --json FILE``. Rows of one call share the reading of the weights; how much a
further one adds decides how many drafts pay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from engine import hub
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.hardware import machine, usable_threads
from engine.models.loader import load_decoder
from engine.models.stepper import make_stepper
from engine.residuals.adapter_file import find_adapter, load_accelerator
from engine.residuals.drafter import make_drafter
from engine.threads import set_threads, use_threads

_ROWS = 5  # at most


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.evaluation.row_costs", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--formats", default="int4,int8,bf16")
    parser.add_argument("--passes", type=int, default=60, help="of each kind")
    parser.add_argument("--context", type=int, default=200, help="tokens before the rows")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(argv)
    set_threads(options.threads or usable_threads())
    rows = []
    try:
        for name in options.formats.split(","):
            rows.append(_measure(options.model, name, options.context, options.passes))
            print(json.dumps(rows[-1]), flush=True)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        with replacing(options.json) as file:
            file.write((json.dumps({"machine": asdict(machine()), "rows": rows}, indent=1) + "\n").encode())
    return 0


def _measure(model: str, weight_format: str, context: int, passes: int) -> dict[str, Any]:
    """Milliseconds: median and quartiles."""
    decoder = load_decoder(hub.resolve(model).path, weight_format)
    stepper = make_stepper(decoder)
    found: dict[str, Any] = {"format": weight_format, "kernel": stepper.name, "context": context}
    with use_threads(1):  # as a generation does beside the kernels
        cache = decoder.new_cache(context + _ROWS)
        ids = [number % decoder.config.vocab_size for number in range(context + _ROWS)]
        stepper.prefill(ids[:context], cache)
        for count in range(1, _ROWS + 1):
            found[f"{count} rows"] = _clock(partial(stepper.forward, ids[context:][:count], cache), passes)
        path = find_adapter(decoder)
        if path is not None:
            drafter = make_drafter(stepper, load_accelerator(path, decoder))
            state = stepper.embed(ids[:1])[0]
            draft, verify = (
                partial(drafter.draft, ids[-1], state, cache, context),
                partial(stepper.forward, ids[context:][:2], cache),
            )
            found["draft"] = _clock(draft, passes)
            # As in a running answer, where each finds in the caches what the other has left of it there.
            found["draft behind a pass"] = _clock(draft, passes, before=verify)
            found["2 rows behind a draft"] = _clock(verify, passes, before=draft)
    return found


def _clock(
    run: Callable[[], object], passes: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Median and quartiles of one call, in milliseconds, each behind one of ``before``."""
    for _ in range(5):
        run()
    times = []
    for _ in range(passes):
        before()
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    low, _, high = quantiles(times, n=4)
    return [round(value, 3) for value in (median(times), low, high)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
