"""The compare page: one prompt, two lanes in turns on one engine, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from app import methods, telemetry
from app.engine_host import EngineHost
from app.lane_view import lane_card
from app.preferences import PreferenceFile
from app.race import AS_LOADED, LaneChoice, RaceSettings, RaceUpdate, lane_names, stream_race
from app.spare_sessions import memory_sentence
from engine.errors import SlipstreamError
from engine.formats import choosable_formats
from engine.requests import SamplingParams

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
DIRECT: dict[str, Any] = {**QUIET, "queue": False}
_PROMPT = "Write a Python function that merges two sorted lists, and explain each step."
_TICK_SECONDS = 0.5


class ComparePage:
    """Builds the page's components into the present ``gr.Blocks`` and holds their handlers.

    Args:
        private: whether one person owns this machine, and so may load other weight formats.
    """

    def __init__(self, host: EngineHost, preferences: PreferenceFile, private: bool) -> None:
        self._host, self._preferences = host, preferences
        self._build(private)

    def _build(self, private: bool) -> None:
        with gr.Column(elem_id="compare"):
            self._prompt = gr.Textbox(
                _PROMPT, label="Prompt", show_label=False, container=False, lines=1, max_lines=6, max_length=100_000,
                placeholder="One prompt for both lanes", submit_btn="Compare", elem_id="race-prompt",
            )  # fmt: skip
            self._notice = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="race-notice")
            lanes = []
            with gr.Row(elem_id="lanes"):
                for place, method in enumerate(("m2r2", "plain")):
                    with gr.Column(min_width=280):
                        with gr.Row(elem_classes="lane-choice"):
                            choice = gr.Dropdown(
                                [(methods.label(method), method)], value=method, label="Method", show_label=False,
                                container=False, elem_id=f"method-{place}", min_width=120,
                            )  # fmt: skip
                            weights = gr.Dropdown(
                                _weight_choices(None),
                                value=AS_LOADED, label="Weights", show_label=False, container=False,
                                visible=private, elem_id=f"weights-{place}", min_width=120,
                            )  # fmt: skip
                        card = gr.HTML(
                            lane_card(methods.label(method), None, methods.is_accelerated(method)),
                            apply_default_css=False, js_on_load=None, elem_id=f"lane-{place}",
                        )  # fmt: skip
                    lanes.append((choice, weights, card))
            self._verdict = gr.HTML(_verdict(""), apply_default_css=False, js_on_load=None, elem_id="verdict")
            with gr.Accordion("Sampling, the same for both", open=False), gr.Row():
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", buttons=[], info="0 always takes the likeliest token"
                )  # fmt: skip
                top_p = gr.Slider(0.05, 1, 1, step=0.01, label="Top p", buttons=[])
                max_tokens = gr.Slider(
                    16, 2048, 256, step=16, label="Token limit", buttons=[], elem_id="race-max-tokens"
                )
                seed = gr.Number(0, label="Seed", precision=0)
        self._choices = [component for choice, weights, _ in lanes for component in (choice, weights)]
        self._cards = [card for *_, card in lanes]
        self._connect([temperature, top_p, max_tokens, seed])

    def _connect(self, sampling: list[Any]) -> None:
        outputs = [self._prompt, self._notice, *self._cards, self._verdict]
        self._prompt.submit(
            self._on_compare, [self._prompt, *self._choices, *sampling], outputs, concurrency_limit=None, **QUIET
        )  # fmt: skip
        self._prompt.stop(self._on_stop, None, None, **DIRECT)
        for component in self._choices:
            component.input(self._on_choice, self._choices, [self._notice, *self._cards], **DIRECT)
        # The methods are known when the model is there, and may be others after another one is loaded.
        timer = gr.Timer(_TICK_SECONDS)
        seen = gr.State(None)
        timer.tick(self._on_tick, [seen, *self._choices[::2]], [seen, *self._choices, *self._cards], **DIRECT)

    def _on_compare(self, request: gr.Request, prompt: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        lanes = _lanes(values[:4])
        try:
            settings = self._settings(prompt, lanes, values[4:])
        except SlipstreamError as error:
            yield gr.skip(), telemetry.notice(str(error), "error"), gr.skip(), gr.skip(), gr.skip()
            return
        busy = gr.Textbox(submit_btn=False, stop_btn="Stop")
        yield busy, "", *self._lane_cards(lanes, ()), _verdict("")
        runs: tuple[Any, ...] = ()
        for update in stream_race(self._host, settings, request.session_hash or ""):
            runs = update.runs or runs
            yield gr.skip(), _notice(update), *self._lane_cards(lanes, runs), _verdict(update.verdict)
        yield gr.Textbox(submit_btn="Compare", stop_btn=False), *[gr.skip()] * 4

    def _settings(
        self, prompt: str, lanes: tuple[LaneChoice, LaneChoice], values: Sequence[Any]
    ) -> RaceSettings:
        temperature, top_p, max_tokens, seed = values
        sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=int(seed or 0))
        return RaceSettings(
            prompt or "", lanes, sampling, int(max_tokens), self._preferences.value.system_prompt
        )

    def _on_stop(self, request: gr.Request) -> None:
        self._host.stop(request.session_hash or "")

    def _on_choice(self, *values: Any) -> tuple[Any, ...]:
        """Name the lanes anew, and say what another weight format costs before it is loaded."""
        lanes = _lanes(values)
        session = self._host.loaded
        others = {lane.weight_format for lane in lanes} - {AS_LOADED}
        sentences = [
            memory_sentence(session.info.num_parameters, name)
            for name in sorted(others)
            if session is not None
            and name != session.info.weight_format
            and self._host.spares.get(name) is None
        ]
        return telemetry.notice(" ".join(sentences)), *self._lane_cards(lanes, ())

    def _lane_cards(self, lanes: tuple[LaneChoice, LaneChoice], runs: Sequence[Any]) -> list[str]:
        session = self._host.loaded
        names = lane_names(lanes, *([] if session is None else [session.info.weight_format]))
        return [
            lane_card(name, runs[place] if runs else None, methods.is_accelerated(lanes[place].method))
            for place, name in enumerate(names)
        ]

    def _on_tick(self, seen: Any, first: str, second: str) -> tuple[Any, ...]:
        """Offer the loaded model's methods, and the weight formats of its device, once for each model."""
        session = self._host.loaded
        now = None if session is None else (session.info.name, session.methods())
        if now is None or now == seen:
            return tuple([gr.skip()] * 7)
        options = methods.choices(session.methods())
        picked = [methods.pick(session.methods(), value) for value in (first, second)]
        cards = self._lane_cards((LaneChoice(picked[0]), LaneChoice(picked[1])), ())
        weights = gr.Dropdown(choices=_weight_choices(session.info.device))
        first_method, second_method = (gr.Dropdown(choices=options, value=name) for name in picked)
        return now, first_method, weights, second_method, weights, *cards


def _weight_choices(device: str | None) -> list[tuple[str, str]]:
    """Choices of a lane's weights on ``device``, None while no model is loaded."""
    return [("As loaded", AS_LOADED), *((name, name) for name in choosable_formats(device))]


def _lanes(values: Sequence[Any]) -> tuple[LaneChoice, LaneChoice]:
    first, first_weights, second, second_weights = values
    return LaneChoice(first, first_weights or AS_LOADED), LaneChoice(second, second_weights or AS_LOADED)


def _notice(update: RaceUpdate) -> str:
    return telemetry.notice(update.notice, "error" if update.failed else "info")


def _verdict(sentence: str) -> str:
    """Of fixed height, so that the lanes do not move when it appears."""
    return f'<p class="verdict" role="status">{telemetry.escape(sentence)}</p>'
