"""The telemetry strip: figures from the engine's own counters, as HTML of fixed layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

EMPTY = "–"


@dataclass(frozen=True)
class Memory:
    """Bytes in use, for the meters; ``gpu`` only where there is one."""

    process: int
    machine_used: int
    machine_total: int
    gpu_used: int | None = None
    gpu_total: int | None = None


def read_memory() -> Memory:
    """Look at the meters now."""
    from engine import hardware

    machine, gpu = hardware.machine_memory(), hardware.gpu_memory()
    return Memory(
        hardware.process_memory(), machine.used, machine.total,
        gpu.used if gpu else None, gpu.total if gpu else None,
    )  # fmt: skip


def speed_strip(metrics: Any | None, plain_rate: float | None = None, rates: Sequence[float] = ()) -> str:
    """Speed of the running or last answer.

    Args:
        metrics: ``GenerationMetrics`` or None before the first answer.
        plain_rate: tokens/s of plain decoding measured on this machine; with drafts, the speedup is shown.
        rates: recent tokens/s, for the plot.
    """
    rate = metrics.tokens_per_second if metrics else None
    cells = [
        ("tokens/s", _number(rate, 1), "Decoding rate, in the engine's own time"),
        ("first token", _seconds(metrics.ttft if metrics else None), "Time to first token"),
        ("tokens", str(metrics.num_new_tokens) if metrics else EMPTY, "New tokens of this answer"),
    ]
    stats = metrics.speculation if metrics else None
    if stats is not None and stats.num_draft_tokens:
        speedup = rate / plain_rate if rate and plain_rate else None
        cells += [
            ("accepted", _percent(stats.acceptance_rate), "Acceptance rate: accepted / drafted tokens"),
            ("length", _number(stats.mean_acceptance_length, 2), "Mean acceptance length: tokens per round"),
            ("drafts", f"{stats.num_accepted_tokens}/{stats.num_draft_tokens}", "Accepted / drafted tokens"),
            ("speedup", f"{speedup:.2f}×" if speedup else EMPTY, "Against plain decoding on this machine"),
        ]
    return f'<div class="strip" role="status">{"".join(map(_cell, cells))}{_sparkline(rates)}</div>'


def machine_strip(info: Any | None, memory: Memory, method: str = "plain") -> str:
    """Model, format and memory: what stays the same while tokens stream."""
    cells = []
    if info is not None:
        kind = f"{info.weight_format} · {info.kernel} · {info.device}"
        cells += [
            ("", escape(info.name.rsplit("/", 1)[-1]), escape(info.name)),
            ("", escape(kind), "Weight format, kernels, device"),
            ("", escape(method), "Decoding method"),
            ("weights", _megabytes(info.weight_bytes), "Weights that one decoding step reads"),
        ]
    cells += [
        ("app", _megabytes(memory.process), "Memory of this process"),
        (
            "machine",
            f"{_gb(memory.machine_used)} / {_gb(memory.machine_total)} GB",
            "Memory of the machine in use",
        ),
    ]
    if memory.gpu_used is not None and memory.gpu_total is not None:
        cells.append(
            ("GPU", f"{_gb(memory.gpu_used)} / {_gb(memory.gpu_total)} GB", "Memory of the GPU in use")
        )
    return f'<div class="strip quiet">{"".join(map(_cell, cells))}</div>'


def loading_strip(message: str, share: float | None) -> str:
    """What is being waited for, and how much is left."""
    width = f"{100 * share:.0f}%" if share is not None else "100%"
    kind = "bar" if share is not None else "bar unknown"
    return (
        f'<div class="loading" role="status"><span>{escape(message)}</span>'
        f'<div class="{kind}"><i style="width:{width}"></i></div></div>'
    )


def notice(sentence: str, kind: str = "info") -> str:
    """One sentence for the user, above the composer."""
    return f'<div class="notice {kind}" role="alert">{escape(sentence)}</div>' if sentence else ""


def _cell(cell: tuple[str, str, str]) -> str:
    name, value, hint = cell
    label = f"<small>{name}</small>" if name else ""
    return f'<span class="cell" title="{hint}"><b>{value}</b>{label}</span>'


def _sparkline(rates: Sequence[float]) -> str:
    recent = list(rates)[-40:]
    if len(recent) < 2:
        return ""
    top = max(recent) or 1.0
    points = " ".join(
        f"{i * 96 / (len(recent) - 1):.1f},{22 - 20 * r / top:.1f}" for i, r in enumerate(recent)
    )
    return (
        f'<svg class="spark" viewBox="0 0 96 24" role="img" aria-label="Tokens per second, recent rounds">'
        f'<polyline points="{points}"/></svg>'
    )


def _number(value: float | None, digits: int) -> str:
    return EMPTY if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return EMPTY
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _percent(value: float | None) -> str:
    return EMPTY if value is None else f"{100 * value:.0f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
