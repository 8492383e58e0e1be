"""The tables of README and of the findings, written from the raw reports alone.

Run as ``python -m engine.evaluation.readme``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation.report import markdown_table
from engine.evaluation.statistics import Sample, paired_ratios, quantile, quartiles
from engine.experts.tables import experts_table, scale_table

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- results: filled from assets/results, by nothing but measurement -->\n"
END = "<!-- end of results -->"
_LINKS = ("pcie4x16", "slower-links", "large")  # the expert benchmark's reports
_BEST = ("m2r2", "lookup", "stream", "plain")  # the first that was measured is told
_SUMMARY = ("model", "prompts", "weights", "plain tok/s", "drafting tok/s", "to plain (quartiles)", "tokens a round",
            "plain, drafting to llama.cpp")  # fmt: skip


def fill(readme: str, folder: Path) -> str:
    """``readme`` with its summary written anew from the reports in ``folder``."""
    return _between(readme, BEGIN, summary(folder), END)


def fill_findings(findings: str, folder: Path) -> str:
    """``findings`` (assets/results/README.md) with its tables written anew from the reports in ``folder``."""
    experts = "\n".join(experts_table(_read(folder / f"experts-{name}.json")) for name in _LINKS)
    for name, table in (
        ("bench tables", bench_tables(folder)),
        ("expert tables", experts),
        ("scale table", scale_table(_read(folder / "scale.json"))),
        ("busy table", busy_table(_read(folder / "busy-cores.json"))),
        ("vocabulary table", vocabulary_table(_read(folder / "draft-vocabulary.json"))),
    ):
        findings = _between(findings, f"<!-- {name} -->\n", table, f"<!-- end of {name} -->")
    return findings


def _between(text: str, begin: str, content: str, end: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}{content}{end}{rest.split(end)[1]}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def bench_tables(folder: Path) -> str:
    """A heading and a table for each ``bench-*.json``, by name."""
    return "".join(_report(path) for path in _reports(folder))


def vocabulary_table(report: Mapping[str, Any]) -> str:
    """Agreement in per cent at the first and the third draft, by size and suite, and what can be drafted at all."""
    rows: Sequence[Mapping[str, Any]] = report["rows"]
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    kinds = dict.fromkeys((row["size"], row["with_text"]) for row in rows)
    lines = [f"| most frequent | those of the text, too | {' | '.join(suites)} | can be drafted |"]
    lines.append("| --- " * (len(suites) + 3) + "|")
    for size, with_text in kinds:
        own = [row for row in rows if (row["size"], row["with_text"]) == (size, with_text)]
        shares = [row["agreement_by_draft_position"] for row in own]
        cells = [f"{100 * first:.1f}, {100 * third:.1f}" for first, _, third in shares]
        covered = sorted(100 * row["covered"] for row in own)
        cells.append(f"{covered[0]:.0f} to {covered[-1]:.0f} %")
        lines.append(f"| {size} | {'yes' if with_text else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def busy_table(report: Mapping[str, Any]) -> str:
    """Steps per second beside so many busy processes, with the quartiles of the ratios to all threads."""
    ways = [name for name in report["rows"][0] if name != "busy processes"]
    lines = [["busy processes", *ways], ["---"] * (1 + len(ways))]
    for row in report["rows"]:
        found = [(row[name]["steps_per_second"], *row[name]["ratio"]) for name in ways]
        told = [
            f"{rate:.0f}, **{middle:.2f}** ({low:.2f} to {high:.2f})" for rate, low, middle, high in found
        ]
        lines.append([str(row["busy processes"]), *told])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(folder: Path) -> str:
    """One table of all ``bench-*.json``: in each weight format the method that drafts most, beside plain decoding."""
    lines = [" | ".join(_SUMMARY), " | ".join("---" for _ in _SUMMARY)]
    rows = [cells for path in _reports(folder) for cells in _summary_rows(_read(path))]
    lines += [" | ".join(cells) for cells in sorted(rows, key=lambda cells: cells[0])]  # by model
    return "\n".join(f"| {line} |" for line in lines) + "\n\n"


def _reports(folder: Path) -> list[Path]:
    return sorted(folder.glob("bench-*.json"))


def _summary_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows, settings = report["rows"], report["settings"]
    what = [_model(rows), f"{settings['suite']}, {rows[0]['num_prompts']} of {_length(settings)} tokens"]
    what[1] += f", {_sampling(settings)}" if _sampling(settings) != "greedy" else ""
    what[1] += f", {_where(report)}" if _on_gpu(rows) else f", {_cpu(report)}{_apart(report)}"
    ours, found = [row for row in rows if not row["peer"]], []
    for weights in dict.fromkeys(row["format"] for row in ours):
        lanes = {row["method"]: row for row in ours if row["format"] == weights}
        plain, best = lanes["plain"], next(lanes[name] for name in _BEST if name in lanes)
        to_peer = f"{plain['ratio']:.2f}, {best['ratio']:.2f}" if best["baseline"] == "llama.cpp" else "-"
        found.append(
            [
                *what, weights, f"{plain['tokens_per_second']:.0f}", f"{best['tokens_per_second']:.0f} ({best['method']})",
                _paired(best, report["samples"]), f"{best['mean_acceptance_length']:.2f}", to_peer,
            ]
        )  # fmt: skip
    return found


def _report(path: Path) -> str:
    report = _read(path)
    rows, settings = report["rows"], report["settings"]
    title = (
        f"**{_model(rows)}**, {settings['suite']}, {rows[0]['num_prompts']} prompts, {_length(settings)} new tokens, "
        f"{_sampling(settings)}; {_where(report)}; ratios to {rows[0]['baseline']} ([raw]({path.name}))"
    )
    lines = [title, "", markdown_table(rows), ""]
    speedups = [
        f"{row['lane']} {_paired(row, report['samples'])}"
        for row in rows
        if row["method"] not in (None, "plain") and f"plain/{row['format']}" in report["samples"]
    ]
    if speedups:
        lines += [f"To plain in the same format, prompt by prompt: {'; '.join(speedups)}.", ""]
    return "\n".join([*lines, ""])


def _model(rows: Sequence[Mapping[str, Any]]) -> str:
    return str(next(row["model"] for row in rows).rsplit("/", 1)[-1])


def _length(settings: Mapping[str, Any]) -> str:
    """Of the answers; reports without the setting are of a time when all were as long."""
    return f"{'' if settings.get('ignore_eos', True) else 'up to '}{settings['max_tokens']}"


def _sampling(settings: Mapping[str, Any]) -> str:
    found = [f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"]
    found += [f"top-p {settings['top_p']:g}"] if settings.get("top_p", 1.0) < 1 else []
    penalty = settings.get("repetition_penalty", 1.0)
    return ", ".join([*found, f"repetition penalty {penalty:g}"] if penalty != 1.0 else found)


def _on_gpu(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any((row.get("device") or "cpu") != "cpu" for row in rows)


def _where(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    if _on_gpu(report["rows"]):
        return str(machine["gpus"][0]["name"])
    return f"{_cpu(report)}, {report['settings']['threads']} threads{_apart(report)}"


def _cpu(report: Mapping[str, Any]) -> str:
    return re.sub(r"\((R|TM)\)| Processor", "", report["machine"]["cpu"])


def _apart(report: Mapping[str, Any]) -> str:
    found = report["machine"].get("core_to_core_ns")
    return f", cores {found['median']:.0f} ns apart" if found else ""


def _paired(row: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    """Median and quartiles of the ratios to plain decoding in the same format, prompt by prompt."""
    mine, theirs = (
        {
            prompt: Sample(**{**fields, "token_ids": tuple(fields["token_ids"])})
            for prompt, fields in samples[lane].items()
        }
        for lane in (row["lane"], f"plain/{row['format']}")
    )
    ratios = paired_ratios(mine, theirs)
    low, high = quartiles(ratios) or (0.0, 0.0)
    return f"**{quantile(ratios, 0.5):.2f}** ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    results = ROOT / "assets" / "results"
    for path, written in ((ROOT / "README.md", fill), (results / "README.md", fill_findings)):
        path.write_text(written(path.read_text(encoding="utf-8"), results), encoding="utf-8")
