"""How often an accelerator drafts what the model itself chooses, on whole suites.

``python -m engine.residuals.agreement --suites mt_bench,koala`` has the model answer each prompt greedily, and counts
by draft position. ``--card`` writes the result into the accelerators' cards.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engine import hub
from engine.atomic import replacing
from engine.errors import SlipstreamError
from engine.evaluation.suites import load_prompts, suite_path
from engine.models.decoder import Decoder
from engine.requests import Message
from engine.residuals.accelerator import Accelerator
from engine.residuals.adapter_file import find_adapter, load_accelerator, read_card
from engine.residuals.corpus import Sequences, generate_continuations
from engine.residuals.training import Batch, Objective, TrainingConfig, evaluate
from engine.residuals.tuning import EVALUATION_TOKENS
from engine.residuals.tuning_store import cut, in_groups
from engine.tokenizer import Tokenizer

_MAX_PROMPT = 512  # tokens; longer prompts are left out
_ROWS = 256  # answered at once


def main(argv: list[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.residuals.agreement", description=__doc__)
    parser.add_argument("--model", default=hub.DEFAULT_MODEL)
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.safetensors",
        help="several on one text",
    )
    parser.add_argument("--suites", default="mt_bench,koala,self_instruct")
    parser.add_argument("--prompts", type=Path, action="append", default=[], metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each suite")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--card", action="store_true", help="write the result into the accelerator's card")
    options = parser.parse_args(argv)
    try:
        files = {name: suite_path(name) for name in options.suites.split(",") if name}
        files |= {path.stem: path for path in options.prompts}
        decoder, tokenizer = load(options.model, options.device)
        paths = options.adapter or [find_adapter(decoder)]
        if paths[0] is None:
            raise SlipstreamError("There is no accelerator for this model; tune it first.")
        accelerators = {path: load_accelerator(path, decoder).to(decoder.device) for path in paths}
        found: dict[Path, dict[str, Any]] = {path: {} for path in paths}
        for name, file in files.items():
            texts = [prompt.turns[0] for prompt in load_prompts(file, options.limit)]
            answers = greedy_answers(decoder, tokenizer, texts, options.max_tokens)
            for path, accelerator in accelerators.items():
                shares = agreement(decoder, accelerator, answers)
                found[path][name] = {"tokens": answers.num_new_tokens, "agreement": shares}
                print(json.dumps({"adapter": path.name, "suite": name, **found[path][name]}), flush=True)
        if options.card:
            for path, results in found.items():
                card = read_card(path)
                card["measured"] = measured(results, str(decoder.dtype).removeprefix("torch."))
                with replacing(path.with_suffix(".json")) as target:
                    target.write((json.dumps(card, indent=1) + "\n").encode())
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def agreement(decoder: Decoder, accelerator: Accelerator, answers: Sequences) -> list[float]:
    """Share of the answers' tokens that are drafted right, by draft position."""
    groups = in_groups(answers, EVALUATION_TOKENS if decoder.device.type == "cpu" else 8 * EVALUATION_TOKENS)
    objective = Objective(decoder, accelerator, TrainingConfig())
    return evaluate(objective, (Batch(cut(answers, rows)) for rows in groups))


def measured(found: dict[str, Any], dtype: str) -> dict[str, Any]:
    """As a card holds it."""
    tokens = ", ".join(f"{result['tokens']} of {name}" for name, result in found.items())
    return {
        "greedy_agreement_by_draft_position": {name: result["agreement"] for name, result in found.items()},
        "note": f"Share of tokens of the model's own greedy text ({tokens}) whose draft equals the model's choice, "
        f"in {dtype}.",
    }


def load(model: str, device: str) -> tuple[Decoder, Tokenizer]:
    """A model in a format that is measured in, and its tokenizer.

    Raises: as :func:`engine.hub.resolve` and :func:`engine.models.loader.load_decoder`.
    """
    from engine.loading import pick_device
    from engine.models.loader import load_decoder
    from engine.tokenizer import load_tokenizer

    device = pick_device(device)
    path = hub.resolve(model).path
    return load_decoder(path, "fp32" if device == "cpu" else "bf16", device), load_tokenizer(path)


def greedy_answers(decoder: Decoder, tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> Sequences:
    """The model's greedy answers to ``texts``; those of very long ones are left out."""
    encoded = (tokenizer.encode_chat([Message("user", text)]) for text in texts)
    prompts = sorted((ids for ids in encoded if len(ids) <= _MAX_PROMPT), key=len)
    parts = []
    for begin in range(0, len(prompts), _ROWS):
        rows = prompts[begin : begin + _ROWS]
        eos_ids = sorted(tokenizer.eos_ids)
        parts.append(generate_continuations(decoder, rows, [0.0] * len(rows), max_tokens, eos_ids))
    return Sequences.join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
