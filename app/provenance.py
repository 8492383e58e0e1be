"""Which words of a chat were drafted: handed to the page, whose script tints them (``static/provenance.js``).

Tinting uses the browser's highlights over the text as it is rendered, so markdown, selection and copying
stay as they are. The script aligns the answer's source with the rendered text word by word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from app.chats import StoredMessage

SWITCH = "(on) => { window.slipstreamTint?.(on); }"  # what the settings' switch calls


def as_html(messages: Sequence[StoredMessage]) -> str:
    """Of every answer in order: its source and the character ranges that were drafted, or null."""
    answers = [message for message in messages if message.role == "assistant"]
    if not any(answer.details.get("drafted") for answer in answers):
        return ""
    told = [
        {"text": answer.content, "drafted": answer.details["drafted"]}
        if answer.details.get("drafted")
        else None
        for answer in answers
    ]
    return f'<i hidden data-answers="{escape(json.dumps(told, ensure_ascii=False))}"></i>'


def script() -> str:
    """The script as an element for the page's head."""
    source = (Path(__file__).parent / "static" / "provenance.js").read_text(encoding="utf-8")
    return f"<script>{source}</script>"
