"""Tuning what names a mixture of experts' experts ahead of time: text, fitting, training, measuring, and its file.

The model's own text is made and kept as for drafting accelerators (:mod:`engine.residuals.tuning`), so one text
serves both. The accelerated stream learns the distributions of the routers that it is read by; the maps that need no stream
(:mod:`engine.residuals.router_maps`) are fitted to the routers' logits.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import hub
from engine.errors import InvalidRequestError, OutOfMemoryError
from engine.experts.planner import plan_memory
from engine.models.checkpoint import open_checkpoint
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.progress import Progress
from engine.quantization import get_format
from engine.residuals.adapter_file import tuned_dir
from engine.residuals.corpus import Sequences
from engine.residuals.expert_files import FOLDER, save_stream
from engine.residuals.expert_stream import (
    ExpertStream,
    ExpertStreamConfig,
    SlowPass,
    UnionFit,
    run_slow,
    run_stream,
)
from engine.residuals.map_tuning import AGAIN, FIT_MAPS, REPEATED, tune_maps
from engine.residuals.router_maps import RouterFit, router_logits
from engine.residuals.stages import EVALUATE, INITIALISE, TRAIN, Runner
from engine.residuals.training import BatchOrder, Trainer
from engine.residuals.tuning import Prepared, TuneRequest, check, prepare
from engine.residuals.tuning_store import Store, TuningStoppedError, cut, in_groups

_UNION_TOKENS = 16384
_FIT = replace(INITIALISE, label=FIT_MAPS.label)


def tune_stream(
    request: TuneRequest,
    config: ExpertStreamConfig,
    work_dir: Path,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    """Train the stream, or go on with it; returns its ``.safetensors`` file. On the CPU, wherever the request
    says: nothing of it has been tried on a GPU. Of a model that does not fit into memory unquantized, or where no more is
    asked for, only the maps are fitted (:mod:`engine.residuals.map_tuning`).

    Raises: as :func:`engine.residuals.tuning.tune`.
    """
    check(request)
    if config.interval < 1:
        raise InvalidRequestError(f"The interval must be at least 1, not {config.interval}.")
    request, runner = replace(request, device="cpu"), Runner(on_progress, cancel)
    with Store(work_dir).locked():
        model = hub.resolve(request.source, runner.on_progress, runner.cancel)
        if (shape := open_checkpoint(model.path).config).experts is None:
            raise InvalidRequestError(f"{model.name} has no experts to predict; tune it without --experts.")
        if request.maps_only or _is_too_large(shape, request.memory):
            return tune_maps(request, work_dir, runner)
        prepared = prepare(request, work_dir, runner, drafts=False)
        decoder = prepared.decoder
        settings = (prepared.folder, config, prepared.training, request.steps)
        name = "stream-" + hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        store = Store(work_dir / name)
        with torch.random.fork_rng():
            torch.manual_seed(prepared.training.seed)
            stream = ExpertStream(config, decoder.config)
        began = time.monotonic()
        _fit_union(stream, prepared, runner)
        _fit_maps(stream, prepared, store, runner)
        _train(stream, prepared, request.steps, store, runner)
        measured = measure(stream, decoder, prepared.held_out, runner, store)
        training = {
            "steps": request.steps, "tokens_written": prepared.corpus.sequences.num_new_tokens,
            "seconds": round(time.monotonic() - began, 1),
            "settings": {**asdict(request.data), **asdict(prepared.training)},
        }  # fmt: skip
        path = request.out or tuned_dir() / FOLDER / f"{Path(prepared.name).stem.lower()}.safetensors"
        save_stream(path, stream, decoder, prepared.name, training, measured)
    return path


def _is_too_large(config: ModelConfig, memory: int | None) -> bool:
    """Whether the model's weights do not fit into memory as training takes them."""
    try:
        return not plan_memory(config, get_format("fp32"), memory).resident
    except OutOfMemoryError:
        return True


@torch.no_grad()
def _fit_union(stream: ExpertStream, prepared: Prepared, runner: Runner) -> None:
    """A minute's work on any machine, so it has no checkpoint of its own."""
    sequences, training = prepared.corpus.sequences, prepared.training
    order = BatchOrder(sequences.lengths, prepared.corpus.kept, training.tokens_per_batch, training.seed)
    total = max(4, _UNION_TOKENS // training.tokens_per_batch)
    meter, fit = runner.meter(_FIT, 0, total), UnionFit(stream)
    for index in range(total):
        if runner.stopped():
            raise TuningStoppedError
        some = cut(sequences, order.rows(index))
        inside = torch.arange(some.tokens.shape[1]) < some.lengths[:, None]
        fit.add(run_slow(prepared.decoder, some.tokens.long()), inside)
        meter.report(index + 1)
    fit.solve()


def _fit_maps(stream: ExpertStream, prepared: Prepared, store: Store, runner: Runner) -> None:
    """On all of the text."""
    sequences = prepared.corpus.sequences
    groups, fit = in_groups(sequences, prepared.training.tokens_per_batch), RouterFit(stream.maps)

    def step(index: int) -> str:
        some = cut(sequences, groups[index])
        slow = run_slow(prepared.decoder, some.tokens.long())
        logits = {layer: said for layer, said in enumerate(slow.logits) if said is not None}
        fit.add(dict(enumerate(slow.middle)), logits, some.lengths)
        return ""

    runner.run(_FIT, store, "router-maps", len(groups), step, fit.state, fit.restore)
    fit.solve()


def _train(stream: ExpertStream, prepared: Prepared, steps: int, store: Store, runner: Runner) -> None:
    decoder, corpus, training = prepared.decoder, prepared.corpus, prepared.training
    order = BatchOrder(corpus.sequences.lengths, corpus.kept, training.tokens_per_batch, training.seed)
    trainer = Trainer(stream, training, steps)

    def step(index: int) -> str:
        loss = stream_loss(stream, decoder, cut(corpus.sequences, order.rows(index)))
        trainer.descend(loss)
        return f"divergence {float(loss.detach()):.3f}" if index % 5 == 4 else ""

    runner.run(TRAIN, store, "training", steps, step, trainer.state, trainer.restore)


def stream_loss(stream: ExpertStream, decoder: Decoder, sequences: Sequences) -> Tensor:
    """Mean divergence of the routers' distributions on the stream from those on the slow states."""
    slow = run_slow(decoder, sequences.tokens.long())
    inside = torch.arange(sequences.tokens.shape[1]) < sequences.lengths[:, None]
    losses = []
    for (_, target), logits in run_stream(stream, decoder, slow).items():
        shares = slow.shares[target]
        assert shares is not None
        sharpened = slow.sharpness[target] * logits[inside].float()
        wanted, log_q = shares[inside], sharpened.log_softmax(dim=-1)
        losses.append((wanted * (wanted.clamp(min=1e-9).log() - log_q)).sum(dim=-1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def measure(
    stream: ExpertStream, decoder: Decoder, held_out: Sequences, runner: Runner, store: Store
) -> dict[str, Any]:
    """Recall of the experts that the routers choose, by lookahead: of the stream, and of the later layer's router
    on the slow state at the same places."""
    groups = [cut(held_out, rows) for rows in in_groups(held_out, 1024)]
    hits: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    experts = decoder.config.experts
    assert experts is not None
    k = experts.num_experts_per_tok

    def step(index: int) -> str:
        sequences = groups[index]
        slow = run_slow(decoder, sequences.tokens.long())
        place = torch.arange(sequences.tokens.shape[1])
        inside = (place >= sequences.prompt_lengths[:, None]) & (place < sequences.lengths[:, None])
        depth, maps = stream.config.draft_depth, stream.maps
        union = stream.union_logits(slow.before[depth], slow.final)
        found = {
            "stream": run_stream(stream, decoder, slow),
            "next_gate": _next_gate(stream, decoder, slow),
            "ridge_gate": {
                (layer - 1, layer): maps.inputs(slow.middle[layer - 1]) @ maps.ahead[place].T
                for place, layer in enumerate(maps.sparse)
                if layer
            },
            REPEATED: {(layer, layer): _earlier(slow.logits[layer]) for layer in maps.sparse},
            AGAIN: {
                (layer, layer): _earlier(maps.inputs(slow.middle[layer]) @ maps.again[place].T)
                for place, layer in enumerate(maps.sparse)
            },
            "union": {(depth, layer): union[..., n, :] for n, layer in enumerate(stream.sparse)},
        }
        for name, predictions in found.items():
            for (source, target), logits in predictions.items():
                shares = slow.shares[target]
                assert shares is not None
                chosen = shares[inside].topk(k, dim=-1).indices
                named = logits[inside].topk(k, dim=-1).indices
                key = f"{name} {target - source}" if target > source and name != "union" else name
                hits[key] += float((chosen[:, :, None] == named[:, None]).sum())
                counts[key] += chosen.numel()
        return ""

    def state() -> dict[str, Tensor]:
        names = sorted(counts)
        return {name: torch.tensor([hits[name], counts[name]], dtype=torch.float64) for name in names}

    def restore(saved: dict[str, Tensor], done: int) -> None:
        for name, pair in saved.items():
            hits[name], counts[name] = pair.tolist()

    runner.run(EVALUATE, store, "measured", len(groups), step, state, restore)
    return {
        "recall_by_lookahead": {name: hits[name] / counts[name] for name in sorted(counts)},
        "note": f"Share of the {k} experts chosen that are among the {k} named, on held-out text, by layers ahead; of the "
        f"union map over all layers, given the model's own final states. {AGAIN}: named by the ridge gate while the last "
        f"token is in the layer; {REPEATED}: those that the last token was given.",
    }


def _earlier(logits: Tensor | None) -> Tensor:
    """What was said at each position's last one."""
    assert logits is not None
    return logits.roll(1, dims=1)


def _next_gate(stream: ExpertStream, decoder: Decoder, slow: SlowPass) -> dict[tuple[int, int], Tensor]:
    """What the later routers make of the slow states, at the places where the stream is read."""
    found = {}
    for index in range(stream.first, decoder.config.num_layers):
        target = stream.target(index)
        if target is None:
            continue
        found[index, target] = router_logits(decoder, target, slow.middle[index])
    return found
