"""Side-by-side runs: every lane in a process of its own, taking turns prompt by prompt.

Each runtime keeps its own thread pool and memory, so lanes do not disturb each other and peak memory is
each lane's own; the balanced order and paired ratios cancel what the machine does meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError, SlipstreamError
from engine.evaluation.statistics import Sample, Summary, balanced_order, summarise
from engine.evaluation.suites import Prompt

PAUSE = 0.05  # seconds between turns: GNU OpenMP's threads spin some milliseconds after their last work
WARM_UP_TOKENS = 16
ROOT = Path(__file__).resolve().parents[2]
_ADDED = {"top_p": 1.0, "repetition_penalty": 1.0}  # settings that older reports do not name


@dataclass(frozen=True)
class LaneSpec:
    """What one lane runs; peers have no method and choose their format themselves."""

    peer: str
    source: str
    threads: int
    format: str = "auto"
    method: str = "plain"
    context_length: int = 2048

    @property
    def name(self) -> str:
        return f"{self.method}/{self.format}" if self.peer == "slipstream" else self.peer


@dataclass(frozen=True)
class BenchSettings:
    """Everything that two runs must share for their samples to be mixed."""

    source: str
    suite: str
    max_tokens: int
    threads: int
    temperature: float
    ignore_eos: bool = False  # every answer has max_tokens, wherever the model would have ended it
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Worker:
    """A lane's process."""

    def __init__(self, spec: LaneSpec) -> None:
        self.spec = spec
        self.peak_memory_mb: float | None = None
        threads = str(spec.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads), "TOKENIZERS_PARALLELISM": "false"}
        # Alike for all lanes: libraries' own waiting, which ends within PAUSE.
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.evaluation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if os.environ.get("SLIPSTREAM_QUIET") else None,
            cwd=ROOT,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self._send(asdict(spec))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What has been loaded; waits until it is."""
        lane: dict[str, Any] = self._reply()["lane"]
        return lane

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for the reply.

        Raises:
            SlipstreamError: the lane failed or its process died.
        """
        self._send(message)
        return self._reply()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the reply tells
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SlipstreamError(f"The lane {self.spec.name} ended unexpectedly (exit code {code}).")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SlipstreamError(f"{self.spec.name}: {reply['error']}")
        self.peak_memory_mb = reply.get("peak_memory_mb", self.peak_memory_mb)
        return reply

    def answer(self, ids: Sequence[int], settings: BenchSettings, seed: int) -> Sample:
        """One prompt, up to ``max_tokens`` new tokens."""
        names = ("temperature", "top_p", "repetition_penalty")
        sampling = {"seed": seed, **{name: getattr(settings, name) for name in names}}
        message = {
            "ids": list(ids), "max_tokens": settings.max_tokens, "ignore_eos": settings.ignore_eos, "sampling": sampling,
        }  # fmt: skip
        fields = self.ask(message)["sample"]
        return Sample(**{**fields, "token_ids": tuple(fields["token_ids"])})

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


Samples = dict[str, dict[str, Sample]]  # lane name -> prompt id -> sample


def run_turns(
    workers: dict[str, Any],
    prompts: Sequence[Prompt],
    encode: Callable[[str], list[int]],
    settings: BenchSettings,
    samples: Samples,
    pause: float = PAUSE,
) -> Iterator[tuple[int, int]]:
    """Answer each prompt in every lane, lane after lane; yields (prompts done, in all) after each.

    ``samples`` is filled in place, whole prompts at a time: a stopped run leaves pairs only, and prompts
    that all lanes have already answered are skipped.

    Raises:
        InvalidRequestError: no prompt leaves room for the answer.
    """
    names = list(workers)
    todo = [p for p in prompts if not all(p.id in samples.get(name, {}) for name in names)]
    warm = encode("Hello.")
    for worker in workers.values() if todo else ():
        worker.answer(warm, replace(settings, max_tokens=min(WARM_UP_TOKENS, settings.max_tokens)), 0)
    for turn, prompt in enumerate(todo):
        ids = encode(prompt.turns[0])
        answered: dict[str, Sample] = {}
        for name in balanced_order(names, turn):
            time.sleep(pause)
            answered[name] = workers[name].answer(ids, settings, turn)
        for name, sample in answered.items():
            samples.setdefault(name, {})[prompt.id] = sample
        yield len(prompts) - len(todo) + turn + 1, len(prompts)


def build_rows(
    workers: dict[str, Worker],
    samples: Samples,
    settings: BenchSettings,
    baseline: str,
    bandwidth: float | None,
) -> list[dict[str, Any]]:
    """Rows of the JSON report. ``bandwidth`` is the measured read bandwidth in bytes/s."""
    model = next((w.facts["model"] for w in workers.values() if "model" in w.facts), settings.source)
    rows = []
    for name, worker in workers.items():
        spec, facts = worker.spec, worker.facts
        ours = spec.peer == "slipstream"
        # Identical to our plain decoding in the same format; peers against our first plain lane.
        plain = [n for n, w in workers.items() if w.spec.peer == "slipstream" and w.spec.method == "plain"]
        same = [n for n in plain if workers[n].spec.format == spec.format] if ours else plain[:1]
        reference = samples.get(same[0]) if same and settings.temperature == 0 else None
        summary: Summary = summarise(samples.get(name, {}), samples.get(baseline), reference)
        weight_bytes = facts.get("weight_bytes")
        plain_rate = summary.tokens_per_second if spec.method == "plain" else None
        if facts.get("device", "cpu") != "cpu":
            plain_rate = None  # the bandwidth is that of the machine's RAM
        share = weight_bytes * plain_rate / bandwidth if weight_bytes and plain_rate and bandwidth else None
        rows.append(
            {
                "model": model,
                "method": spec.method if ours else None,
                "format": facts.get("format", spec.format),
                "peer": None if ours else spec.peer,
                "suite": settings.suite,
                "baseline": baseline,
                **asdict(summary),
                "peak_memory_mb": worker.peak_memory_mb,
                "lane": name,
                "kernel": facts.get("kernel"),
                "device": facts.get("device"),
                "version": facts.get("version"),
                "system": facts.get("system"),
                "weight_bytes": weight_bytes,
                "bandwidth_share": share,
            }
        )
    return rows


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Write atomically: a killed run leaves the report of the prompt before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_samples(path: Path, settings: BenchSettings) -> Samples:
    """Samples of an earlier run of the same settings; none if there is no file.

    Raises:
        InvalidRequestError: the file is broken or belongs to other settings.
    """
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        stored, earlier = report["samples"], {**_ADDED, **report["settings"]}
    except (ValueError, KeyError, TypeError):
        raise InvalidRequestError(f"{path} is not a report of this command; choose another file.") from None
    if earlier != asdict(settings):
        raise InvalidRequestError(f"{path} has other settings; choose another file or drop --resume.")
    return {
        lane: {i: Sample(**{**s, "token_ids": tuple(s["token_ids"])}) for i, s in by_id.items()}
        for lane, by_id in stored.items()
    }
