"""The side panel's part that chooses a model: what it needs is told before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import telemetry
from app.engine_host import EngineHost, ModelChoice
from app.preferences import PreferenceFile
from engine.errors import SlipstreamError
from engine.formats import choosable_formats

FORMAT_LABELS = {
    "auto": "Automatic (the fastest that fits)",
    "int4": "4 bit",
    "int8": "8 bit",
    "bf16": "16 bit",
    "fp32": "32 bit",
    "nf4": "NF4 (bitsandbytes)",
    "bnb_int8": "LLM.int8 (bitsandbytes)",
}
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_DIRECT: dict[str, Any] = {**_QUIET, "queue": False}
_TELLING_SECONDS = 0.4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPanel:
    """When a model is there, or could not be loaded, ``weights`` is to be filled anew (:func:`format_choice`) and
    ``telling`` to be started, which tells once whether the chosen one fits. ``loads`` begins to load one if ``begun``
    says so."""

    weights: Any
    telling: Any
    loads: Any
    begun: Any


def format_choice(host: EngineHost) -> dict[str, Any]:
    """The dropdown of weight formats: those that run here, and the one that was asked for."""
    session = host.loaded
    names = ("auto", *choosable_formats(None if session is None else session.info.device))
    wanted = host.choice.weight_format
    return {
        "choices": [(FORMAT_LABELS[name], name) for name in names],
        "value": wanted if wanted in names else "auto",
    }


def fit_lines(source: str, weights: str, memory: str) -> Iterator[str]:
    """Whether the chosen model fits and how fast it should run, as HTML; twice where the machine's speed has to be
    measured before the second half can be told."""
    from engine.fit import estimate_fit, measure_when_idle

    choice = chosen(source, weights, memory)
    try:
        fit = estimate_fit(choice.source, choice.memory_bytes(), choice.weight_format)
        yield telemetry.remark(str(fit), fit.fits is False)
        if fit.to_measure is not None:
            measure_when_idle(fit.to_measure)
            yield telemetry.remark(
                str(estimate_fit(choice.source, choice.memory_bytes(), choice.weight_format))
            )
    except SlipstreamError as error:
        yield telemetry.notice(str(error), "error")
    except Exception:  # a broken file of a model that nobody has asked to load: loading it has the sentence
        _log.exception("what the model needs could not be told")
        yield telemetry.remark("What this model needs cannot be told before it is loaded.")


def chosen(source: str | None, weights: str, memory: str | None) -> ModelChoice:
    """The panel's fields as a choice."""
    from engine import hub

    return ModelChoice((source or "").strip() or hub.DEFAULT_MODEL, weights, (memory or "").strip())


def build_model_choice(host: EngineHost, preferences: PreferenceFile) -> ModelPanel:
    """The part that loads another model."""
    from engine import hub

    sources = {hub.DEFAULT_MODEL: hub.DEFAULT_MODEL}
    for ready in hub.list_ready_models():
        sources[ready.name] = str(ready.path) if ready.source == "file" else ready.name
    if host.choice.source not in sources.values():
        sources = {host.choice.source: host.choice.source, **sources}
    model = gr.Dropdown(
        list(sources.items()), value=host.choice.source, label="Model", allow_custom_value=True, elem_id="model",
        info="One that is here, a hub repository (owner/name), a folder, or a .gguf file",
    )  # fmt: skip
    weight_format = gr.Dropdown(**format_choice(host), label="Weights", elem_id="weights")
    memory = gr.Textbox(
        host.choice.memory, label="Memory for this model", placeholder="Automatic", max_length=40, elem_id="memory",
        info="Such as 6GB. What of a mixture of experts does not fit is read from disk; empty: what is free",
    )  # fmt: skip
    fit = gr.HTML(telemetry.remark(""), apply_default_css=False, js_on_load=None, elem_id="fit")
    load = gr.Button("Load", size="sm", variant="secondary", elem_id="load-model")
    telling, begun = gr.Timer(_TELLING_SECONDS, active=False), gr.State(False)

    def change_model(source: str, weights: str, amount: str) -> tuple[bool, Any]:
        """Load it; an amount that is none is told, and what runs goes on."""
        choice = chosen(source, weights, amount)
        try:
            choice.memory_bytes()
        except SlipstreamError as error:
            return False, telemetry.notice(str(error), "error")
        preferences.save(model=choice.source, weight_format=choice.weight_format, memory=choice.memory)
        host.start(choice)
        return True, gr.skip()

    def tell_once(source: str, weights: str, amount: str) -> Iterator[tuple[str, Any]]:
        for line in fit_lines(source, weights, amount):
            yield line, gr.Timer(active=False)

    inputs = [model, weight_format, memory]
    waiting: dict[str, Any] = {
        **_QUIET,
        "concurrency_limit": None,
    }  # the memory's speed may have to be measured
    gr.on(
        [model.change, weight_format.input, memory.submit, memory.blur], fit_lines, inputs, fit,
        trigger_mode="always_last", **waiting,
    )  # fmt: skip
    telling.tick(tell_once, inputs, [fit, telling], trigger_mode="once", **waiting)
    loads = load.click(change_model, inputs, [begun, fit], **_DIRECT)
    return ModelPanel(weight_format, telling, loads, begun)
