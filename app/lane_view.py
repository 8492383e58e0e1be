"""One lane of a comparison as HTML: figures of fixed layout, then the text as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from app import telemetry
from app.telemetry import Cell
from engine.requests import FinishReason, Piece, Provenance

_ENDS = {
    FinishReason.STOP: "finished",
    FinishReason.LENGTH: "reached the token limit",
    FinishReason.CONTEXT: "context full",
    FinishReason.CANCELLED: "stopped",
}


def lane_card(name: str, run: Any | None, accelerated: bool) -> str:
    """The whole lane.

    Args:
        run: ``LaneRun``; None before the race.
        accelerated: whether its method drafts: in the accent colour, accepted drafts tinted.
    """
    metrics = run.metrics if run is not None else None
    total = metrics.prefill_seconds + metrics.decode_seconds if metrics else None
    cells = [
        Cell("tokens/s", telemetry.number(telemetry.rate(metrics), 1), "Decoding rate, in its own time", 5),
        Cell("first token", telemetry.seconds(metrics.ttft if metrics else None), "Time to first token", 6),
        Cell("engine time", telemetry.seconds(total), "Prompt and decoding, its own turns alone", 6),
    ]
    cells += telemetry.draft_cells(metrics)
    figures = "".join(map(telemetry.show_cell, cells))
    kind = "lane accelerated" if accelerated else "lane"
    return (
        f'<section class="{kind}" aria-label="{escape(name)}">'
        f"<header><h3>{escape(name)}</h3><small>{_stage(run)}</small></header>"
        f'<div class="figures">{figures}</div>'
        f'<div class="lane-text" tabindex="0"><div>{_text(run.pieces if run is not None else ())}</div></div></section>'
    )


def _stage(run: Any | None) -> str:
    if run is None:
        return ""
    if run.error:
        return "broke off"
    tokens = f"{len(run.pieces)} tokens"
    return f"{tokens}, {_ENDS[run.finish_reason]}" if run.finish_reason else tokens


def _text(pieces: Sequence[Piece]) -> str:
    """Escaped text, accepted drafts marked; neighbours of one kind share an element."""
    parts: list[str] = []
    marked, current = False, ""
    for piece in pieces:
        drafted = piece.provenance is Provenance.DRAFTED
        if drafted != marked and piece.text:
            parts.append(_span(current, marked))
            marked, current = drafted, ""
        current += piece.text
    parts.append(_span(current, marked))
    return "".join(parts)


def _span(text: str, drafted: bool) -> str:
    """The mark begins and ends at a word: a space has no underline."""
    words = text.strip()
    if not drafted or not words:
        return escape(text)
    before, after = text.split(words, 1) if text != words else ("", "")
    return f'{before}<span class="drafted">{escape(words)}</span>{after}'
