"""Whether a model fits into this machine's memory, and how fast it should run: told before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory_speed import known_bandwidth, measure_bandwidth
from engine.model_report import ModelReport, examine_model, fused_problem, size_text

# Shares of the memory's bandwidth at which our kernels decoded dense models of 0.1 to 1.5 billion weights on two
# cores: the least and the greatest of the column "bandwidth" in assets/results/bench-*.json, by weight format, but none
# above 1: there the bandwidth was measured in a bad moment.
MEASURED_SHARES = {"int4": (0.61, 1.0), "int8": (0.64, 1.0), "bf16": (0.65, 1.0)}


@dataclass(frozen=True)
class Fit:
    """What can be told of a model without loading it. ``str()`` gives all of it in sentences.

    Attributes:
        memory: what lives where, or what is in the way, in one sentence.
        fits: whether there is memory for it; None: that cannot be told.
        speed: in one sentence, an estimate; empty where there is no ground for one.
        slowest: estimated tokens/s without drafts; None: only a limit is known.
        fastest: estimated tokens/s without drafts, or their limit; None: unknown.
        waits_for_bandwidth: whether the speed can be told once :func:`measure_when_idle` has run.
    """

    memory: str
    fits: bool | None = None
    speed: str = ""
    slowest: float | None = None
    fastest: float | None = None
    waits_for_bandwidth: bool = False

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
    told, bandwidth = _memory_sentence(model), known_bandwidth()
    if bandwidth is None:
        return Fit(told, True, waits_for_bandwidth=True)
    return _with_speed(told, model, bandwidth)


def measure_when_idle() -> None:
    """Measure the memory's speed between two steps of whatever is being computed (half a second)."""
    from engine.generation import ENGINE_LOCK

    with ENGINE_LOCK:
        if known_bandwidth() is None:
            measure_bandwidth(0.4)


def _memory_sentence(model: ModelReport) -> str:
    """What of a model that fits lives where."""
    size = size_text(model.memory_bytes or 0)
    if model.num_experts is None:
        return f"All of it stays in memory ({size})."
    if model.num_slots == model.num_experts:
        return f"All {model.num_experts} experts stay in memory ({size} in all)."
    return f"{model.num_slots} of {model.num_experts} experts stay in memory ({size} in all), the others are read from disk."


def _with_speed(told: str, model: ModelReport, bandwidth: float) -> Fit:
    """Decoding reads ``step_bytes`` for each token, at a share of the bandwidth that was measured with other models;
    where it never was, the bandwidth itself is the limit."""
    limit = bandwidth / (model.step_bytes or 1)
    speed = f"the memory's {bandwidth / 1e9:.0f} GB/s"
    shares = MEASURED_SHARES.get(model.weight_format or "")
    if model.num_experts is None and shares is not None and fused_problem("cpu") is None:
        low, high = shares
        sentence = (
            f"Estimated {_rate(low * limit)} to {_rate(high * limit)} tokens/s without drafts: {100 * low:.0f} to "
            f"{100 * high:.0f} % of what {speed} allow, as measured with other models."
        )
        return Fit(told, True, sentence, low * limit, high * limit)
    sentence = f"At most {_rate(limit)} tokens/s, the limit of {speed}"
    slower = "; how much slower reading from disk makes it depends on the text."
    return Fit(told, True, sentence + (slower if model.num_slots != model.num_experts else "."), None, limit)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
