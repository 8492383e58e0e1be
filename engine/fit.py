"""Whether a model fits into this machine's memory, and how fast it should run: told before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.disk_speed import known_disk_speed, measure_disk_speed
from engine.hardware import machine_memory
from engine.memory_speed import known_bandwidth, measure_bandwidth
from engine.model_report import ModelReport, examine_model, fused_problem, size_text

# Shares of the memory's bandwidth at which our kernels decoded dense models of 0.1 to 1.5 billion weights on two
# cores: the least and the greatest of the column "bandwidth" in assets/results/bench-*.json, by weight format, but none
# above 1: there the bandwidth was measured in a bad moment.
MEASURED_SHARES = {"int4": (0.68, 1.0), "int8": (0.67, 1.0), "bf16": (0.66, 1.0)}
# Likewise of mixtures of experts with all of them in memory, as int4: the shape of OLMoE, and the testbed's small ones.
EXPERT_SHARES = (0.55, 0.85)
# Of the bytes of experts that a token takes, those that were not in memory, by the share of all experts that is: with
# the testbed (assets/results/experts-*.json, the app's way).
_IN_MEMORY, _MISSED = (0.0, 0.1, 0.25, 0.5, 1.0), (1.0, 0.71, 0.44, 0.19, 0.0)
# Of the speed with all experts in memory, where the system's file cache has the others (assets/results/scale.json).
_IN_PLACE = 0.86


@dataclass(frozen=True)
class Fit:
    """What can be told of a model without loading it. ``str()`` gives all of it in sentences.

    Attributes:
        memory: what lives where, or what is in the way, in one sentence.
        fits: whether there is memory for it; None: that cannot be told.
        speed: in one sentence, an estimate; empty where there is no ground for one.
        slowest: estimated tokens/s without drafts; None: only a limit is known.
        fastest: estimated tokens/s without drafts, or their limit; None: unknown.
        to_measure: the model's file, if more can be told once :func:`measure_when_idle` has run with it.
    """

    memory: str
    fits: bool | None = None
    speed: str = ""
    slowest: float | None = None
    fastest: float | None = None
    to_measure: Path | None = None

    def __str__(self) -> str:
        return f"{self.memory} {self.speed}".strip()


def estimate_fit(source: str, memory: int | None, weight_format: str = "auto") -> Fit:
    """Look at the files of the model that ``source`` names (milliseconds; nothing is downloaded or measured).

    Args:
        memory: bytes for the whole process, for a mixture-of-experts model; None: what will be free once this
            process has unloaded the model that it has.
    """
    from engine.loading import pick_device

    device = pick_device("auto")
    model = examine_model(source, device, weight_format, memory)
    if model.problem is not None:
        return Fit(model.problem[:1].upper() + model.problem[1:])
    if model.plan is None:
        return Fit(f"About {size_text(model.weight_bytes or 0)} of weights go to the memory of the GPU.")
    if not model.fits:
        return Fit(model.plan, False)
    if device != "cpu":
        return Fit(_memory_sentence(model), True)
    told, bandwidth, file = _memory_sentence(model), known_bandwidth(), _largest_file(Path(model.path or ""))
    if bandwidth is None:
        return Fit(told, True, to_measure=file)
    return _with_speed(told, model, bandwidth, file)


def measure_when_idle(file: Path) -> None:
    """Measure the speed of the memory, and of the disk that the model's file lies on, between two steps of whatever is
    being computed (less than a second)."""
    from engine.generation import ENGINE_LOCK

    with ENGINE_LOCK:
        if known_bandwidth() is None:
            measure_bandwidth(0.4)
        if known_disk_speed(file) is None:
            measure_disk_speed(file)


def _largest_file(model: Path) -> Path:
    files = model.glob("*.safetensors") if model.is_dir() else ()
    return max(files, key=lambda file: file.stat().st_size, default=model)


def _memory_sentence(model: ModelReport) -> str:
    """What of a model that fits lives where."""
    size = size_text(model.memory_bytes or 0)
    if model.num_experts is None:
        return f"All of it stays in memory ({size})."
    if model.num_slots == model.num_experts:
        return f"All {model.num_experts} experts stay in memory ({size} in all)."
    return f"{model.num_slots} of {model.num_experts} experts stay in memory ({size} in all), the others are read from disk."


def _with_speed(told: str, model: ModelReport, bandwidth: float, file: Path) -> Fit:
    """Decoding reads ``step_bytes`` for each token, at a share of the bandwidth that was measured with other models;
    where it never was, the bandwidth itself is the limit."""
    limit = bandwidth / (model.step_bytes or 1)
    speed = f"the memory's {bandwidth / 1e9:.0f} GB/s"
    shares = MEASURED_SHARES.get(model.weight_format or "")
    if model.num_experts is not None:
        shares = EXPERT_SHARES if model.weight_format == "int4" else None
    if shares is None or fused_problem("cpu") is not None:
        return Fit(told, True, f"At most {_rate(limit)} tokens/s, the limit of {speed}.", None, limit)
    low, high = shares[0] * limit, shares[1] * limit
    if model.num_slots != model.num_experts:
        return _with_reading(told, model, low, high, file)
    sentence = (
        f"Estimated {_rate(low)} to {_rate(high)} tokens/s without drafts: {100 * shares[0]:.0f} to "
        f"{100 * shares[1]:.0f} % of what {speed} allow, as measured with other models."
    )
    return Fit(told, True, sentence, low, high)


def _with_reading(told: str, model: ModelReport, low: float, high: float, file: Path) -> Fit:
    """For ``low`` to ``high`` tokens/s with all experts in memory: what it costs to read those that are not."""
    assert model.num_experts and model.num_slots is not None and model.expert_bytes and model.routed_bytes
    missed = float(np.interp(model.num_slots / model.num_experts, _IN_MEMORY, _MISSED))
    others = (model.num_experts - model.num_slots) * model.expert_bytes
    memory, disk = machine_memory(), known_disk_speed(file)
    free = memory.total - memory.used - (model.memory_bytes or 0)
    about = f"about {100 * missed:.0f} % of the experts that a token takes are not in memory"
    if free > others:
        low = _IN_PLACE * low
        sentence = f"{about}, but the system has room to keep their file in memory that is otherwise free."
    elif disk is None:
        sentence = f"At most {_rate(high)} tokens/s: {about}, and the speed of this disk is not known."
        return Fit(told, True, sentence, None, high, file)
    else:
        seconds = missed * model.routed_bytes / disk
        low, high = 1 / (1 / low + seconds), 1 / (1 / high + seconds * (1 - max(0, free) / others))
        sentence = f"{about} and come from the disk ({disk / 1e9:.1f} GB/s)."
    return Fit(
        told, True, f"Estimated {_rate(low)} to {_rate(high)} tokens/s without drafts: {sentence}", low, high
    )


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
