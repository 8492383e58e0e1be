"""The side panel: what the model is told, and how it samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.conversation import AnswerSettings
from app.preferences import PreferenceFile, Preferences
from engine.errors import InvalidRequestError
from engine.requests import SamplingParams

_DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class SettingsPanel:
    """The panel's components; ``answer`` are the inputs of :func:`read_settings`, in order."""

    answer: tuple[Any, ...]
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


def build_settings(preferences: PreferenceFile) -> SettingsPanel:
    """Lay the panel out in the present container."""
    values = preferences.value
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
            0, 2, values.temperature, step=0.05, label="Temperature", buttons=[],
            info="0 always takes the likeliest token", elem_id="temperature",
        )  # fmt: skip
        top_p = gr.Slider(0.05, 1, values.top_p, step=0.01, label="Top p", buttons=[])
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
        top_k = gr.Slider(0, 200, values.top_k, step=1, label="Top k", info="0 is off", buttons=[])
        min_p = gr.Slider(0, 1, values.min_p, step=0.01, label="Min p", info="0 is off", buttons=[])
        penalty = gr.Slider(
            1,
            2,
            values.repetition_penalty,
            step=0.01,
            label="Repetition penalty",
            info="1 is off",
            buttons=[],
        )
        seed = gr.Number(values.seed, label="Seed", precision=0, info="Empty: another answer each time")
    reset = gr.Button("Back to the defaults", size="sm", variant="secondary")
    answer = (system_prompt, temperature, top_p, top_k, min_p, penalty, seed, max_new_tokens)

    defaults = Preferences()
    names = (
        "system_prompt", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
        "max_new_tokens",
    )  # fmt: skip
    for name, component in zip(names, answer, strict=True):
        # A default argument binds the name now; gradio passes the component's value alone.
        def save(value: Any, name: str = name) -> None:
            preferences.save(**{name: value})

        component.change(save, component, None, **_DIRECT)
    blocks = gr.context.Context.root_block
    assert blocks is not None
    # A page that is opened later shows what was saved since the start.
    blocks.load(
        lambda: [getattr(preferences.value, name) for name in (*names, "tint_drafted")],
        None,
        [*answer, tint],
        **_DIRECT,
    )
    reset.click(
        lambda: [getattr(defaults, name) for name in names], None, list(answer), **_DIRECT
    )  # fmt: skip
    return SettingsPanel((*answer, method), method, tint, reset)
