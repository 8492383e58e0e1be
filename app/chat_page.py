"""The chat page: what is on it, and what each click does. The work itself is in ``conversation``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from app import methods, provenance, telemetry
from app.chats import ChatStore, StoredMessage
from app.conversation import stream_answer
from app.engine_host import EngineHost
from app.expert_panel import ExpertPanel
from app.model_panel import ModelPanel, build_model_choice, format_choice
from app.preferences import PreferenceFile
from app.settings_panel import build_settings, read_settings, sampling_shown
from app.training import Training
from app.training_panel import TrainingPanel
from engine.errors import SlipstreamError

EXAMPLES = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that checks whether a word is a palindrome.",
    "Plan a relaxed Saturday in a small town, hour by hour.",
)
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
_WELCOME = "# Slipstream\nA model on this machine. Nothing you write leaves it."
_SEND, _STOP = "Send", "Stop"  # words: gradio's icons have no name for screen readers
_TICK_SECONDS = 2.0
_LOADING_TICK_SECONDS = 0.4
_MAX_MESSAGE = 100_000  # characters; longer ones do not fit any context

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
DIRECT: dict[str, Any] = {**QUIET, "queue": False}  # answered at once, also while an answer is streaming

StoreOf = Callable[[str], ChatStore]  # the chats of a browser session


class ChatPage:
    """Builds the page's components into the present ``gr.Blocks`` and holds their handlers.

    Args:
        store_of: the chat store of a browser session: one for all on a desktop, one each in a Space.
        private: whether one person owns this machine, and so may choose models.
    """

    def __init__(
        self, host: EngineHost, store_of: StoreOf, preferences: PreferenceFile, private: bool
    ) -> None:
        self._host, self._store_of, self._preferences = host, store_of, preferences
        self._told_off: dict[str, str] = {}  # by browser session: why acceleration is off, as last told
        self._build(preferences, private)

    def _build(self, preferences: PreferenceFile, private: bool) -> None:
        self._chat = gr.State(None)  # id of the open chat; None before its first message
        with gr.Sidebar("Chats", position="left", open=False, width=280, elem_id="chats"):
            new_chat = gr.Button("New chat", size="sm", elem_id="new-chat")
            self._chat_list = gr.Radio(
                choices=[], label="Chats", show_label=False, container=False, elem_id="chat-list"
            )
            with gr.Accordion("Rename or delete", open=False, visible=False) as self._manage:
                title = gr.Textbox(
                    label="Title", show_label=False, placeholder="New title, then Enter", elem_id="chat-title"
                )
                delete = gr.Button("Delete this chat", size="sm", variant="stop", elem_id="delete-chat")
        with gr.Column(elem_id="column"):
            self._chatbot = gr.Chatbot(
                show_label=False, container=False, elem_id="conversation", height="100%", layout="bubble",
                buttons=["copy"], editable="user", placeholder=_WELCOME, latex_delimiters=LATEX,
                examples=[{"text": text} for text in EXAMPLES], feedback_options=None, allow_tags=False,
                group_consecutive_messages=False,
            )  # fmt: skip
            self._notice = _html(elem_id="notice")
            with gr.Row(elem_id="loading", visible=False) as self._loading:
                self._loading_text = _html()
                stop_loading = gr.Button("Stop", size="sm", min_width=80, scale=0, elem_id="stop-loading")
                self._try_again = gr.Button(
                    "Try again", size="sm", min_width=96, scale=0, visible=False, elem_id="try-again"
                )
            self._composer = gr.Textbox(
                label="Message", show_label=False, container=False, placeholder="Ask something", lines=1, max_lines=8,
                submit_btn=_SEND, autofocus=True, max_length=_MAX_MESSAGE, elem_id="composer",
            )  # fmt: skip
            self._speed = _html(telemetry.speed_strip(None), elem_id="speed")
            self._machine = _html(elem_id="machine")
            self._provenance = _html(elem_id="provenance")
            self._experts = ExpertPanel(self._host)
        with gr.Sidebar("Settings", position="right", open=False, width=320, elem_id="settings"):
            self._settings = build_settings(preferences, self._host)
            models = build_model_choice(self._host, preferences) if private else None
            training = TrainingPanel(self._host, Training()) if private else None

        timer = gr.Timer(_TICK_SECONDS)
        self._loading_timer = gr.Timer(_LOADING_TICK_SECONDS)
        self._connect_answers()
        self._connect_chats(new_chat, title, delete)
        self._connect_loading(stop_loading, models, training)
        timer.tick(self._machine_strip, None, self._machine, **DIRECT)

    # Answers

    def _connect_answers(self) -> None:
        outputs = [
            self._chatbot, self._provenance, self._composer, self._notice, self._speed, self._chat,
            self._chat_list, self._manage, self._experts.body,
        ]  # fmt: skip
        inputs = [self._chat, *self._settings.answer]
        # No limit here: the engine host keeps the line, and tells everybody their place in it.
        running: dict[str, Any] = {**QUIET, "concurrency_limit": None}
        self._composer.submit(self._on_submit, [self._composer, *inputs], outputs, **running)
        self._chatbot.example_select(self._on_example, inputs, outputs, **running)
        self._chatbot.retry(self._on_retry, inputs, outputs, **running)
        self._chatbot.edit(self._on_edit, inputs, outputs, **running)
        self._chatbot.undo(
            self._on_undo, self._chat, [self._chatbot, self._provenance, self._composer], **DIRECT
        )
        self._composer.stop(self._on_stop, None, None, **DIRECT)

    def _on_submit(self, request: gr.Request, text: str, chat: int | None, *settings: Any) -> Iterator[Any]:
        store = self._store_of(_owner(request))
        history = store.messages(chat) if chat is not None else []
        if not (text or "").strip():
            yield [gr.skip()] * 9
            return
        yield from self._answer([*history, StoredMessage("user", text.strip())], chat, settings, request)

    def _on_example(
        self, request: gr.Request, event: gr.SelectData, chat: int | None, *settings: Any
    ) -> Iterator[Any]:
        yield from self._answer([StoredMessage("user", event.value["text"])], chat, settings, request)

    def _on_retry(self, request: gr.Request, chat: int | None, *settings: Any) -> Iterator[Any]:
        history = self._store_of(_owner(request)).messages(chat) if chat is not None else []
        while history and history[-1].role == "assistant":
            history.pop()
        if not history:
            yield [gr.skip()] * 9
            return
        yield from self._answer(history, chat, settings, request)

    def _on_edit(
        self, request: gr.Request, event: gr.EditData, chat: int | None, *settings: Any
    ) -> Iterator[Any]:
        history = self._store_of(_owner(request)).messages(chat) if chat is not None else []
        place = event.index if isinstance(event.index, int) else event.index[0]
        text = event.value if isinstance(event.value, str) else _text_of(event.value)
        yield from self._answer([*history[:place], StoredMessage("user", text)], chat, settings, request)

    def _on_undo(self, chat: int | None, request: gr.Request) -> tuple[Any, ...]:
        """Take the last question back into the composer."""
        store = self._store_of(_owner(request))
        history = store.messages(chat) if chat is not None else []
        while history and history[-1].role == "assistant":
            history.pop()
        if chat is None or not history:
            return gr.skip(), gr.skip(), gr.skip()
        question = history.pop()
        store.replace(chat, history)
        return *_shown(history), question.content

    def _on_stop(self, request: gr.Request) -> None:
        self._host.stop(_owner(request))

    def _answer(
        self, history: list[StoredMessage], chat: int | None, values: Sequence[Any], request: gr.Request
    ) -> Iterator[Any]:
        """Stream an answer into the page. Outputs: see ``_connect_answers``."""
        owner = _owner(request)
        store = self._store_of(owner)
        try:
            settings = read_settings(*values)
        except SlipstreamError as error:
            yield *[gr.skip()] * 3, telemetry.notice(str(error), "error"), *[gr.skip()] * 4
            return
        if chat is None:
            chat = store.create(history[0].content)
        busy = gr.Textbox(value="", submit_btn=False, stop_btn=_STOP)
        ready = gr.Textbox(submit_btn=_SEND, stop_btn=False)
        yield (
            *_shown([*history, StoredMessage("assistant", "")]), busy, "", gr.skip(), chat, self._choices(store, chat),
            gr.Accordion(visible=True), gr.skip(),
        )  # fmt: skip
        rates: deque[float] = deque(maxlen=40)
        why_off = ""
        for update in stream_answer(self._host, store, chat, history, settings, owner):
            if update.rate:
                rates.append(update.rate)
            kind = "error" if update.failed else "info"
            why_off = self._why_off(owner, update.speculation) or why_off  # stays for this answer
            strip = telemetry.speed_strip(update.metrics, update.speculation, rates, update.accelerated)
            yield (
                *_shown(update.messages), gr.skip(), telemetry.notice(update.notice or why_off, kind),
                strip if update.metrics else gr.skip(), *[gr.skip()] * 3, self._experts.draw(owner, update.experts),
            )  # fmt: skip
        yield *[gr.skip()] * 2, ready, *[gr.skip()] * 3, self._choices(store, chat), *[gr.skip()] * 2

    def _why_off(self, owner: str, speculation: Any | None) -> str:
        """Why acceleration has just been switched off; empty if it is not, or if it was told already."""
        reason = speculation.reason if speculation is not None and speculation.is_off else None
        if not reason or self._told_off.get(owner) == reason:
            return ""
        self._told_off[owner] = reason
        return str(reason)

    # Past chats

    def _connect_chats(self, new_chat: Any, title: Any, delete: Any) -> None:
        page = [self._chatbot, self._provenance, self._notice, self._chat, self._chat_list, self._manage]
        new_chat.click(self._on_new, None, page, **DIRECT)
        self._chat_list.input(self._on_open, self._chat_list, page, **DIRECT)
        title.submit(self._on_rename, [self._chat, title], [self._chat_list, title], **DIRECT)
        delete.click(self._on_delete, self._chat, page, **DIRECT)
        blocks = gr.context.Context.root_block
        assert blocks is not None
        blocks.load(self._on_load, None, [self._chat_list, self._machine], **DIRECT)
        for event in (blocks.load, self._settings.tint.change):
            event(None, self._settings.tint, None, js=provenance.SWITCH, **DIRECT)
        blocks.unload(self._on_unload)

    def _on_load(self, request: gr.Request) -> tuple[Any, str]:
        return self._choices(self._store_of(_owner(request)), None), self._machine_strip()

    def _on_unload(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for the answer."""
        self._told_off.pop(_owner(request), None)
        self._experts.forget(_owner(request))
        self._host.stop(_owner(request))

    def _on_new(self, request: gr.Request) -> tuple[Any, ...]:
        self._host.stop(_owner(request))
        return (
            [],
            "",
            "",
            None,
            self._choices(self._store_of(_owner(request)), None),
            gr.Accordion(visible=False),
        )

    def _on_open(self, chat: int, request: gr.Request) -> tuple[Any, ...]:
        self._host.stop(_owner(request))
        store = self._store_of(_owner(request))
        return *_shown(store.messages(chat)), "", chat, gr.skip(), gr.Accordion(visible=True)

    def _on_rename(self, chat: int | None, title: str, request: gr.Request) -> tuple[Any, str]:
        store = self._store_of(_owner(request))
        if chat is not None:
            store.rename(chat, title)
        return self._choices(store, chat), ""

    def _on_delete(self, chat: int | None, request: gr.Request) -> tuple[Any, ...]:
        if chat is not None:
            self._store_of(_owner(request)).delete(chat)
        return self._on_new(request)

    def _choices(self, store: ChatStore, chat: int | None) -> Any:
        return gr.Radio(choices=[(title, number) for number, title in store.list_chats()], value=chat)

    # The model

    def _connect_loading(
        self, stop_loading: Any, models: ModelPanel | None, training: TrainingPanel | None
    ) -> None:
        state = [
            self._loading, self._loading_text, self._try_again, self._loading_timer, self._settings.method,
            self._experts.frame, self._experts.body,
        ]  # fmt: skip
        state += [] if models is None else [models.telling, models.weights]
        state += [] if training is None else training.outputs
        state += self._settings.sampling
        self._private, self._training = models is not None, training
        self._loading_timer.tick(self._loading_state, None, state, **DIRECT)
        stop_loading.click(self._host.cancel_loading, None, None, **DIRECT)
        wake = self._try_again.click(lambda: self._host.start(), None, None, **DIRECT)
        wake.then(lambda: gr.Timer(active=True), None, self._loading_timer, **DIRECT)
        for panel in (models, training):
            if panel is not None:
                panel.loads.then(
                    lambda begun: gr.Timer(active=True) if begun else gr.skip(), panel.begun, self._loading_timer,
                    **DIRECT,
                )  # fmt: skip

    def _loading_state(self, request: gr.Request) -> tuple[Any, ...]:
        state, session = self._host.state, self._host.loaded
        tell = [gr.Timer(active=True)] if self._private else []
        training = [] if self._training is None else self._training.shown()
        if state.stage == "ready" and session is not None:
            names = session.methods()
            picked = methods.pick(names, self._preferences.value.method)
            method = gr.Radio(choices=methods.switch(names, picked), value=picked, visible=len(names) > 1)
            weights = [gr.Dropdown(**format_choice(self._host))] if self._private else []
            experts = self._experts.shown(_owner(request))
            sampling = sampling_shown(self._preferences.value, session.info.recommended)
            return (
                gr.Row(visible=False), "", gr.skip(), gr.Timer(active=False), method, *experts, *tell, *weights,
                *training, *sampling,
            )  # fmt: skip
        kept = [gr.skip() for _ in tell]
        experts = (gr.Accordion(visible=False), gr.skip())
        sampling = tuple(gr.skip() for _ in self._settings.sampling)
        if state.stage == "loading":
            text = telemetry.loading_strip(state.message, state.share)
            return (
                gr.Row(visible=True), text, gr.Button(visible=False), gr.skip(), gr.skip(), *experts, *kept, *kept,
                *training, *sampling,
            )  # fmt: skip
        text = telemetry.notice(state.message, "error")
        return (
            gr.Row(visible=True), text, gr.Button(visible=True), gr.Timer(active=False), gr.skip(), *experts, *tell,
            *kept, *training, *sampling,
        )  # fmt: skip

    def _machine_strip(self) -> str:
        session = self._host.loaded
        return telemetry.machine_strip(session.info if session else None, telemetry.read_memory())


def _html(value: str = "", **options: Any) -> Any:
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def _owner(request: gr.Request) -> str:
    return request.session_hash or ""


def _shown(messages: Sequence[StoredMessage]) -> tuple[list[dict[str, str]], str]:
    """A chat as bubbles, and which of its words were drafted."""
    bubbles = [{"role": message.role, "content": message.content} for message in messages]
    return bubbles, provenance.as_html(messages)


def _text_of(value: Any) -> str:
    """The text of a message that gradio hands over as blocks."""
    blocks = value if isinstance(value, list) else [value]
    return "".join(block.get("text", "") if isinstance(block, dict) else str(block) for block in blocks)
