"""The measurements of experts as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHARES = ("hit_rate", "prefetch_precision", "prefetch_recall", "stall_share", "identical_share")


def experts_table(report: Mapping[str, Any]) -> str:
    """A report of :mod:`engine.experts.benchmark`: one table per link and cache size."""
    lines: list[str] = []
    for setting in report["settings"]:
        lines += [
            f"**{setting['link']}**, {report['format']}, experts of {report['expert_bytes'] / 1e3:.0f} KB (a layer's experts take {setting['weight']:.1f} times as long to load as the layer to "
            f"compute; {setting['bandwidth'] / 1e6:.0f} MB/s here), {setting['cache_percent']} % of the experts in memory",
            "",
            "| lane | tok/s | to on-demand | to LRU | to oracle | to resident | KB/token | hits | precision | recall | "
            "stalls | same text |",
            "|" + " --- |" * 12,
        ]
        for row in setting["rows"]:
            cells = [
                row["lane"], f"{row['tokens_per_second']:.1f}",
                *(_ratio(row[key]) for key in ("to_on_demand", "to_lru", "to_oracle", "to_resident")),
                f"{row['bytes_per_token'] / 1e3:.0f}",
                *(_percent(row[key]) for key in _SHARES),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def scale_table(report: Sequence[Mapping[str, Any]]) -> str:
    """A report of :mod:`engine.experts.scale`: a row for each shape, or each lane of one."""
    lines = [
        "| shape | machine | lane | budget | plan | peak memory | in memory | tok/s | MB/token | hits | precision | recall | "
        "stalls |",
        "|" + " --- |" * 13,
    ]
    for row in report:
        cells = [
            row["shape"], row["machine"], row["lane"] + (", no file cache" if row["direct"] else ""),
            *(f"{row[key] / 1e9:.2f} GB" for key in ("budget", "plan")),
            # of lanes that ran in turns, each had slots of its own
            f"{row['peak_memory'] / 1e9:.2f} GB" if row["lanes_in_peak"] == 1 else "-",
            f"{row['num_slots']} of {row['num_experts']}",
            f"{row['tokens_per_second']:.2f}", f"{row['bytes_per_token'] / 1e6:.0f}",
            *(_percent(row[key]) for key in _SHARES[:-1]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ratio(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
