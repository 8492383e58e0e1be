"""The telemetry strip: figures from the engine's own counters, as HTML of fixed layout."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Cell:
    """One figure of a strip.

    Attributes:
        hint: what it means, as HTML text.
        width: characters to reserve.
        accelerated: shown in the accent colour.
    """

    name: str
    value: str
    hint: str
    width: int = 0
    accelerated: bool = False


def read_memory() -> Memory:
    """Look at the meters now."""
    from engine import hardware

    machine, gpu = hardware.machine_memory(), hardware.gpu_in_use()
    return Memory(
        hardware.process_memory(), machine.used, machine.total,
        gpu.used if gpu else None, gpu.total if gpu else None,
    )  # fmt: skip


def speed_strip(
    metrics: Any | None,
    speculation: Any | None = None,
    rates: Sequence[float] = (),
    accelerated: bool = False,
) -> str:
    """Speed of the running or last answer.

    Args:
        metrics: ``GenerationMetrics`` or None before the first answer.
        speculation: ``SpeculationState``: the plain rate measured on this machine, for the speedup.
        rates: recent tokens/s, for the plot.
        accelerated: whether the method drafts: what drafts did is shown then, and in the accent colour.
    """
    cells = [
        Cell("tokens/s", number(rate(metrics), 1), "Decoding rate, in the engine's own time", 5),
        Cell("first token", seconds(metrics.ttft if metrics else None), "Time to first token", 6),
        Cell("tokens", str(metrics.num_new_tokens) if metrics else EMPTY, "New tokens of this answer", 4),
    ]
    if accelerated:
        cells += [_speedup(metrics, speculation), *draft_cells(metrics)]
    plot = _sparkline(rates, accelerated)
    return f'<div class="strip" role="status">{"".join(map(show_cell, cells))}{plot}</div>'


def draft_cells(metrics: Any | None) -> list[Cell]:
    """What drafts did: acceptance rate, mean acceptance length, counts."""
    stats = metrics.speculation if metrics else None
    accepted, length, counts = EMPTY, EMPTY, EMPTY
    if stats is not None and stats.num_draft_tokens:
        accepted, length = percent(stats.acceptance_rate), number(stats.mean_acceptance_length, 2)
        counts = f"{stats.num_accepted_tokens}/{stats.num_draft_tokens}"
    return [
        Cell("accepted", accepted, "Acceptance rate: accepted / drafted tokens", 4, True),
        Cell("length", length, "Mean acceptance length: tokens per round", 4, True),
        Cell("drafts", counts, "Accepted / drafted tokens", 7, True),
    ]


def _speedup(metrics: Any | None, speculation: Any | None) -> Cell:
    """Speed against the plain rate, or that drafting is off at the moment; nothing where nothing has been drafted: what sets
    such an answer apart from those that the plain rate was measured with is its length."""
    hint, value = "Against plain decoding, not measured yet", EMPTY
    plain = speculation.plain_tokens_per_second if speculation is not None else None
    now = rate(metrics) if metrics and metrics.speculation.num_draft_tokens else None
    if plain:
        hint = f"Against plain decoding, measured on this machine at {plain:.1f} tokens/s"
        # A round runs all that a plain step runs, so it gains its tokens at most: plain steps are few, and most of them
        # at an answer's start, when the page is drawn as well.
        most = metrics.speculation.mean_acceptance_length if metrics else None
        value = f"{min(now / plain, most or math.inf):.2f}×" if now else EMPTY
    if speculation is not None and speculation.is_off:
        return Cell("speedup", "off", escape(speculation.reason or hint), 5)
    return Cell("speedup", value, hint, 5, True)


def machine_strip(info: Any | None, memory: Memory) -> str:
    """Model, format and memory: what stays the same while tokens stream."""
    cells = []
    if info is not None:
        kind = f"{info.weight_format} · {info.kernel} · {info.device}"
        cells += [
            Cell("", escape(info.name.rsplit("/", 1)[-1]), escape(info.name)),
            Cell("", escape(kind), "Weight format, kernels, device"),
            Cell("weights", _megabytes(info.weight_bytes), "Weights that one decoding step reads"),
        ]
    machine = f"{_gb(memory.machine_used)} / {_gb(memory.machine_total)} GB"
    cells += [
        Cell("app", _megabytes(memory.process), "Memory of this process"),
        Cell("machine", machine, "Memory of the machine in use"),
    ]
    if memory.gpu_used is not None and memory.gpu_total is not None:
        gpu = f"{_gb(memory.gpu_used)} / {_gb(memory.gpu_total)} GB"
        cells.append(Cell("GPU", gpu, "Memory of the GPU in use"))
    return f'<div class="strip quiet">{"".join(map(show_cell, cells))}</div>'


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


def remark(sentence: str, short: bool = False) -> str:
    """What is good to know beside a setting; ``short`` of memory: marked, also without colour."""
    kind = "fit short" if short else "fit"
    return f'<p class="{kind}" role="status">{escape(sentence)}</p>'


def rate(metrics: Any | None) -> float | None:
    """Tokens/s of an answer; None before there is one."""
    return metrics.tokens_per_second if metrics else None


def show_cell(cell: Cell) -> str:
    """A figure with its name; the figure's width is reserved, so that nothing moves."""
    label = f"<small>{cell.name}</small>" if cell.name else ""
    kind = "cell accelerated" if cell.accelerated else "cell"
    width = f' style="min-width:{cell.width}ch"' if cell.width else ""
    return f'<span class="{kind}" title="{cell.hint}"><b{width}>{cell.value}</b>{label}</span>'


def _sparkline(rates: Sequence[float], accelerated: bool) -> str:
    recent = list(rates)[-40:]
    if len(recent) < 2:
        return ""
    top = max(recent) or 1.0
    points = " ".join(
        f"{i * 96 / (len(recent) - 1):.1f},{22 - 20 * r / top:.1f}" for i, r in enumerate(recent)
    )
    kind = "spark accelerated" if accelerated else "spark"
    return (
        f'<svg class="{kind}" viewBox="0 0 96 24" preserveAspectRatio="none" role="img" aria-label="Tokens per second, recent rounds">'
        f'<polyline points="{points}"/></svg>'
    )


def number(value: float | None, digits: int) -> str:
    """With so many digits behind the point, or a dash."""
    return EMPTY if value is None else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """Milliseconds below a second, or a dash."""
    if value is None:
        return EMPTY
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def percent(value: float | None) -> str:
    """Whole per cent, or a dash."""
    return EMPTY if value is None else f"{100 * value:.0f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
