"""The ``tune`` command: arguments to a request, progress on the console, Ctrl-C that keeps what is done."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError, SlipstreamError
from engine.paths import cache_dir

if TYPE_CHECKING:
    from engine.progress import Progress
    from engine.residuals.tuning import TuneRequest

INTERRUPTED = 130


def add_arguments(tune: argparse.ArgumentParser) -> None:
    """The options of ``tune``. Whatever was stopped goes on when the same command is given again."""
    tune.add_argument("--model", default=None, help="hub repository, folder or .gguf file")
    tune.add_argument("--prompts", default=None, metavar="FILE.jsonl", help="instead of the shipped prompts")
    tune.add_argument("--depth", type=int, default=3, help="layers that a draft runs through")
    tune.add_argument("--rank", type=int, default=64, help="of the adapters")
    tune.add_argument("--no-condition", action="store_true", help="drafts do not see the last final state")
    tune.add_argument("--draft-vocab", type=int, default=8192, help="how many tokens it learns to draft")
    tune.add_argument(
        "--from", dest="start", default=None, metavar="FILE.safetensors",
        help="train this accelerator on, instead of a new one; its shape counts",
    )  # fmt: skip
    tune.add_argument(
        "--invent",
        type=int,
        default=0,
        metavar="N",
        help="prompts that the model makes up, beside the others",
    )
    tune.add_argument("--tokens", type=int, default=300_000, help="that the model writes to train on")
    tune.add_argument("--max-tokens", type=int, default=256, help="of one answer")
    tune.add_argument("--max-prompt", type=int, default=256, help="longer prompts are left out")
    tune.add_argument("--held-out", type=int, default=64, help="prompts to measure with")
    tune.add_argument("--steps", type=int, default=1000, help="of the optimiser")
    tune.add_argument("--batch-tokens", type=int, default=None, help="tokens per step, padding included")
    tune.add_argument("--learning-rate", type=float, default=None)
    tune.add_argument(
        "--passes", type=int, default=3, help="drafts behind one another that it is trained for"
    )
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--disk-budget", default="2G", metavar="SIZE", help="for kept states: 500M, 2G; 0: none"
    )
    tune.add_argument("--device", default="auto")
    tune.add_argument("--threads", type=int, default=None)
    tune.add_argument("--out", default=None, metavar="FILE.safetensors", help="where the adapter goes")
    tune.add_argument(
        "--experts",
        action="store_true",
        help="of a mixture of experts: what names its experts ahead of time instead",
    )
    tune.add_argument(
        "--memory", default=None, metavar="6GB",
        help="with --experts: of what the process may take; a model that is larger unquantized is read from disk",
    )  # fmt: skip
    tune.add_argument(
        "--maps", action="store_true",
        help="with --experts: only the maps that name them, which a chat uses, and no accelerated stream",
    )  # fmt: skip
    tune.add_argument("--interval", type=int, default=3, help="with --experts: layers between two restarts")
    tune.add_argument(
        "--ablation", default=None, metavar="FILE.json", help="train many settings on the same budget instead"
    )
    tune.add_argument(
        "--background", action="store_true",
        help="for programs: reports as lines of JSON, low priority, stopped by the end of standard input",
    )  # fmt: skip


def tune_command(arguments: argparse.Namespace) -> int:
    """Tune, or go on tuning."""
    if arguments.background:
        return _in_background(arguments)
    from engine.residuals.tuning import tune
    from engine.residuals.tuning_store import TuningStoppedError

    request, work_dir, cancel = _request(arguments), cache_dir() / "tuning", threading.Event()
    console = _Console()
    previous = signal.signal(signal.SIGINT, lambda *_: _interrupt(cancel))
    try:
        if arguments.ablation:
            from engine.residuals.ablation import ablate, table
            from engine.residuals.stages import Runner

            target, runner = Path(arguments.ablation), Runner(console.show, cancel)
            console.say(table(ablate(request, work_dir, target, runner, console.row)))
        elif arguments.experts:
            from engine.residuals.expert_files import read_measured

            path = _tune_experts(arguments, request, work_dir, console.show, cancel)
            console.say(f"{read_measured(path)}\n{path}")
        else:
            path = tune(request, work_dir, console.show, cancel)
            console.say(_summary(path))
    except TuningStoppedError as stopped:
        console.say(str(stopped))
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, previous)
        console.end()
    return 0


def _in_background(arguments: argparse.Namespace) -> int:
    """The same for another program, which shows the reports to people."""
    from engine.residuals.background import JsonLines, step_back, stop_with_input
    from engine.residuals.expert_files import read_recall
    from engine.residuals.tuning import tune
    from engine.residuals.tuning_store import TuningStoppedError

    lines, work_dir, cancel = JsonLines(), cache_dir() / "tuning", threading.Event()
    step_back()
    stop_with_input(cancel)
    try:
        request = _request(arguments)
        if arguments.experts:
            recall = read_recall(_tune_experts(arguments, request, work_dir, lines.show, cancel))
            lines.finish(f"{recall:.0%} of the experts that the next layer wants are named ahead of time.")
        else:
            lines.finish(
                f"{_agreements(tune(request, work_dir, lines.show, cancel))[0]:.0%} of first drafts are right."
            )
    except TuningStoppedError:
        return INTERRUPTED
    except SlipstreamError as error:
        lines.fail(str(error))
        return 1
    return 0


def _tune_experts(
    arguments: argparse.Namespace,
    request: TuneRequest,
    work_dir: Path,
    on_progress: Callable[[Progress], None],
    cancel: threading.Event,
) -> Path:
    from engine.residuals.expert_stream import ExpertStreamConfig
    from engine.residuals.expert_tuning import tune_stream

    config = ExpertStreamConfig(arguments.interval, arguments.rank, arguments.depth)
    return tune_stream(request, config, work_dir, on_progress, cancel)


def _interrupt(cancel: threading.Event) -> None:
    """The first Ctrl-C stops after the step, the second at once."""
    if cancel.is_set():
        raise KeyboardInterrupt
    cancel.set()


def _request(arguments: argparse.Namespace) -> TuneRequest:
    from dataclasses import replace

    from engine.experts.planner import parse_memory
    from engine.hub import DEFAULT_MODEL
    from engine.loading import pick_device
    from engine.residuals.accelerator import AcceleratorConfig
    from engine.residuals.tuning import TuneRequest, default_training
    from engine.residuals.tuning_data import DataConfig

    for name in ("max_tokens", "max_prompt", "held_out", "batch_tokens", "passes", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        raise InvalidRequestError(f"--learning-rate must lie between 0 and 1, not {arguments.learning_rate}.")
    training = default_training(pick_device(arguments.device), arguments.steps)
    training = replace(
        training,
        seed=arguments.seed,
        num_passes=arguments.passes,
        tokens_per_batch=arguments.batch_tokens or training.tokens_per_batch,
        learning_rate=arguments.learning_rate or training.learning_rate,
    )
    return TuneRequest(
        source=arguments.model or DEFAULT_MODEL,
        prompts=Path(arguments.prompts) if arguments.prompts else None,
        accelerator=AcceleratorConfig(
            arguments.depth, arguments.rank, not arguments.no_condition, arguments.draft_vocab
        ),
        training=training,
        start=Path(arguments.start) if arguments.start else None,
        data=DataConfig(
            num_tokens=arguments.tokens,
            max_new_tokens=arguments.max_tokens,
            max_prompt_tokens=arguments.max_prompt,
            num_invented=arguments.invent,
            num_held_out=arguments.held_out,
            seed=arguments.seed,
        ),
        steps=arguments.steps,
        disk_budget=parse_size(arguments.disk_budget),
        memory=parse_memory(arguments.memory) if arguments.memory else None,
        maps_only=arguments.maps,
        device=arguments.device,
        threads=arguments.threads,
        out=Path(arguments.out) if arguments.out else None,
    )


def parse_size(text: str) -> int:
    """``500M`` or ``2G`` in bytes.

    Raises:
        InvalidRequestError: it is no size.
    """
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise InvalidRequestError(f"{text!r} is no size; write 500M or 2G.")
    return size


def _summary(path: Path) -> str:
    from engine.residuals.adapter_file import read_card

    shares = ", ".join(f"{value:.1%}" for value in _agreements(path))
    return f"Agreement by draft position: {shares}.\n{read_card(path)['measured']['note']}\n{path}"


def _agreements(path: Path) -> list[float]:
    """An accelerator's, on held-out text, by draft position."""
    from engine.residuals.adapter_file import read_card

    found: list[float] = read_card(path)["measured"]["greedy_agreement_by_draft_position"]["held_out"]
    return found


class _Console:
    """Progress on stderr: one line that changes where a person watches, else a line now and then."""

    def __init__(self) -> None:
        self._watched = sys.stderr.isatty()
        self._last: tuple[str, int] = ("", -1)

    def show(self, progress: Progress) -> None:
        if self._watched:
            sys.stderr.write(f"\r\033[K{progress.message}")
        else:  # a log wants a line at each tenth of a stage
            tenth = (progress.stage, int(10 * progress.done / progress.total) if progress.total else 0)
            if tenth == self._last:
                return
            self._last = tenth
            sys.stderr.write(f"{progress.message}\n")
        sys.stderr.flush()

    def row(self, row: dict[str, Any]) -> None:
        shares = ", ".join(f"{value:.1%}" for value in row["greedy_agreement_by_draft_position"][:3])
        self.say(f"{row['name']}: {shares}")

    def say(self, text: str) -> None:
        self.end()
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def end(self) -> None:
        if self._watched:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
