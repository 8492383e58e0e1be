"""The side panel: what the model is told, and how it samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from app import telemetry
from app.conversation import AnswerSettings
from app.engine_host import EngineHost
from app.preferences import PreferenceFile, Preferences
from app.sampling_choice import RANGES, explained, in_force
from engine.errors import InvalidRequestError
from engine.requests import SamplingParams

_DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class SettingsPanel:
    """The panel's components; ``answer`` are the inputs of :func:`read_settings`, in order, and ``sampling`` what
    :func:`sampling_shown` fills anew when a model is there."""

    answer: tuple[Any, ...]
    sampling: tuple[Any, ...]
    method: Any
    tint: Any
    reset: Any


def read_settings(
    system_prompt: str,
    temperature: float,
    top_p: float,
    top_k: float,
    min_p: float,
    repetition_penalty: float,
    seed: float | None,
    max_new_tokens: float,
    method: str | None,
) -> AnswerSettings:
    """The values of the panel, checked.

    Raises:
        InvalidRequestError: one is outside its range (the page keeps them in, another client may not).
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=_whole("Top k", top_k),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=None if seed is None else _whole("The seed", seed),
    )
    limit = _whole("The token limit", max_new_tokens)
    return AnswerSettings(system_prompt or "", sampling, limit, method or "")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, (int, float)) and math.isfinite(value) and value == int(value):
        return int(value)
    raise InvalidRequestError(f"{name} must be a whole number.")


def sampling_shown(preferences: Preferences, recommended: SamplingParams | None) -> tuple[Any, ...]:
    """The sampling settings that hold, and whose they are.

    Args:
        recommended: by the authors of the loaded model.
    """
    values = in_force(preferences, recommended)
    return *values.values(), telemetry.remark(explained(values, recommended))


def _save(preferences: PreferenceFile, name: str, value: Any) -> None:
    preferences.save(**{name: value})


def build_settings(preferences: PreferenceFile, host: EngineHost) -> SettingsPanel:
    """Lay the panel out in the present container."""
    values, sampled = preferences.value, in_force(preferences.value, None)
    method = gr.Radio(
        choices=[], label="Decoding", visible=False, elem_id="method",
        info="The same text either way; from the next message on",
    )  # fmt: skip
    method.input(lambda value: preferences.save(method=value), method, None, **_DIRECT)
    with gr.Group():
        system_prompt = gr.Textbox(
            values.system_prompt, label="System prompt", lines=3, max_lines=8, max_length=20000,
            info="What the model is told before every chat", elem_id="system-prompt",
        )  # fmt: skip
    with gr.Group():
        temperature = gr.Slider(
            *RANGES["temperature"], sampled["temperature"], step=0.05, label="Temperature", buttons=[],
            info="0 always takes the likeliest token", elem_id="temperature",
        )  # fmt: skip
        top_p = gr.Slider(*RANGES["top_p"], sampled["top_p"], step=0.01, label="Top p", buttons=[])
        max_new_tokens = gr.Slider(
            16, 8192, values.max_new_tokens, step=16, label="Token limit of an answer", buttons=[],
            elem_id="max-tokens",
        )  # fmt: skip
    tint = gr.Checkbox(
        values.tint_drafted, label="Tint drafted words", elem_id="tint",
        info="Words that acceleration drafted and the model accepted",
    )  # fmt: skip
    tint.input(lambda value: preferences.save(tint_drafted=value), tint, None, **_DIRECT)
    with gr.Accordion("More sampling", open=False):
        top_k = gr.Slider(
            *RANGES["top_k"], sampled["top_k"], step=1, label="Top k", info="0 is off", buttons=[]
        )
        min_p = gr.Slider(
            *RANGES["min_p"], sampled["min_p"], step=0.01, label="Min p", info="0 is off", buttons=[]
        )
        penalty = gr.Slider(
            *RANGES["repetition_penalty"], sampled["repetition_penalty"], step=0.01,
            label="Repetition penalty", info="1 is off", buttons=[],
        )  # fmt: skip
        seed = gr.Number(values.seed, label="Seed", precision=0, info="Empty: another answer each time")
    whose = gr.HTML(telemetry.remark(""), apply_default_css=False, js_on_load=None, elem_id="whose-sampling")
    reset = gr.Button("Back to the defaults", size="sm", variant="secondary")
    sampling = dict(zip(RANGES, (temperature, top_p, top_k, min_p, penalty), strict=True))
    others = {"system_prompt": system_prompt, "seed": seed, "max_new_tokens": max_new_tokens}

    def recommended() -> SamplingParams | None:
        session = host.loaded
        return None if session is None else session.info.recommended

    def back_to_defaults() -> list[Any]:
        defaults = Preferences()
        preferences.save(**{name: getattr(defaults, name) for name in (*others, *sampling)})
        shown = sampling_shown(preferences.value, recommended())
        return [*(getattr(defaults, name) for name in others), *shown]

    # What a person enters is saved; what the page itself fills in is no choice.
    for name, component in {**sampling, **others}.items():
        component.input(partial(_save, preferences, name), component, None, **_DIRECT)
    gr.on(
        [component.input for component in sampling.values()],
        lambda *values: telemetry.remark(explained(dict(zip(RANGES, values, strict=True)), recommended())),
        list(sampling.values()), whose, **_DIRECT,
    )  # fmt: skip
    blocks = gr.context.Context.root_block
    assert blocks is not None
    names = (*others, "tint_drafted")

    def saved() -> list[Any]:
        shown = sampling_shown(preferences.value, recommended())
        return [*(getattr(preferences.value, name) for name in names), *shown]

    # A page that is opened later shows what was saved since the start.
    blocks.load(saved, None, [*others.values(), tint, *sampling.values(), whose], **_DIRECT)
    reset.click(back_to_defaults, None, [*others.values(), *sampling.values(), whose], **_DIRECT)
    answer = (system_prompt, *sampling.values(), seed, max_new_tokens, method)
    return SettingsPanel(answer, (*sampling.values(), whose), method, tint, reset)
