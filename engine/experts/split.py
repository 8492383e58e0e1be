"""Make a mixture of experts out of a dense model: ``python -m engine.experts.split --output FOLDER``.

There is no small trained mixture-of-experts model to test with, so this makes one, a testbed of our own: the neurons
of a dense model are split into experts, and routers and small corrections are trained on the dense model's own text.
The output is a recipe of a few megabytes; the weights remain the base model's. Ctrl-C stops, the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine import hub, paths
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.experts.healing import Distillation, SplitModel, initialise
from engine.experts.splitting import SplitConfig
from engine.models.checkpoint import open_checkpoint
from engine.models.decoder import Decoder
from engine.models.split_checkpoint import CARD, TENSORS, base_fingerprint
from engine.progress import Progress
from engine.residuals.stages import Runner, Stage
from engine.residuals.training import (
    Batch,
    BatchOrder,
    Trainer,
    TrainingConfig,
    run_teacher,
)
from engine.residuals.tuning import TuneRequest, prepare
from engine.residuals.tuning_data import DataConfig, most_frequent
from engine.residuals.tuning_store import Corpus, Store, cut, in_groups

HEAL = Stage("heal", "Healing", 4, "steps")
_FIT_TOKENS = 4096  # on which neurons are grouped and routers fitted
_VOCAB = 16384  # tokens whose probabilities are compared


def main(argv: list[str]) -> int:
    """Split, train, measure, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.experts.split", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the dense model's text")
    parser.add_argument("--held-out", type=int, default=32, help="prompts to measure on")
    parser.add_argument("--max-tokens", type=int, default=128, help="of one answer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    for field, value in asdict(SplitConfig()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args(argv)
    config = SplitConfig(**{field: getattr(options, field) for field in asdict(SplitConfig())})
    training = TrainingConfig(
        tokens_per_batch=options.batch_tokens, learning_rate=options.learning_rate,
        warmup_steps=max(1, options.steps // 20),
    )  # fmt: skip
    data = DataConfig(options.tokens, options.max_tokens, num_held_out=options.held_out)
    request = TuneRequest(options.model, training=training, data=data, steps=options.steps, device="cpu")
    try:
        card = split(request, config, options.output, paths.cache_dir() / "tuning", _show)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    print(json.dumps(card["measured"], indent=1))
    return 0


def split(
    request: TuneRequest, config: SplitConfig, output: Path, work_dir: Path, on_progress: Any = None
) -> dict[str, Any]:
    """Make the recipe in ``output``, going on with an earlier call's work; returns its card.

    Raises: as :func:`engine.residuals.tuning.tune`.
    """
    runner = Runner(on_progress)
    prepared = prepare(request, work_dir, runner, num_runs=1 << 20, drafts=False)  # keeps all final states
    decoder, training = prepared.decoder, prepared.training
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = SplitModel(decoder, config)
    held_out = prepared.held_out
    groups = [cut(held_out, rows) for rows in in_groups(held_out, 2048)]
    order = BatchOrder(
        prepared.corpus.sequences.lengths, prepared.corpus.kept, training.tokens_per_batch, training.seed
    )
    settings = (prepared.folder, request.data.num_tokens, config, training, request.steps)
    store = Store(work_dir / f"split-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}")
    _initialise(model, prepared.corpus, order, store)
    vocab = most_frequent(prepared.corpus.sequences, _VOCAB, decoder.config.vocab_size)
    distillation = Distillation.over(model, vocab)
    before = measure(model, groups)
    began = time.monotonic()
    _heal(distillation, prepared.corpus, order, training, request.steps, store, runner)
    seconds = time.monotonic() - began
    source = open_checkpoint(hub.resolve(request.source).path)
    card = {
        "base_model": {"source": request.source, "fingerprint": base_fingerprint(source)},
        "split": asdict(config),
        "training": {
            "data": "the dense model's own continuations of train.jsonl, part greedy and part sampled",
            "tokens_written": prepared.corpus.sequences.num_new_tokens, "steps": request.steps,
            "seconds": round(seconds, 1), "settings": {**asdict(request.data), **asdict(training)},
        },
        "measured": {"before_healing": before, "healed": measure(model, groups), "note": _NOTE},
    }  # fmt: skip
    _write(output, model, card)
    return card


_NOTE = (
    "On held-out prompts and the dense model's own greedy answers to them, in float32: agreement is the share of "
    "tokens whose most likely successor is the dense model's; nll is the mean negative log-likelihood of the text in "
    "nats per token; kl is the mean divergence from the dense model's distribution."
)


def _initialise(model: SplitModel, corpus: Corpus, order: BatchOrder, store: Store) -> None:
    saved = store.load("initial")
    if saved is None:
        batches = [corpus.batch(order.rows(step), torch.device("cpu")) for step in range(8)]
        initialise(model, batches, _FIT_TOKENS)
        store.save("initial", model.state_dict())
    else:
        model.load_state_dict(saved[0])


def _heal(
    distillation: Distillation, corpus: Corpus, order: BatchOrder, training: TrainingConfig, steps: int,
    store: Store, runner: Runner,
) -> None:  # fmt: skip
    trainer = Trainer(distillation.model, training, steps)

    def step(index: int) -> str:
        loss, agreement = distillation(corpus.batch(order.rows(index), torch.device("cpu")))
        trainer.descend(loss)
        if index % 5 != 4:
            return ""
        return f"loss {float(loss.detach()):.3f}, {float(agreement):.0%} as the dense model"

    runner.run(HEAL, store, "healing", steps, step, trainer.state, trainer.restore)


@torch.no_grad()
def measure(model: SplitModel, groups: list[Any]) -> dict[str, float]:
    """Quality on held-out text (see the card's note)."""
    decoder: Decoder = model.decoder
    gain = decoder.weights.final_norm
    totals = dict.fromkeys(("tokens", "agreement", "nll", "dense_nll", "kl"), 0.0)
    for sequences in groups:
        batch = Batch(sequences)
        tokens = batch.sequences.tokens.long()
        place = torch.arange(tokens.shape[1])
        inside = (place >= sequences.prompt_lengths[:, None] - 1) & (place < sequences.lengths[:, None] - 1)
        following = tokens.roll(-1, dims=1)[inside]
        states, _ = model(tokens)
        dense = run_teacher(decoder, tokens, 0).final
        ours = decoder.weights.lm_head(states[inside] * gain).log_softmax(dim=-1)
        theirs = decoder.weights.lm_head(dense[inside] * gain).log_softmax(dim=-1)
        totals["tokens"] += len(following)
        totals["agreement"] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        totals["nll"] -= float(ours.gather(1, following[:, None]).sum())
        totals["dense_nll"] -= float(theirs.gather(1, following[:, None]).sum())
        totals["kl"] += float((theirs.exp() * (theirs - ours)).sum())
    count = totals.pop("tokens")
    return {"tokens": count, **{name: value / count for name, value in totals.items()}}


def _write(output: Path, model: SplitModel, card: dict[str, Any]) -> None:
    from safetensors.torch import save

    with replacing(output / TENSORS) as file:
        file.write(save(model.recipe()))
    with replacing(output / CARD) as file:
        file.write((json.dumps(card, indent=1) + "\n").encode())


def _show(progress: Progress) -> None:
    print(f"\r\033[K{progress.message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
