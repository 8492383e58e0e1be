"""Prompt suites: JSON Lines files with one prompt per line (``id``, ``suite``, ``turns``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRequestError

PROMPTS_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "prompts"
SUITES = {
    "mt_bench": "mt_bench.jsonl",
    "koala": "koala.jsonl",
    "self_instruct": "self_instruct_user.jsonl",
    "wizardlm": "wizardlm.jsonl",
    "spec_bench": "spec_bench.jsonl",
}


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt; benchmarks use the first of its turns."""

    id: str
    suite: str
    turns: tuple[str, ...]


def suite_path(suite: str) -> Path:
    """File of a named suite.

    Raises:
        InvalidRequestError: no such suite, or it is not shipped.
    """
    if suite not in SUITES:
        raise InvalidRequestError(f"Unknown suite {suite!r}; choose one of {', '.join(SUITES)}.")
    path = PROMPTS_FOLDER / SUITES[suite]
    if not path.is_file():
        raise InvalidRequestError(
            f"The suite {suite} is not shipped (its licence may not allow it); give its file with --prompts."
        )
    return path


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of ``path``, evenly spread over the file if there are more than ``limit``.

    Raises:
        InvalidRequestError: the file is missing, empty, or has a broken line (named by its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InvalidRequestError(f"There is no prompts file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The prompts file {path} cannot be read: {error}.") from None
    prompts = [
        _parse(line, f"Line {number} of {path.name}", path.stem, number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InvalidRequestError(f"The prompts file {path} has no prompts.")
    return spread_out(prompts, limit)


def spread_out(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """``limit`` prompts at even distances, so that a short run still sees every category."""
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def _parse(line: str, where: str, suite: str, number: int) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"{where} is not valid JSON: {error.msg}.") from None
    turns = record.get("turns") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        raise InvalidRequestError(f"{where} needs 'turns', a list of texts that are not empty.")
    return Prompt(str(record.get("id", number)), str(record.get("suite", suite)), tuple(turns))
