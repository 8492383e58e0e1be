"""The side panel's part that trains what makes the loaded model faster, where it has no such thing yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from app import telemetry
from app.engine_host import EngineHost
from app.training import Training

if TYPE_CHECKING:
    from engine.session import Trainable

_DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_TICK_SECONDS = 1.0
_ABOUT = {
    "drafts": "Nothing drafts for this model yet but matches in the text. It can learn to draft for itself: it writes text "
    "on this machine, and small adapters are trained on that. This takes from half an hour to a night, by the model's "
    "size; it can be stopped at any time and goes on from there, and you can chat meanwhile.",
    "experts": "Which experts this model wants next is guessed by its own routers. Maps that are fitted to it on this "
    "machine name more of them ahead of time. This takes from a minute to an hour, by the model's size; it can be stopped "
    "at any time and goes on from there.",
}  # fmt: skip
_START, _STOP, _USE = "Train", "Stop training", "Use it now"


@dataclass(frozen=True)
class _View:
    """What the panel shows: HTML, and the button's label."""

    text: str
    button: str


class TrainingPanel:
    """The panel's components and their handlers.

    Attributes:
        outputs: the components that :meth:`shown` is for.
        loads, begun: an event that loads the model anew if ``begun`` says so.
    """

    def __init__(self, host: EngineHost, training: Training) -> None:
        self._host, self._training = host, training
        with gr.Accordion("Make this model faster", open=False, visible=False, elem_id="training") as frame:
            line = gr.HTML("", apply_default_css=False, js_on_load=None, elem_id="training-state")
            button = gr.Button(_START, size="sm", variant="secondary", elem_id="train")
        timer, self.begun = gr.Timer(_TICK_SECONDS, active=False), gr.State(False)
        self.outputs = [frame, line, button, timer]
        timer.tick(self.shown, None, self.outputs, **_DIRECT)
        self.loads = button.click(self._on_click, None, [self.begun, *self.outputs], **_DIRECT)

    def shown(self) -> list[Any]:
        """Where things stand, for ``outputs``."""
        state = self._training.state
        view = self._view()
        if view is None:
            return [gr.Accordion(visible=False), "", gr.skip(), gr.Timer(active=False)]
        return [
            gr.Accordion(visible=True), view.text, gr.Button(view.button, interactive=state.stage != "stopping"),
            gr.Timer(active=state.is_under_way),
        ]  # fmt: skip

    def _view(self) -> _View | None:
        state, what = self._training.state, self._what
        if state.is_under_way:
            return _View(telemetry.loading_strip(state.message, state.share), _STOP)
        if what is None:
            return None
        if state.source != self._host.choice.source or state.stage == "idle":
            return _View(telemetry.remark(_ABOUT[what]), _START)
        if state.stage == "failed":
            return _View(telemetry.notice(state.message, "error"), _START)
        return _View(telemetry.remark(state.message), _USE if state.stage == "done" else _START)

    @property
    def _what(self) -> Trainable | None:
        session = self._host.loaded
        found: Trainable | None = None if session is None else session.trainable()
        return found

    def _on_click(self) -> list[Any]:
        """Begin, stop, or use what has been trained."""
        training, choice, what = self._training, self._host.choice, self._what
        if training.state.is_under_way:
            training.stop()
        elif (view := self._view()) is not None and view.button == _USE:
            self._host.start()
            return [True, *self.shown()]
        elif what is not None:
            training.start(choice.source, what, choice.memory)
        return [False, *self.shown()]
