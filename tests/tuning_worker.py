"""Run by tests in a process of its own: tunes a tiny model, with a line of output per report of progress.

Arguments: model folder, prompts file, work folder, adapter file, and perhaps the number of steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine.residuals import stages, tuning_data
from engine.residuals.accelerator import AcceleratorConfig
from engine.residuals.training import TrainingConfig
from engine.residuals.tuning import TuneRequest, tune
from engine.residuals.tuning_data import DataConfig


def small_request(model: Path, prompts: Path, out: Path | None, steps: int = 30) -> TuneRequest:
    """A request that is met in seconds, over several shards of text."""
    return TuneRequest(
        source=str(model),
        prompts=prompts,
        accelerator=AcceleratorConfig(depth=2, rank=8, draft_vocab_size=256),
        training=TrainingConfig(tokens_per_batch=512, learning_rate=3e-3, warmup_steps=3),
        data=DataConfig(num_tokens=400, max_new_tokens=24, num_held_out=6),
        steps=steps,
        device="cpu",
        threads=1,
        out=out,
    )


def make_quick() -> None:
    """Shards of four answers, a checkpoint after every step, and a report of every step."""
    tuning_data._SHARD_FLOPS = 0
    stages.CHECKPOINT_SECONDS = -1.0
    stages.REPORT_SECONDS = -1.0


if __name__ == "__main__":
    model, prompts, work, out = map(Path, sys.argv[1:5])
    make_quick()
    steps = int(sys.argv[5]) if sys.argv[5:] else 30
    tune(small_request(model, prompts, out, steps), work, lambda p: print(p.stage, p.done, flush=True))
