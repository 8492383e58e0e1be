"""The expert panel of the chat page: who has it open, and what it shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from app.engine_host import EngineHost
from app.expert_view import expert_panel
from app.expert_watch import ExpertView

_DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class ExpertPanel:
    """Builds the panel into the present container, closed and hidden: it is there for models whose experts are not
    all in memory. Nothing is drawn for those who have it closed.

    Attributes:
        frame: the component that is shown or not, see :meth:`shown`.
        body: the component that an answer's :meth:`draw` goes to.
    """

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._open: set[str] = set()  # browser sessions
        self._last: dict[
            str, tuple[Any, ExpertView]
        ] = {}  # by browser session: its latest answer, and which model's
        with gr.Accordion(
            "Experts in memory and on disk", open=False, visible=False, elem_id="experts"
        ) as self.frame:
            self.body = gr.HTML("", apply_default_css=False, js_on_load=None, elem_id="expert-body")
        self.frame.expand(self._on_open, None, self.body, **_DIRECT)
        self.frame.collapse(self._on_close, None, None, **_DIRECT)

    def draw(self, owner: str, view: ExpertView | None) -> Any:
        """The body's next content while ``owner`` is answered."""
        session = self._host.loaded
        if view is None or session is None:
            return gr.skip()
        self._last[owner] = session.info, view
        return expert_panel(view) if owner in self._open else gr.skip()

    def shown(self, owner: str) -> tuple[Any, Any]:
        """Frame and body for the model that is there now."""
        view = self._view(owner)
        body = expert_panel(view) if owner in self._open else gr.skip()
        return gr.Accordion(visible=view is not None), body

    def forget(self, owner: str) -> None:
        """The page was closed."""
        self._open.discard(owner)
        self._last.pop(owner, None)

    def _view(self, owner: str) -> ExpertView | None:
        """What memory holds now, with the counters of the latest answer, if this model gave it."""
        session = self._host.loaded
        report = None if session is None else session.experts()
        if report is None:
            return None
        info, last = self._last.get(owner, (None, None))
        if last is None or info is not session.info:
            return ExpertView(report, report.stats)
        return replace(last, report=report)

    def _on_open(self, request: gr.Request) -> str:
        self._open.add(request.session_hash or "")
        return expert_panel(self._view(request.session_hash or ""))

    def _on_close(self, request: gr.Request) -> None:
        self._open.discard(request.session_hash or "")
