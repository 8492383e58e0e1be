"""Ablation: many accelerators trained with the same budget on the same text, one row of figures each.

Rows are written to the JSON file as they are finished; a second start goes on with the first missing row,
and inside a row from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.hardware import machine
from engine.models.decoder import Decoder, rms_norm
from engine.models.rope import rotate
from engine.residuals.accelerator import AcceleratorConfig
from engine.residuals.corpus import causal_attention
from engine.residuals.stages import Runner
from engine.residuals.training import Objective, Teacher, TrainingConfig
from engine.residuals.tuning import Prepared, Run, TuneRequest, check, prepare
from engine.residuals.tuning_data import num_weights
from engine.residuals.tuning_store import Store, TuningError

INT4_BYTES, ADAPTER_BYTES = 0.625, 2.0  # per weight: 4-bit codes with their scales, bfloat16
DEEPEST = 10  # of the rows: the model has to have more layers


class OwnKeysObjective(Objective):
    """A control for the shared KV cache: the accelerated stream attends to keys and values made of its own
    states instead of the slow stream's.

    Our choice: in each pass the keys of all positions come from that pass. The stream would have to keep
    a cache of its own, and to run at every verified token as well.
    """

    def accelerate(self, teacher: Teacher, condition: Tensor | None) -> Tensor:
        accelerator, decoder = self.accelerator, self.decoder
        config = decoder.config
        state = accelerator.begin(teacher.embedded, condition)
        for index in range(accelerator.config.depth):
            layer = decoder.layers[index]
            q = accelerator.queries(decoder, index, state, teacher.cos, teacher.sin)
            x = rms_norm(state, layer.attn_norm, config.norm_eps)
            heads = layer.qkv(x).view(*x.shape[:-1], -1, config.head_dim)
            k, v = heads[..., config.num_heads :, :].split(config.num_kv_heads, dim=-2)
            if layer.k_norm is not None:
                k = rms_norm(k, layer.k_norm, config.norm_eps)
            attended = causal_attention(q, rotate(k, teacher.cos, teacher.sin), v)
            state = accelerator.mix(decoder, index, state, attended, teacher.routes[index])
        return accelerator.finish(decoder, state, condition)


@dataclass(frozen=True)
class Row:
    """One setting: what differs from the base."""

    name: str
    accelerator: AcceleratorConfig
    training: TrainingConfig
    shared_kv: bool = True


def rows(accelerator: AcceleratorConfig, training: TrainingConfig, vocab_size: int) -> list[Row]:
    """The base and what is changed about it, one thing at a time; the base comes first."""
    base = Row("base", accelerator, training)

    def shape(name: str, **changes: Any) -> Row:
        return replace(base, name=name, accelerator=replace(accelerator, **changes))

    def loss(name: str, **changes: Any) -> Row:
        return replace(base, name=name, training=replace(training, **changes))

    return [
        base,
        shape("no start conditioning", conditioned=False),
        *(shape(f"depth {k}", depth=k) for k in (3, 4, 6, 8, 10) if k != accelerator.depth),
        *(shape(f"rank {r}", rank=r) for r in (8, 32, 64, 128) if r != accelerator.rank),
        replace(base, name="own keys and values", shared_kv=False),
        loss("no alignment term", alignment=0.0),
        loss("no hard term", hard=0.0),
        loss("one pass", num_passes=1),
        *(
            shape(f"draft vocabulary {size}", draft_vocab_size=size)
            for size in (4096, 8192, 16384, vocab_size)
            if size != accelerator.draft_vocab_size
        ),
    ]


def ablate(
    request: TuneRequest,
    work_dir: Path,
    target: Path,
    runner: Runner,
    on_row: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train every row with the request's budget and write the figures to ``target``.

    Args:
        on_row: called with each row once it is measured.

    Raises: as :func:`engine.residuals.tuning.tune`.
    """
    check(request)
    target = target.with_suffix(".json")
    with Store(work_dir).locked():
        deepest = replace(request, accelerator=replace(request.accelerator, depth=DEEPEST))
        prepared = prepare(deepest, work_dir, runner, num_runs=16)
        report = _read(target)
        budget = {
            "model": prepared.name, "data": {**asdict(request.data), "folder": prepared.folder},
            "tokens_written": prepared.corpus.sequences.num_new_tokens,
            "held_out_tokens": prepared.held_out.num_new_tokens,
            "steps": request.steps, "training": asdict(prepared.training), "device": request.device,
        }  # fmt: skip
        if report.get("budget") not in (None, budget):
            raise TuningError(f"{target} has rows of another budget; give another file.")
        report = {"machine": asdict(machine()), "budget": budget, "rows": report.get("rows", [])}
        vocab_size = prepared.decoder.config.vocab_size
        known = {row["name"] for row in report["rows"]}
        for row in rows(request.accelerator, prepared.training, vocab_size):
            if row.name in known:
                continue
            for measured in _measure(row, prepared, request, work_dir, runner):
                report["rows"].append(measured)
                on_row(measured)
            Store(target.parent).save_facts(target.stem, report)
        return report


def _measure(
    row: Row, prepared: Prepared, request: TuneRequest, work_dir: Path, runner: Runner
) -> list[dict[str, Any]]:
    """The row; before the base also what it does untrained, and with the fitted exit alone."""
    objective_type = Objective if row.shared_kv else OwnKeysObjective
    changed = replace(prepared, training=row.training)
    run = Run(changed, replace(request, accelerator=row.accelerator), work_dir, runner, objective_type)
    started = time.monotonic()
    facts = {
        "accelerator": asdict(row.accelerator),
        "training": asdict(row.training),
        "shared_kv": row.shared_kv,
    }
    cost = draft_cost(prepared.decoder, row.accelerator)
    results = []

    def add(name: str, agreements: list[float], **more: Any) -> None:
        results.append({
            "name": name, **facts, **more, "greedy_agreement_by_draft_position": agreements, **cost,
            "predicted_speedup": predicted_speedup(agreements, cost["draft_bytes_share"]),
        })  # fmt: skip

    if row.name == "base":
        add("untrained", _agreements(run, "untrained"), tokens_seen=0)
    run.initialise()
    ridge = _agreements(run, "ridge")
    if row.name == "base":
        add("ridge exit alone", ridge, tokens_seen=0)
    run.train()
    trained = _agreements(run, "measured")
    add(
        row.name, trained, tokens_seen=run.tokens_seen, ridge_only=ridge,
        parameters=run.accelerator.num_parameters, seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip
    run.store.remove("*")
    return results


def _agreements(run: Run, name: str) -> list[float]:
    measured: list[float] = run.measure(name)["greedy_agreement_by_draft_position"]["held_out"]
    return measured


def draft_cost(decoder: Decoder, config: AcceleratorConfig) -> dict[str, float]:
    """What one draft step costs, against one token of the model: multiplications and bytes of weights.

    Bytes are those of int4 base weights and bfloat16 adapters; the slow and the accelerated row of a draft
    step go through each base matrix together, so its bytes count once and its multiplications twice. The head is that of
    all tokens that can be drafted; on a CPU there are at most ``MOST_ROWS`` at a time.
    """
    model = decoder.config
    layer = decoder.layers[0]
    per_layer = sum(m.in_features * m.out_features for m in layer.matrices())
    hidden, heads, inner = model.hidden_size, model.num_heads * model.head_dim, model.intermediate_size
    adapters = config.depth * config.rank * (2 * (hidden + heads) + (hidden + 2 * inner) + (inner + hidden))
    maps = hidden * hidden * (3 if config.conditioned else 1)
    head = min(config.draft_vocab_size, model.vocab_size) * hidden
    full = num_weights(decoder)
    flops = 2 * config.depth * per_layer + adapters + maps + head
    size = (config.depth * per_layer + head) * INT4_BYTES + (adapters + maps) * ADAPTER_BYTES
    return {
        "draft_flops_share": round(flops / full, 4),
        "draft_bytes_share": round(size / (full * INT4_BYTES), 4),
    }


def predicted_speedup(agreements: list[float], cost: float) -> dict[str, float]:
    """The best greedy speedup over draft lengths, if time were bytes read: a round of ``d`` draft steps and
    one pass of the model gives ``1 + a1 + a1 a2 + ...`` tokens for ``1 + d cost`` passes."""
    best, tokens, reached = {"draft_length": 0.0, "speedup": 1.0}, 1.0, 1.0
    for length, agreement in enumerate(agreements, 1):
        reached *= agreement
        tokens += reached
        speedup = tokens / (1 + length * cost)
        if speedup > best["speedup"]:
            best = {"draft_length": float(length), "speedup": round(speedup, 3)}
    return best


def table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| row | exit alone | 1st | 2nd | 3rd | 6th | bytes | multiplications | predicted speedup |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        shares = [row["greedy_agreement_by_draft_position"][place] for place in (0, 1, 2, 5)]
        cells = [f"{row['ridge_only'][0]:.1%}" if "ridge_only" in row else "", *(f"{s:.1%}" for s in shares)]
        cells += [f"{row['draft_bytes_share']:.0%}", f"{row['draft_flops_share']:.0%}"]
        best = row["predicted_speedup"]
        cells.append(f"{best['speedup']:.2f} with {best['draft_length']:.0f}")
        lines.append(" | ".join(["| " + row["name"], *(cell.replace("%", " %") for cell in cells)]) + " |")
    return "\n".join(lines)


def _read(target: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return report
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TuningError(f"{target} is not an ablation report; give another file.") from error
