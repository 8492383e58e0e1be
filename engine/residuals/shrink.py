"""A smaller accelerator out of a trained one: ``python -m engine.residuals.shrink --rank 16 --draft-vocab 8192``.

A draft step reads its adapters and its head each time, so what they give must be worth their bytes. Adapters are cut to
their strongest directions (the singular value decomposition of up times down), the draft vocabulary to the tokens that
the model writes most. Each combination is measured on held-out text before and after; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import hub, paths
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.models.decoder import Decoder
from engine.residuals.ablation import draft_cost
from engine.residuals.accelerator import Accelerator, LowRank
from engine.residuals.adapter_file import find_adapter, load_accelerator, read_card, save_accelerator
from engine.residuals.corpus import Sequences
from engine.residuals.stages import Runner
from engine.residuals.training import Batch, Objective, TrainingConfig, evaluate
from engine.residuals.tuning import EVALUATION_TOKENS, TuneRequest, prepare
from engine.residuals.tuning_data import DataConfig, encode_prompts
from engine.residuals.tuning_store import cut, in_groups
from engine.tokenizer import load_tokenizer

# A few answers use few words: those of all prompts count as well, a tenth as much (our choice).
_PROMPT_WEIGHT = 0.1


def main(argv: list[str]) -> int:
    """Measure the combinations, and write the one that was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.residuals.shrink", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--ranks", default="64,32,16,8")
    parser.add_argument("--draft-vocabs", default="16384,8192,4096")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the model's text, for counting")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE.safetensors", help="write the last one"
    )
    options = parser.parse_args(argv)
    data = DataConfig(options.tokens, options.max_tokens, num_held_out=options.held_out)
    request = TuneRequest(options.model, data=data, device="cpu")
    try:
        prepared = prepare(request, paths.cache_dir() / "tuning", Runner(_show), drafts=False)
        found = find_adapter(prepared.decoder)
        if found is None:
            raise SlipstreamError(f"There is no accelerator for {prepared.name}; tune it first.")
        accelerator, decoder = load_accelerator(found, prepared.decoder), prepared.decoder
        counts = token_counts(prepared.corpus.sequences, decoder.config.vocab_size)
        counts = counts + _PROMPT_WEIGHT * _prompt_counts(request, decoder)
        held_out = prepared.held_out
        batches = [Batch(cut(held_out, rows)) for rows in in_groups(held_out, EVALUATION_TOKENS)]
        report: dict[str, Any] = {
            "adapter": found.name,
            "held_out_tokens": held_out.num_new_tokens,
            "rows": [],
        }
        for rank in map(int, options.ranks.split(",")):
            for size in map(int, options.draft_vocabs.split(",")):
                smaller = shrink(accelerator, rank, size, counts)
                report["rows"].append(
                    {"rank": rank, "draft_vocab_size": size, **_measure(smaller, decoder, batches)}
                )
                print(json.dumps(report["rows"][-1]), flush=True)
                with replacing(options.json) as file:
                    file.write((json.dumps(report, indent=1) + "\n").encode())
        if options.out is not None:
            card = read_card(found)
            training = {**card["training"], "shrunk_from": found.name, "rank": rank, "draft_vocab_size": size}
            measured = {**card["measured"], "shrunk": report["rows"][-1]}
            save_accelerator(options.out, smaller, decoder, card["base_model"], training, measured)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def shrink(accelerator: Accelerator, rank: int, draft_vocab_size: int, counts: Tensor) -> Accelerator:
    """A copy with adapters of ``rank`` and a draft vocabulary of ``draft_vocab_size``.

    Args:
        counts: how often the model writes each token, ``[V]``.
    """
    config = replace(accelerator.config, rank=rank, draft_vocab_size=draft_vocab_size)
    smaller = Accelerator(config, accelerator.model)
    vocab = accelerator.draft_vocab
    kept = counts[vocab].argsort(descending=True, stable=True)[:draft_vocab_size]
    smaller.draft_vocab = vocab[kept]
    with torch.no_grad():
        smaller.exit.copy_(accelerator.exit)
        if smaller.start is not None and accelerator.start is not None:
            smaller.start.copy_(accelerator.start)
        whole = dict(accelerator.named_modules())
        for name, module in smaller.named_modules():
            if isinstance(module, LowRank):
                source = whole[name]
                assert isinstance(source, LowRank)
                _cut(module, source, rank)
    return smaller.requires_grad_(False)


def _prompt_counts(request: TuneRequest, decoder: Decoder) -> Tensor:
    """How often each token occurs in the training prompts, int64 ``[V]``."""
    tokenizer = load_tokenizer(hub.resolve(request.source).path)
    prompts = encode_prompts(request.prompts, tokenizer, decoder, request.data).training
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    return torch.bincount(ids, minlength=decoder.config.vocab_size)


def _cut(target: LowRank, source: LowRank, rank: int) -> None:
    """The best approximation of ``rank`` of up times down (Eckart and Young)."""
    q_up, r_up = torch.linalg.qr(source.up.double())
    q_down, r_down = torch.linalg.qr(source.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    roots = values[:rank].sqrt()
    target.up.copy_((q_up @ left[:, :rank] * roots).float())
    target.down.copy_((roots[:, None] * right[:rank] @ q_down.T).float())


def token_counts(sequences: Sequences, vocab_size: int) -> Tensor:
    """How often the model wrote each token, int64 ``[V]``."""
    place = torch.arange(sequences.tokens.shape[1])
    written = (place >= sequences.prompt_lengths[:, None]) & (place < sequences.lengths[:, None])
    return torch.bincount(sequences.tokens[written].long(), minlength=vocab_size)


def _measure(accelerator: Accelerator, decoder: Decoder, batches: list[Batch]) -> dict[str, Any]:
    objective = Objective(decoder, accelerator, TrainingConfig())
    cost = draft_cost(decoder, accelerator.config)
    return {"agreement_by_draft_position": evaluate(objective, batches), "draft_cost": cost}


def _show(progress: Any) -> None:
    print(f"\r\033[K{progress.message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
