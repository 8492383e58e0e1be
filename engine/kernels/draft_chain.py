"""The drafts of a round behind one another in one command: rank 0 puts each step's tokens in order and decides whether there is
another, by the rules of :mod:`engine.decoding.draft_plan`, while the others wait at a barrier."""

from __future__ import annotations

from typing import Any

from engine.kernels.barrier import wait
from engine.kernels.choice_fields import (
    BEST,
    CHANCES,
    DRAFTED,
    MOST_RANKED,
    NUM_DRAFTED,
    RANKED,
    TOTAL,
)  # fmt: skip
from engine.kernels.choice_fields import (
    LEAST as LEAST_CHANCE,
)
from engine.kernels.choices import rank_drafts
from engine.kernels.compiling import compiled
from engine.kernels.control import (
    CHAIN,
    CHOICE,
    CONDITION,
    DRAFT_BUFFER,
    DRAFT_TOTAL,
    HIDDEN_SIZE,
    IDS,
    OUT,
    PLAN,
    POSITIONS,
    ROUND,
    SLOTS,
)
from engine.kernels.draft_phases import run_draft
from engine.kernels.intrinsics import get_f32, get_i64, put_i64
from engine.kernels.plan_fields import (
    BINS,
    CONFIDENCE,
    DRAFT_SECONDS,
    DRAFT_TOKEN,
    FACTOR,
    FOLLOWING,
    FORCED,
    KEPT_SECONDS,
    LEAST,
    LIMIT,
    NUM_KEPT,
    NUM_OTHERS,
    NUM_STEPS,
    OFFERED,
    OTHER_CHANCES,
    OTHERS,
    RATE,
    RIGHT,
    ROW_SECONDS,
    SEEN,
    STEP_FIELDS,
    STEPS,
    SURE,
)
from engine.kernels.scalars import get_f64, put_f64
from engine.kernels.whole_round import prepare_pass

_NONE = -1  # instead of a draft, where none can be told


@compiled
def run_drafts(tag: Any, kv: Any, head: Any, kv_size: int, control: int, own: int, rank: int) -> None:
    """As :func:`engine.kernels.draft_phases.run_draft`, step behind step: the exit states follow one another from
    ``DRAFT_BUFFER`` on, and the rows from ``OUT``. ``CHAIN`` is the address of what was drafted; ``CHOICE`` that of a task of
    :mod:`engine.kernels.choices`."""
    step, chance = 0, 1.0
    while True:
        run_draft(tag, kv, head, kv_size, control, own, rank)
        step += 1
        if rank == 0:
            chance = _decide(control, step, chance)
        wait(control, own)
        if get_i64(get_i64(control + 8 * CHAIN) + 8 * NUM_STEPS) != step:
            return


@compiled
def _decide(control: int, step: int, before: float) -> float:
    """Note the draft of a step, counted from 1, and prepare the next if there is to be one.

    Args:
        before: the chance that all drafts before it are right.

    Returns:
        The same, this one included.
    """
    plan, chain = get_i64(control + 8 * PLAN), get_i64(control + 8 * CHAIN)
    is_forced, rate = get_f64(plan + 8 * FORCED) >= 0, get_f64(plan + 8 * RATE)
    row_seconds = get_f64(plan + 8 * (ROW_SECONDS + step))
    least = get_f64(plan + 8 * LEAST) if is_forced else OFFERED * rate * row_seconds / before
    token, confidence = _order(control, chain + 8 * (STEPS + (step - 1) * STEP_FIELDS), step - 1, least)
    place = min(BINS - 1, max(0, int(confidence * BINS)))
    luck = get_f64(plan + 8 * (RIGHT + place)) / get_f64(plan + 8 * (SEEN + place))
    chance = before * min(SURE, get_f64(plan + 8 * FACTOR) * luck)
    is_kept = token != _NONE and (is_forced or chance > rate * get_f64(plan + 8 * (KEPT_SECONDS + step)))
    put_i64(chain + 8 * NUM_KEPT, step if is_kept else step - 1)
    seconds = get_f64(plan + 8 * DRAFT_SECONDS) + row_seconds
    is_worth_it = is_forced or chance * get_f64(plan + 8 * FOLLOWING) > rate * seconds
    if is_kept and is_worth_it and step < get_f64(plan + 8 * LIMIT):
        _prepare(control, token, step)
        put_i64(chain + 8 * NUM_STEPS, step)
    else:
        put_i64(chain + 8 * NUM_STEPS, -step)  # which ends it
        if get_i64(control + 8 * ROUND) != 0:
            prepare_pass(control)
    return chance


@compiled
def _order(control: int, entry: int, place: int, least: float) -> tuple[int, float]:
    """Note a step's likeliest tokens; returns the draft and its confidence."""
    task, total = get_i64(control + 8 * CHOICE), get_i64(control + 8 * DRAFT_TOTAL)
    put_f64(task + 8 * TOTAL, float(get_f32(total)))
    put_f64(task + 8 * BEST, float(get_f32(total + 4)))
    put_f64(task + 8 * LEAST_CHANCE, least)
    put_i64(task + 8 * NUM_DRAFTED, place)
    count = rank_drafts(task)
    token = get_i64(task + 8 * RANKED) if count > 0 else _NONE
    confidence = get_f64(task + 8 * CHANCES) if count > 0 else 0.0
    put_i64(entry + 8 * DRAFT_TOKEN, token)
    put_f64(entry + 8 * CONFIDENCE, confidence)
    put_i64(entry + 8 * NUM_OTHERS, max(0, count - 1))
    for other in range(MOST_RANKED - 1):
        put_i64(entry + 8 * (OTHERS + other), get_i64(task + 8 * (RANKED + 1 + other)))
        put_f64(entry + 8 * (OTHER_CHANCES + other), get_f64(task + 8 * (CHANCES + 1 + other)))
    return token, confidence


@compiled
def _prepare(control: int, token: int, place: int) -> None:
    """Have the next step feed the draft ``token``, the round's number ``place``."""
    size, buffer = get_i64(control + 8 * HIDDEN_SIZE), get_i64(control + 8 * DRAFT_BUFFER)
    put_i64(get_i64(control + 8 * IDS), token)
    put_i64(get_i64(get_i64(control + 8 * CHOICE) + 8 * DRAFTED) + 8 * (place - 1), token)
    put_i64(control + 8 * CONDITION, buffer)
    put_i64(control + 8 * DRAFT_BUFFER, buffer + 4 * size)
    put_i64(control + 8 * OUT, get_i64(control + 8 * OUT) + 8 * size)
    positions, slots = get_i64(control + 8 * POSITIONS), get_i64(control + 8 * SLOTS)
    for row in range(2):
        put_i64(positions + 8 * row, get_i64(positions + 8 * row) + 1)
    put_i64(slots, get_i64(slots) + 1)
