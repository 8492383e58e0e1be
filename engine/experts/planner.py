"""What of a mixture-of-experts model lives where, decided from its shapes and the memory there is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import InvalidRequestError, OutOfMemoryError
from engine.experts.in_place import WINDOW
from engine.hardware import gpu_memory, machine_memory, private_memory
from engine.models.config import ModelConfig
from engine.models.decoder import PREFILL_CHUNK
from engine.quantization.base import WeightFormat

# Our choices:
_PLANNED_CONTEXT = 1024  # tokens; a longer chat takes slots away
_PROCESS = 400 << 20  # the interpreter, torch, and what a pass needs besides the weights
CUDA_OWN = 900 << 20  # that CUDA takes of a GPU for itself: its context and code; measured with an H200
# That a pass takes there besides the weights, and each layer with its graphs: models of 16 and 48 layers took 1.4 and
# 2.0 GB with CUDA's own.
_CUDA_PASS, _CUDA_LAYER = 150 << 20, 20 << 20
_PROMPT_ROWS = 8  # of a chunk of a prompt, besides those of its experts
_LEFT_ALONE = 0.15  # of the memory that is free, when nobody says how much to take
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of fast memory by use: of RAM, or of a GPU's memory.

    Attributes:
        budget: for the whole process.
        process: what computing needs besides.
        dense: attention, shared experts, routers, embeddings, head.
        context: keys and values.
        expert: one expert in its slot.
        num_slots: experts in memory at the same time.
        num_experts: of the whole model.
        least_slots: what one token needs at once in one layer.
        host: of RAM, for experts on their way to a GPU.
    """

    budget: int
    process: int
    dense: int
    context: int
    expert: int
    num_slots: int
    num_experts: int
    least_slots: int
    host: int = 0

    @property
    def resident(self) -> bool:
        """Whether all experts stay in memory."""
        return self.num_slots >= self.num_experts

    @property
    def total(self) -> int:
        """Bytes that the process will take."""
        return self.process + self.dense + self.context + self.num_slots * self.expert

    def __str__(self) -> str:
        fixed = f"{_gb(self.dense)} for what every token needs, {_gb(self.context)} for the context"
        if self.resident:
            return f"All {self.num_experts} experts stay in memory: {_gb(self.total)} in all, {fixed}."
        source = f"come from RAM ({_gb(self.host)} of it) and disk" if self.host else "are read from disk"
        return (
            f"{self.num_slots} of {self.num_experts} experts stay in memory ({_gb(self.num_slots * self.expert)}), the "
            f"others {source} when needed: {_gb(self.total)} in all, {fixed}."
        )


def plan_memory(
    config: ModelConfig,
    fmt: WeightFormat,
    budget: int | None = None,
    expert_bytes: int | None = None,
    device: str = "cpu",
) -> MemoryPlan:
    """Divide ``budget`` bytes of the memory of ``device``.

    Args:
        budget: None: what is free there now, but for a share.
        expert_bytes: of one expert in its slot, where it is known exactly.

    Raises:
        OutOfMemoryError: it does not hold what one layer needs at once.
    """
    experts = config.experts
    assert experts is not None
    if budget is None:
        budget = default_budget(device)
    expert = expert_bytes or int(3 * config.hidden_size * experts.intermediate_size * fmt.bytes_per_weight())
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_layers))
    num_experts = sparse * experts.num_experts
    if device == "cpu":
        process = _PROCESS + WINDOW + _prompt_bytes(config)
    else:
        process = CUDA_OWN + _CUDA_PASS + config.num_layers * _CUDA_LAYER
    dense, context = _dense_bytes(config, fmt), _context_bytes(config, fmt)
    fixed = process + dense + context
    num_slots = min(num_experts, max(0, budget - fixed) // expert)
    if num_slots < experts.num_experts_per_tok:
        needed = fixed + experts.num_experts_per_tok * expert
        raise OutOfMemoryError(
            f"This model needs {_gb(needed)} of memory as {fmt.name}, and there are {_gb(budget)}; close other programs, "
            "give a larger --memory or choose a smaller model."
        )
    host = 0
    if device != "cpu" and num_slots < num_experts:
        host = min(num_experts * expert, max(0, default_budget() - _PROCESS))
    return MemoryPlan(
        budget, process, dense, context, expert, num_slots, num_experts, experts.num_experts_per_tok, host
    )


def default_budget(device: str = "cpu") -> int:
    """Bytes that this process may take of the memory of ``device`` when nobody says how many: what is free now, and of RAM
    what it has itself, with a model that the next one replaces; but for a share."""
    memory = machine_memory() if device == "cpu" else gpu_memory(device)
    own = private_memory() if device == "cpu" else 0
    return int((memory.total - memory.used + own) * (1 - _LEFT_ALONE))


def spare_memory(plan: MemoryPlan) -> int:
    """Bytes of RAM that nobody needs beside a process with this plan."""
    memory = machine_memory()
    return int((memory.total - memory.used + private_memory() - plan.total) * (1 - _LEFT_ALONE))


def fixed_bytes(config: ModelConfig, fmt: WeightFormat) -> int:
    """What a process takes with a model but for routed experts: all that a dense model takes."""
    return _PROCESS + _dense_bytes(config, fmt) + _context_bytes(config, fmt)


def parse_memory(text: str) -> int:
    """``6GB``, ``1.5 g``, ``800MB`` -> bytes.

    Raises:
        InvalidRequestError: it is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)i?b?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InvalidRequestError(f"{text!r} is no amount of memory; give one such as 6GB or 800MB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _dense_bytes(config: ModelConfig, fmt: WeightFormat) -> int:
    """Of all weights but the routed experts."""
    table = config.vocab_size * config.hidden_size
    heads = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    packed, plain, routers = table, table, 0  # the head, and the embedding table
    for layer in range(config.num_layers):
        experts = config.experts if config.is_sparse(layer) else None
        size = experts.shared_intermediate_size if experts else config.intermediate_size
        packed += config.hidden_size * (heads + 3 * size)
        routers += experts.num_experts * config.hidden_size if experts else 0
    itemsize = fmt.activation_dtype.itemsize
    # The predictor has routers of its own, in float32.
    return int(packed * fmt.bytes_per_weight()) + plain * itemsize + routers * (itemsize + 4)


def _prompt_bytes(config: ModelConfig) -> int:
    """What a chunk of a prompt takes between two layers: for each row what its experts make of it, and some copies."""
    assert config.experts is not None
    return 4 * PREFILL_CHUNK * config.hidden_size * (config.experts.num_experts_per_tok + _PROMPT_ROWS)


def _context_bytes(config: ModelConfig, fmt: WeightFormat) -> int:
    length = min(config.context_length, _PLANNED_CONTEXT)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return length * per_token * fmt.activation_dtype.itemsize


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
