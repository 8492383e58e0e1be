"""The tables of README and of the findings, written from the raw reports alone.

Run as ``python -m engine.evaluation.readme``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation.report import markdown_table
from engine.evaluation.statistics import Sample, paired_ratios, quantile, quartiles
from engine.experts.tables import experts_table, scale_table

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- results: filled from assets/results, by nothing but measurement -->\n"
END = "<!-- end of results -->"
_LINKS = ("pcie4x16", "slower-links")  # the expert benchmark's reports


def fill(readme: str, folder: Path) -> str:
    """``readme`` with its results section written anew from the reports in ``folder``."""
    return _between(readme, BEGIN, results_section(folder), END)


def fill_findings(findings: str, folder: Path) -> str:
    """``findings`` (assets/results/README.md) with its tables of experts written anew from the reports in ``folder``."""
    experts = "\n".join(experts_table(_read(folder / f"experts-{name}.json")) for name in _LINKS)
    for name, table in (
        ("expert tables", experts),
        ("scale table", scale_table(_read(folder / "scale.json"))),
    ):
        findings = _between(findings, f"<!-- {name} -->\n", table, f"<!-- end of {name} -->")
    return findings


def _between(text: str, begin: str, content: str, end: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}{content}{end}{rest.split(end)[1]}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def results_section(folder: Path) -> str:
    """A heading and a table for each ``bench-*.json``, by name."""
    return "".join(_report(path) for path in sorted(folder.glob("bench-*.json")))


def _report(path: Path) -> str:
    report = _read(path)
    rows, settings, machine = report["rows"], report["settings"], report["machine"]
    model = next(row["model"] for row in rows).rsplit("/", 1)[-1]
    sampling = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    on_gpu = any((row.get("device") or "cpu") != "cpu" for row in rows)
    where = machine["gpus"][0]["name"] if on_gpu else f"{machine['cpu']}, {settings['threads']} threads"
    title = (
        f"**{model}**, {settings['suite']}, {rows[0]['num_prompts']} prompts, {settings['max_tokens']} new tokens, "
        f"{sampling}; {where}; ratios to {rows[0]['baseline']} "
        f"([raw](assets/results/{path.name}))"
    )
    lines = [title, "", markdown_table(rows), ""]
    if speedups := _speedups(rows, report["samples"]):
        lines += [f"To plain in the same format, prompt by prompt: {'; '.join(speedups)}.", ""]
    return "\n".join([*lines, ""])


def _speedups(rows: Sequence[Mapping[str, Any]], samples: Mapping[str, Any]) -> list[str]:
    """Median and quartiles of the paired ratios."""
    texts = []
    for row in rows:
        plain = f"plain/{row['lane'].split('/')[-1]}"
        if row["method"] in (None, "plain") or plain not in samples:
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
        texts.append(f"{row['lane']} **{quantile(ratios, 0.5):.2f}** ({low:.2f} to {high:.2f})")
    return texts


if __name__ == "__main__":
    results = ROOT / "assets" / "results"
    for path, written in ((ROOT / "README.md", fill), (results / "README.md", fill_findings)):
        path.write_text(written(path.read_text(encoding="utf-8"), results), encoding="utf-8")
