"""README's results, written from the raw reports alone. Run as ``python -m engine.evaluation.readme``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation.report import markdown_table
from engine.evaluation.statistics import Sample, paired_ratios, quantile, quartiles

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- results: filled from assets/results, by nothing but measurement -->\n"
END = "<!-- end of results -->"


def fill(readme: str, folder: Path) -> str:
    """``readme`` with its results section written anew from the reports in ``folder``."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}{results_section(folder)}{END}{rest.split(END)[1]}"


def results_section(folder: Path) -> str:
    """A heading and a table for each ``bench-*.json``, by name."""
    return "".join(_report(path) for path in sorted(folder.glob("bench-*.json")))


def _report(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    rows, settings, machine = report["rows"], report["settings"], report["machine"]
    model = next(row["model"] for row in rows).rsplit("/", 1)[-1]
    sampling = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    title = (
        f"**{model}**, {settings['suite']}, {rows[0]['num_prompts']} prompts, {settings['max_tokens']} new tokens, "
        f"{sampling}; {machine['cpu']}, {settings['threads']} threads; ratios to {rows[0]['baseline']} "
        f"([raw](assets/results/{path.name}))"
    )
    lines = [title, "", markdown_table(rows), ""]
    if speedups := _speedups(rows, report["samples"]):
        lines += [f"m2r2 over plain in the same format, prompt by prompt: {'; '.join(speedups)}.", ""]
    return "\n".join([*lines, ""])


def _speedups(rows: Sequence[Mapping[str, Any]], samples: Mapping[str, Any]) -> list[str]:
    """Median and quartiles of the paired ratios."""
    texts = []
    for row in rows:
        plain = f"plain/{row['lane'].split('/')[-1]}"
        if row["method"] != "m2r2" or plain not in samples:
            continue
        mine, theirs = (
            {
                prompt: Sample(**{**fields, "token_ids": tuple(fields["token_ids"])})
                for prompt, fields in samples[lane].items()
            }
            for lane in (row["lane"], plain)
        )
        ratios = paired_ratios(mine, theirs)
        low, high = quartiles(ratios) or (0.0, 0.0)
        texts.append(f"{row['format']} **{quantile(ratios, 0.5):.2f}** ({low:.2f} to {high:.2f})")
    return texts


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8"), ROOT / "assets" / "results"), encoding="utf-8")
