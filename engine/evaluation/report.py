"""Reports: a table for the console and a Markdown table from JSON reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADINGS = ("lane", "tok/s (quartiles)", "ratio (quartiles)", "first token", "accepted", "per round",
            "identical", "memory", "bandwidth")  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row's figures as text; a dash where one does not apply."""
    return [
        str(row["lane"]),
        _with_spread(row["tokens_per_second"], row["spread"], 1),
        _with_spread(row["ratio"], row["ratio_spread"], 2),
        _scaled(row["ttft"], 1000, "{:.0f} ms"),
        _scaled(row["acceptance_rate"], 100, "{:.0f} %"),
        _scaled(row["mean_acceptance_length"], 1, "{:.2f}"),
        _scaled(row["identical_share"], 100, "{:.0f} %"),
        _scaled(row["peak_memory_mb"], 1, "{:.0f} MB"),
        _scaled(row["bandwidth_share"], 100, "{:.0f} %"),
    ]


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns for the console."""
    table = [list(HEADINGS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same for README."""
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS), *(" | ".join(cells(r)) for r in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _scaled(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else form.format(value * factor)


def _with_spread(value: float | None, spread: Sequence[float] | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return f"{text} ({spread[0]:.{digits}f} to {spread[1]:.{digits}f})" if spread else text
