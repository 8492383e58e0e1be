"""The expert panel's inside as HTML of fixed layout: the heat map, the figures, and what is kept where."""

from __future__ import annotations

from html import escape

from app import telemetry
from app.expert_watch import ExpertView
from app.heat_map import heat_map, layers_across
from app.telemetry import Cell
from engine.experts.report import ExpertReport

_LEAST_WIDTH = 256  # pixels, for the words under a small map


def expert_panel(view: ExpertView | None) -> str:
    """The whole of it; empty where there is nothing to show."""
    if view is None:
        return ""
    figures = "".join(map(telemetry.show_cell, figure_cells(view)))
    scope = "This answer" if view.num_tokens is not None else "Since the model was loaded"
    return (
        f'<section class="experts" aria-label="Experts">{_map(view.report)}'
        f'<div class="expert-figures"><small>{scope}</small><div class="figures">{figures}</div></div>'
        f'<div class="expert-words"><p>{escape(plan_sentences(view.report))}</p>'
        f"<p>{ahead_sentence(view.report)}</p></div>"
        "</section>"
    )


def figure_cells(view: ExpertView) -> list[Cell]:
    """The six figures, always the same ones."""
    stats, report = view.stats, view.report
    held = sum(map(sum, report.resident))
    total = sum(map(len, report.resident))
    hits = (
        f"Of the experts chosen, those in memory already; {telemetry.percent(stats.in_place_share)} were computed straight "
        "from what the system keeps of the file in free memory"
    )
    room = f"Experts in memory now, and in all; there is room for {report.num_slots}"
    return [
        Cell("hit rate", telemetry.percent(stats.hit_rate), hits, 5),
        Cell("stalled", telemetry.percent(view.stall_share), "Of the decoding time, waiting for the disk", 5),
        Cell("loaded per token", _size(view.bytes_per_token), "Read from disk for each token of the answer", 7),
        Cell("in memory", f"{held}/{total}", room, 9),
        Cell(
            "prefetch precision", telemetry.percent(stats.prefetch_precision),
            "Of the experts loaded ahead of time, those that were used", 5,
        ),
        Cell(
            "prefetch recall", telemetry.percent(stats.prefetch_recall),
            "Of the loads that were needed, those begun ahead of time", 5,
        ),
    ]  # fmt: skip


def plan_sentences(report: ExpertReport) -> str:
    """What was planned, and what became of it."""
    if report.planned_slots is None or report.num_slots >= report.planned_slots:
        return report.plan
    return f"{report.plan} Memory has run short since, and there is room for {report.num_slots} experts now."


def ahead_sentence(report: ExpertReport) -> str:
    """Whether experts are loaded ahead of time."""
    if report.predictor is None:
        return "Nothing is loaded ahead of time."
    if report.prefetching:
        return "Experts that the next layer will probably choose are loaded ahead of time."
    return "Loading ahead of time has switched itself off, because it made this machine slower; it is tried again now and then."


def _map(report: ExpertReport) -> str:
    source, width, height = heat_map(report)
    held = sum(map(sum, report.resident))
    layers = f"{len(report.layers)} layers"
    experts = f"{len(report.resident[0])} experts"
    axes = (
        f"{layers} from left to right, {experts} each"
        if layers_across(report)
        else f"{layers} from top to bottom, {experts} each"
    )
    told = f"{axes}; {held} experts are in memory now."
    return (
        f'<figure style="width:{max(width, _LEAST_WIDTH)}px"><img src="{source}" width="{width}" height="{height}" decoding="sync" alt="{told}">'
        f"<figcaption>{axes}. <span><i class='full'></i> in memory,</span> "
        "<span><i class='dot'></i> on disk;</span> the stronger, the more often chosen.</figcaption></figure>"
    )


def _size(count: float | None) -> str:
    if count is None:
        return telemetry.EMPTY
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
