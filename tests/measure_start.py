"""How long a start takes, from `python launch.py` to the first word in a real browser: a measurement, not a test.

    python -m tests.measure_start --runs 5 --json assets/results/start.json

The browser runs already. Starts are one after the other and share a data folder and what the browser caches; the
first of them, which also compiles what is not compiled yet, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine import hardware
from tests.browser import ROOT, chromium, share_caches

MEASURES = ("page_seconds", "prompt_seconds", "first_token_seconds", "peak_memory_mb")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as home, chromium() as browser:
        share_caches(Path(home))
        context = browser.new_context()
        _start(context, Path(home))
        runs = []
        for _ in range(options.runs):
            runs.append(_start(context, Path(home)))
            print({name: round(value, 2) for name, value in runs[-1].items()}, flush=True)
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in MEASURES}
    print("medians", medians)
    if options.json:
        result = {"machine": dataclasses.asdict(hardware.machine()), "medians": medians, "runs": runs}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _start(context: Any, home: Path) -> dict[str, float]:
    """One start. ``page_seconds``: until the page is served; ``prompt_seconds``: until the browser has a box
    to type in; ``first_token_seconds``: from Enter, pressed at that moment, to the answer's first text."""
    port = 7871
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "run", "--no-browser", "--port", str(port)],
        env={**os.environ, "SLIPSTREAM_HOME": str(home)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert any("Slipstream is at" in line for line in process.stdout)
        page = time.monotonic() - began
        prompt, first = _ask(context, f"http://127.0.0.1:{port}", began)
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
        return dict(zip(MEASURES, (page, prompt, first, peak), strict=True))
    finally:
        process.terminate()
        process.wait(20)


def _ask(context: Any, url: str, began: float) -> tuple[float, float]:
    page = context.new_page()
    page.goto(url, wait_until="commit")
    box = page.locator("#composer textarea")
    box.wait_for()
    prompt = time.monotonic()
    box.fill("What is the capital of France?")
    box.press("Enter")
    page.wait_for_function(
        """[...document.querySelectorAll('#conversation [data-testid="bot"]')].some(e => e.innerText.trim())""",
        polling=10,
    )
    first = time.monotonic()
    page.close()
    return prompt - began, first - prompt


if __name__ == "__main__":
    main()
