"""Tuning: from a model and some prompts to an accelerator that is trained on the model's own text.

Six stages, each of which can be stopped or killed and goes on from its last checkpoint: write text, keep
its final states, fit the exit in closed form, train, measure on held-out prompts, write the adapter. On a
CPU the result of a run that was killed is bit for bit that of one that was not: every random draw depends
on the seed and the step alone.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import hub
from engine.errors import AdapterError, InvalidRequestError
from engine.models.decoder import Decoder
from engine.progress import Progress
from engine.residuals.accelerator import Accelerator, AcceleratorConfig
from engine.residuals.adapter_file import (
    find_adapter,
    load_accelerator,
    read_card,
    save_accelerator,
    tuned_dir,
)
from engine.residuals.corpus import Sequences
from engine.residuals.precision import training_format
from engine.residuals.stages import EVALUATE, INITIALISE, TRAIN, WRITE, Runner
from engine.residuals.training import (
    Batch,
    BatchOrder,
    Evaluation,
    ExitFit,
    Objective,
    Trainer,
    TrainingConfig,
)
from engine.residuals.tuning_data import DataConfig, DataStages, data_name, encode_prompts, most_frequent
from engine.residuals.tuning_store import Corpus, Store, TuningError, cut, in_groups
from engine.residuals.workers import find_workers

MIN_FIT_BATCHES, FIT_TOKENS = 16, 32768  # several times as many as the exit map has inputs
EVALUATION_TOKENS = 2048  # per batch: whole rows of logits are held


@dataclass(frozen=True)
class TuneRequest:
    """What to tune and how.

    Attributes:
        source: as :func:`engine.hub.resolve` takes it.
        prompts: a JSON Lines file; None: the prompts shipped for training.
        training: None: what suits the device.
        start: an accelerator of this model that is trained on, whose shape then counts; None: a new one.
        steps: of the optimiser.
        disk_budget: bytes for the final states; what they do not hold is computed again at each step. Of router maps: for
            all states.
        memory: bytes that the process may take with a mixture-of-experts model; None: what is free.
        maps_only: of such a model, only the maps that name its experts: what a chat uses.
        out: the adapter's ``.safetensors``; None: among those that the chat looks for.
    """

    source: str = hub.DEFAULT_MODEL
    prompts: Path | None = None
    accelerator: AcceleratorConfig = field(default_factory=AcceleratorConfig)
    training: TrainingConfig | None = None
    start: Path | None = None
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 1000
    disk_budget: int = 2 << 30
    memory: int | None = None
    maps_only: bool = False
    device: str = "auto"
    threads: int | None = None
    out: Path | None = None


def tune(
    request: TuneRequest,
    work_dir: Path,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    """Train an accelerator, or go on with one; returns its ``.safetensors`` file.

    The text, the checkpoints and the kept states lie in ``work_dir``, in folders named by what they depend
    on, so that one folder serves all requests.

    Raises:
        InvalidRequestError: settings that do not fit the model, or a broken prompts file.
        TuningError: no room on the disk, or another run works there. TuningStoppedError: ``cancel`` was set.
        ModelFileError, UnsupportedModelError, DownloadError, OutOfMemoryError.
    """
    check(request)
    store = Store(work_dir)
    workers = find_workers(_pick_device(request.device))
    if not workers.is_first:
        return _tune(request, work_dir, Runner(on_progress, cancel, workers))
    with store.locked():
        return _tune(request, work_dir, Runner(on_progress, cancel, workers))


def _tune(request: TuneRequest, work_dir: Path, runner: Runner) -> Path:
    prepared = prepare(request, work_dir, runner)
    run = Run(prepared, request, work_dir, runner)
    path = request.out or tuned_dir() / f"{run.file_stem}.safetensors"
    aside = path.parent / "set-aside" / path.name
    for finished in (path, aside):
        if _is_of(finished, run.name):
            return finished
    started = time.monotonic()
    run.initialise()
    run.train()
    measured = run.measure("measured")
    if request.out is None and (better := run.better_in_use(measured)) is not None:
        path = aside
        measured["note"] = f"Set aside: {better} agrees more often on the same text."
    if runner.workers.is_first:
        meter = runner.meter(WRITE, 0, 1)
        try:
            save_accelerator(
                path, run.accelerator, prepared.decoder, prepared.name,
                run.describe(time.monotonic() - started), measured,
            )  # fmt: skip
        except OSError as error:
            raise TuningError(
                f"The adapter could not be written to {path} ({error.strerror}); free some space, then start "
                "the tuning again: what is done is kept."
            ) from error
        prepared.corpus.close()
        prepared.store.remove("states-*")  # the large part; the text may serve again
        run.store.remove("*")
        meter.report(1, str(path))
    runner.workers.wait()
    return path


def _is_of(path: Path, run_name: str) -> bool:
    try:
        return path.is_file() and read_card(path)["training"].get("run") == run_name
    except AdapterError:
        return False


def check(request: TuneRequest) -> None:
    """Refuse settings that can be told to be wrong without the model.

    Raises:
        InvalidRequestError.
    """
    lowest = {
        "depth": (request.accelerator.depth, 1),
        "rank": (request.accelerator.rank, 1),
        "draft vocabulary": (request.accelerator.draft_vocab_size, 16),
        "number of tokens": (request.data.num_tokens, 1),
        "number of invented prompts": (request.data.num_invented, 0),
        "number of steps": (request.steps, 1),
        "disk budget": (request.disk_budget, 0),
    }
    for name, (value, least) in lowest.items():
        if value < least:
            raise InvalidRequestError(f"The {name} must be at least {least}, not {value}.")


def default_training(device: str, steps: int) -> TrainingConfig:
    """Small batches on a CPU, where a step should take seconds; large ones on a GPU."""
    warmup = max(1, min(100, steps // 10))
    if device == "cpu":
        return TrainingConfig(tokens_per_batch=1024, warmup_steps=warmup)
    return TrainingConfig(warmup_steps=warmup)


@dataclass(frozen=True)
class Prepared:
    """Model and data, ready to train any number of accelerators on."""

    decoder: Decoder
    name: str
    folder: str  # name of the data's folder, which says what the data is
    store: Store
    corpus: Corpus
    held_out: Sequences
    training: TrainingConfig


def prepare(
    request: TuneRequest, work_dir: Path, runner: Runner, num_runs: int = 1, drafts: bool = True
) -> Prepared:
    """Load the model in a format that can be trained on, and make or find the data.

    Args:
        num_runs: how often the request's steps will be made on it.
        drafts: whether it is for the accelerator that the request describes.

    Raises: as :func:`tune`.
    """
    from engine.hardware import usable_threads
    from engine.models.loader import load_decoder
    from engine.threads import set_threads
    from engine.tokenizer import load_tokenizer

    device = runner.workers.device or _pick_device(request.device)
    set_threads(request.threads or usable_threads())
    model = hub.resolve(request.source, runner.on_progress, runner.cancel)
    tokenizer = load_tokenizer(model.path)
    # A 4-bit file is trained on as what its codes stand for: gradients need matrices. Routers are measured in float32.
    weight_format = training_format(device) if drafts or device != "cpu" else "fp32"
    decoder = load_decoder(model.path, weight_format, device)
    if drafts and request.accelerator.depth >= decoder.config.num_layers:
        raise InvalidRequestError(
            f"A draft of {request.accelerator.depth} layers is no draft: the model has {decoder.config.num_layers}."
        )
    prompts = encode_prompts(request.prompts, tokenizer, decoder, request.data)
    folder = data_name(decoder, model.path.name, prompts, request.data)
    store = Store(work_dir / folder)
    stages = DataStages(decoder, sorted(tokenizer.eos_ids), prompts, request.data, store, runner)
    shards, held_out = stages.generate()
    training = request.training or default_training(device, request.steps)
    # Keeping states costs one run of the model over the text, and saves most of each later one.
    num_tokens = sum(int(shard.lengths.sum()) for shard in shards)
    worthwhile = num_runs * request.steps * training.tokens_per_batch * runner.workers.count > 2 * num_tokens
    corpus = stages.keep_states(shards, request.disk_budget if worthwhile else 0)
    return Prepared(decoder, model.name, folder, store, corpus, held_out, training)


def _pick_device(device: str) -> str:
    from engine.loading import pick_device

    return pick_device(device)


@dataclass
class Run:
    """One accelerator on its way; every method goes on from its checkpoint."""

    prepared: Prepared
    request: TuneRequest
    work_dir: Path
    runner: Runner
    objective_type: type[Objective] = Objective
    tokens_seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        request, decoder, corpus = self.request, self.prepared.decoder, self.prepared.corpus
        settings: tuple[object, ...] = (
            self.prepared.folder, request.data.num_tokens, request.data.num_held_out, request.accelerator,
            self.prepared.training, request.steps, request.disk_budget, self.runner.workers.count,
            self.objective_type.__name__,
        )  # fmt: skip
        if request.start is not None:
            settings = (*settings, hashlib.sha256(request.start.read_bytes()).hexdigest())
        self.name = "run-" + hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        self.store = Store(self.work_dir / self.name)
        self.config = self.prepared.training
        if request.start is not None:
            self.accelerator = load_accelerator(request.start, decoder).requires_grad_(True)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(self.config.seed)
                self.accelerator = Accelerator(request.accelerator, decoder.config)
            size = len(self.accelerator.draft_vocab)
            self.accelerator.draft_vocab = most_frequent(corpus.sequences, size, decoder.config.vocab_size)
        self.accelerator.to(decoder.device)
        self.objective = self.objective_type(decoder, self.accelerator, self.config)
        self._order = BatchOrder(
            corpus.sequences.lengths, corpus.kept, self.config.tokens_per_batch, self.config.seed
        )
        held_out = self.prepared.held_out
        self._held_out = [
            Batch(cut(held_out, rows)) for rows in in_groups(held_out, EVALUATION_TOKENS)
        ]  # fmt: skip

    @property
    def file_stem(self) -> str:
        """Of the adapter's file: the model's name, fit for every file system."""
        return re.sub(r"[^a-z0-9.]+", "-", self.prepared.name.lower().removesuffix(".gguf")).strip("-.")

    def initialise(self) -> None:
        """The exit in closed form, unless training goes on from an accelerator that has one."""
        if self.request.start is not None:
            return
        fit = ExitFit(self.accelerator, self.prepared.decoder)

        def step(index: int) -> str:
            fit.add(self._batch(index))
            return ""

        def restore(state: dict[str, torch.Tensor], done: int) -> None:
            fit.gram, fit.cross = state["gram"].to(fit.gram), state["cross"].to(fit.cross)

        total = max(MIN_FIT_BATCHES, FIT_TOKENS // self.config.tokens_per_batch)
        self.runner.run(
            INITIALISE, self.store, "exit", total, step, lambda: {"gram": fit.gram, "cross": fit.cross}, restore
        )  # fmt: skip
        fit.solve()

    def train(self) -> None:
        """The optimiser's steps."""
        workers = self.runner.workers
        trainer = Trainer(
            self.accelerator, self.config, self.request.steps, workers.average if workers.count > 1 else None
        )

        def step(index: int) -> str:
            batch = self._batch(index * workers.count + workers.rank)
            loss, agreements = self.objective(batch)
            trainer.descend(loss)
            self.tokens_seen += batch.sequences.num_new_tokens * workers.count
            return f"{float(agreements[0]):.0%} of drafts right" if index % 10 == 9 else ""

        def state() -> dict[str, torch.Tensor]:
            return {**trainer.state(), "tokens_seen": torch.tensor(self.tokens_seen)}

        def restore(state: dict[str, torch.Tensor], done: int) -> None:
            self.tokens_seen = int(state["tokens_seen"])
            trainer.restore(state, done)

        self.runner.run(TRAIN, self.store, "training", self.request.steps, step, state, restore)

    def measure(self, name: str, objective: Objective | None = None) -> dict[str, Any]:
        """Agreement on the held-out text, as the card gives it."""
        evaluation = Evaluation(objective or self.objective)

        def step(index: int) -> str:
            evaluation.add(self._held_out[index])
            return ""

        def restore(state: dict[str, torch.Tensor], done: int) -> None:
            evaluation.totals = state["totals"]

        self.runner.run(
            EVALUATE, self.store, name, len(self._held_out), step, lambda: {"totals": evaluation.totals}, restore
        )  # fmt: skip
        return {
            "greedy_agreement_by_draft_position": {"held_out": evaluation.agreements},
            "note": f"Share of {int(evaluation.totals[-1])} held-out tokens of the model's own greedy text whose "
            f"draft equals the model's choice, in {str(self.prepared.decoder.dtype).removeprefix('torch.')}.",
        }

    def better_in_use(self, measured: dict[str, Any]) -> str | None:
        """Name of the accelerator that the chat uses now, if it drafts better on the same text."""
        path = find_adapter(self.prepared.decoder)
        if path is None:
            return None
        current = load_accelerator(path, self.prepared.decoder).to(self.prepared.decoder.device)
        other = self.measure(
            f"in-use-{read_card(path)['training'].get('run', path.stem)}",
            Objective(self.prepared.decoder, current, self.config),
        )
        return path.name if mean_agreement(other) > mean_agreement(measured) else None

    def describe(self, seconds: float) -> dict[str, Any]:
        """The card's word on the training."""
        request = self.request
        earlier = None if request.start is None else read_card(request.start)["training"]
        return {
            "run": self.name,
            "device": self.prepared.decoder.device.type,
            "data": f"the model's own continuations of {request.prompts.name if request.prompts else 'train.jsonl'}"
            f"{' and of prompts that it made up itself' if request.data.num_invented else ''}, part greedy and part "
            "sampled",
            "tokens_written": self.prepared.corpus.sequences.num_new_tokens,
            "tokens_seen": self.tokens_seen,
            "steps": request.steps,
            "seconds": round(seconds, 1),  # since the last start
            "settings": {**asdict(request.data), **asdict(self.config)},
            **({} if earlier is None else {"went_on_from": earlier}),
        }

    def _batch(self, index: int) -> Batch:
        return self.prepared.corpus.batch(self._order.rows(index), self.prepared.decoder.device)


def mean_agreement(measured: dict[str, Any]) -> float:
    """Over the first three draft positions, which decide the speed."""
    agreements = measured["greedy_agreement_by_draft_position"]["held_out"][:3]
    return float(sum(agreements) / len(agreements))
