"""What the families call their experts' weights. A name may end in ``[3]``: that matrix of a stack of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """What a layer's expert weights are called, behind ``model.layers.0.``. ``{}`` stands for the expert."""

    router: str
    gate_up: tuple[str, ...]  # joined along the outputs
    down: str


_IN_MLP = ExpertNames(
    "mlp.gate.weight",
    ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.{}.down_proj.weight",
)
# In GGUF files, under the names that hf_names gives their tensors.
IN_STACKS = ExpertNames(
    "mlp.gate.weight",
    ("mlp.experts.gate_proj.weight[{}]", "mlp.experts.up_proj.weight[{}]"),
    "mlp.experts.down_proj.weight[{}]",
)
# In safetensors, by model_type.
EXPERT_NAMES = {
    "olmoe": _IN_MLP,
    "qwen2_moe": _IN_MLP,
    "qwen3_moe": _IN_MLP,
    "mixtral": ExpertNames(
        "block_sparse_moe.gate.weight",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        "block_sparse_moe.experts.{}.w2.weight",
    ),
    "granitemoe": ExpertNames(
        "block_sparse_moe.router.layer.weight",
        ("block_sparse_moe.input_linear.weight[{}]",),
        "block_sparse_moe.output_linear.weight[{}]",
    ),
}


def split_index(name: str) -> tuple[str, int | None]:
    """``"weight[3]"`` -> ``("weight", 3)``, ``"weight"`` -> ``("weight", None)``."""
    whole, bracket, index = name.partition("[")
    return whole, int(index[:-1]) if bracket else None
