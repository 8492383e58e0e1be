"""What a draft vocabulary's size is worth, with the tokens of the text at hand and without.

``python -m engine.residuals.vocabulary_sizes --json FILE.json`` has the model answer each suite's prompts greedily, and counts how
often the accelerator in use drafts what the model chose, from its most frequent tokens alone and from those and the ones
that the text had before (:mod:`engine.residuals.draft_vocabulary`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import hub
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.evaluation.suites import load_prompts, suite_path
from engine.models.decoder import Decoder
from engine.residuals.accelerator import Accelerator
from engine.residuals.adapter_file import find_adapter, load_accelerator
from engine.residuals.agreement import greedy_answers, load
from engine.residuals.corpus import Sequences
from engine.residuals.training import Batch, accelerate, counted_positions, run_teacher, shift_right
from engine.residuals.tuning_store import cut, in_groups

_TOKENS = 1024  # per batch: a row of marks for each, as long as the vocabulary
_PASSES = 3


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.residuals.vocabulary_sizes", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument("--suites", default="mt_bench,koala,self_instruct")
    parser.add_argument("--prompts", type=Path, action="append", default=[], metavar="FILE.jsonl")
    parser.add_argument("--sizes", default="8192,4096,3072,2048,1024")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each suite")
    parser.add_argument("--max-tokens", type=int, default=128, help="of one answer")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        files = {name: suite_path(name) for name in options.suites.split(",") if name}
        files |= {path.stem: path for path in options.prompts}
        decoder, tokenizer = load(options.model, "cpu")
        path = find_adapter(decoder)
        if path is None:
            raise SlipstreamError("There is no accelerator for this model; tune it first.")
        accelerator, rows = load_accelerator(path, decoder), []
        for name, file in files.items():
            texts = [prompt.turns[0] for prompt in load_prompts(file, options.limit)]
            written = greedy_answers(decoder, tokenizer, texts, options.max_tokens)
            for row in measure(decoder, accelerator, written, [int(n) for n in options.sizes.split(",")]):
                rows.append({"suite": name, "tokens": written.num_new_tokens, **row})
                print(json.dumps(rows[-1]), flush=True)
        with replacing(options.json) as target:
            target.write((json.dumps({"adapter": path.name, "rows": rows}, indent=1) + "\n").encode())
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


@torch.no_grad()
def measure(
    decoder: Decoder, accelerator: Accelerator, written: Sequences, sizes: list[int]
) -> list[dict[str, Any]]:
    """Agreement by draft position, and the share of the text's tokens that can be drafted at all, of each size: once of the
    most frequent tokens alone, once with those of the text before."""
    head = decoder.weights.lm_head.dequantize() * decoder.weights.final_norm
    vocabularies = [(size, with_text) for size in sizes for with_text in (False, True)]
    right = torch.zeros(len(vocabularies), _PASSES + 1, dtype=torch.int64)
    for rows in in_groups(written, _TOKENS):
        batch = Batch(cut(written, rows))
        tokens, places = batch.sequences.tokens.long(), counted_positions(batch.sequences, decoder.device)
        teacher = run_teacher(decoder, tokens, accelerator.config.depth)
        chosen = F.linear(teacher.final[places], head).argmax(-1)
        seen = _seen(tokens, len(head))[places]
        masks = [seen.clone() if with_text else torch.zeros_like(seen) for _, with_text in vocabularies]
        for mask, (size, _) in zip(masks, vocabularies, strict=True):
            mask[:, accelerator.draft_vocab[:size]] = True
        condition = shift_right(teacher.final) if accelerator.config.conditioned else None
        for place in range(_PASSES):
            exit_state = accelerate(accelerator, decoder, teacher, condition)
            logits = F.linear(exit_state[places], head)
            for row, mask in zip(right, masks, strict=True):
                drafts = logits.masked_fill(~mask, -torch.inf).argmax(-1)
                row[place] += (drafts == chosen).sum()
            condition = shift_right(exit_state) if accelerator.config.conditioned else None
        for row, mask in zip(right, masks, strict=True):
            row[-1] += mask.gather(1, chosen[:, None]).sum()
    shares = (right.double() / written.num_new_tokens).tolist()
    return [
        {
            "size": size,
            "with_text": with_text,
            "agreement_by_draft_position": [round(share, 4) for share in row[:-1]],
            "covered": round(row[-1], 4),
        }
        for (size, with_text), row in zip(vocabularies, shares, strict=True)
    ]


def _seen(tokens: Tensor, vocab_size: int) -> Tensor:
    """Which tokens each position's text has so far, itself included: bool ``[B, T, V]``."""
    first = torch.zeros(*tokens.shape, vocab_size, dtype=torch.bool)
    first.scatter_(2, tokens[..., None], True)
    for place in range(1, tokens.shape[1]):
        first[:, place] |= first[:, place - 1]
    return first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
