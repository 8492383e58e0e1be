"""How a token is chosen from logits, and a draft from a draft distribution, as native code: what
:mod:`engine.decoding.sampling` says in numpy, whose every little operation takes some microseconds behind a pass that swept
the caches. What is rare it leaves to that."""

from __future__ import annotations

import math

import numpy as np

from engine.kernels.choice_fields import (
    ALONE,
    BEST,
    CHANCES,
    DRAFTED,
    FEWER,
    KEPT,
    KEY,
    LEAST,
    LIKELY,
    LOGITS,
    MASK,
    MIN_P,
    MOST_ALONE,
    MOST_LIKELY,
    MOST_RANKED,
    NEGLIGIBLE,
    NUM_DRAFTED,
    NUM_RANKED,
    NUM_SEEN,
    PENALTY,
    POSITION,
    RANKED,
    SCRATCH,
    SEEN,
    SIZE,
    TEMPERATURE,
    TOKEN,
    TOKENS,
    TOP_K,
    TOP_P,
    TOTAL,
    WEIGHTS,
)
from engine.kernels.compiling import compile_entry_points, compiled
from engine.kernels.intrinsics import LANES, get_f32, get_i8, get_i64, put_f32, put_i64
from engine.kernels.rows import exp_total
from engine.kernels.scalars import arrival, exp_of, get_f64, log_of, put_f64, random_bits
from engine.kernels.shortlists import collect, first_of, heaviest, keep_from, largest, mass_of, sort_heaviest

_MARGIN = 0.1  # by which a penalty may lower the best draft without a second look at all


@compiled
def _weigh(task: int, best: float, least: float) -> int:
    """The tokens that weigh ``least`` or more, the best one 1, and their weights. Returns how many they are; 0: too many, or
    not all of them numbers."""
    logits, tokens = get_i64(task + 8 * LOGITS), get_i64(task + 8 * SCRATCH)
    temperature, weights = get_f64(task + 8 * TEMPERATURE), tokens + 8 * MOST_ALONE
    bound = np.float32(best + temperature * log_of(least))
    count = collect(logits, get_i64(task + 8 * SIZE), bound, tokens, MOST_ALONE)
    if count > MOST_ALONE:
        return 0
    for number in range(count):
        score = get_f32(logits + 4 * get_i64(tokens + 8 * number))
        if not score <= best:
            return 0
        put_f64(weights + 8 * number, 1.0 if score == best else exp_of((score - best) / temperature))
    return count


@compiled
def _stream(task: int, ahead: int) -> int:
    """Where the random numbers begin of a position, so many behind the task's."""
    return random_bits(get_i64(task + 8 * KEY), get_i64(task + 8 * POSITION) + ahead)


@compiled
def _pick(task: int) -> int:
    """The choice, after the penalty; -1: it cannot be told so."""
    size, tokens = get_i64(task + 8 * SIZE), get_i64(task + 8 * SCRATCH)
    weights, stream = tokens + 8 * MOST_ALONE, _stream(task, 0)
    top_k, top_p, min_p = get_i64(task + 8 * TOP_K), get_f64(task + 8 * TOP_P), get_f64(task + 8 * MIN_P)
    best = largest(get_i64(task + 8 * LOGITS), size)
    if not -math.inf < best < math.inf:
        return -1
    if get_f64(task + 8 * TEMPERATURE) == 0:
        return get_i64(tokens) if _weigh(task, best, 1.0) else -1
    first, count = 0, 0  # of what is left
    if 0 < top_k < size:
        for least in (FEWER, ALONE, NEGLIGIBLE):
            count = _weigh(task, best, least)
            if count == 0 or count >= top_k:
                break
        if count == 0:
            return -1
        first = count - sort_heaviest(tokens, weights, count, top_k, math.inf)
        if top_p < 1:
            first = heaviest(weights, first, count, top_p)
    elif top_p < 1:
        enough = top_p * _total(task, best)
        for least in (FEWER, ALONE):
            count = _weigh(task, best, least)
            first = count - sort_heaviest(tokens, weights, count, count, enough)
            if count == 0 or mass_of(weights, first, count) >= enough:
                break
        if count == 0 or not mass_of(weights, first, count) >= enough:
            return -1
    elif min_p > 0:
        count = _weigh(task, best, min_p)
    else:
        least = ALONE
        count = _weigh(task, best, least)
        if count == 0:
            least = FEWER
            count = _weigh(task, best, least)
        if count == 0:
            return -1
        place = first_of(tokens, weights, count, stream)
        earliest = arrival(stream, get_i64(tokens + 8 * place)) / get_f64(weights + 8 * place)
        # One of the unlikely ones may be it.
        return (
            -1 if arrival(stream, size) < earliest * least * (size - count) else get_i64(tokens + 8 * place)
        )
    if min_p > 0:
        if count == 0 or min_p < NEGLIGIBLE:
            return -1
        count = first + keep_from(tokens + 8 * first, weights + 8 * first, count - first, min_p)
    place = first_of(tokens + 8 * first, weights + 8 * first, count - first, stream)
    return get_i64(tokens + 8 * (first + place))


@compiled
def _total(task: int, best: float) -> float:
    """What all tokens weigh together, the best one 1."""
    logits, size = get_i64(task + 8 * LOGITS), get_i64(task + 8 * SIZE)
    temperature, whole = get_f64(task + 8 * TEMPERATURE), size // LANES * LANES
    total = float(exp_total(logits, best, np.float32(1 / temperature), whole))
    for place in range(whole, size):
        total += exp_of((get_f32(logits + 4 * place) - best) / temperature)
    return total


@compiled
def _penalized(logit: float, penalty: float) -> float:
    return logit * penalty if logit < 0 else logit / penalty


@compiled
def _is_seen(task: int, token: int) -> bool:
    drafted = get_i64(task + 8 * DRAFTED)
    for number in range(get_i64(task + 8 * NUM_DRAFTED)):
        if get_i64(drafted + 8 * number) == token:
            return True
    return get_i8(get_i64(task + 8 * MASK) + token) != 0


@compiled
def _likely(task: int, least: float) -> int:
    """The places of drafts from the weight ``least`` on, the largest one's 1, as they are after the penalty; their weights
    behind them. Returns how many they are; 0: too many."""
    weights, size, places = (
        get_i64(task + 8 * WEIGHTS),
        get_i64(task + 8 * SIZE),
        get_i64(task + 8 * SCRATCH),
    )
    found, tokens = places + 8 * MOST_ALONE, get_i64(task + 8 * TOKENS)
    penalty, raw_best = get_f64(task + 8 * PENALTY), get_f64(task + 8 * BEST)
    bound, best, total = least, 0.0, get_f64(task + 8 * TOTAL)
    for attempt in range(2):
        bound = least * (_MARGIN if attempt == 0 else best) if penalty != 1 else least
        count = collect(weights, size, np.float32(bound), places, MOST_ALONE)
        if count > MOST_ALONE:
            return 0
        best, total = 0.0, get_f64(task + 8 * TOTAL)
        for number in range(count):
            place = get_i64(places + 8 * number)
            weight = float(get_f32(weights + 4 * place))
            if penalty != 1 and _is_seen(task, get_i64(tokens + 8 * place)):
                after = exp_of(_penalized(log_of(weight) + raw_best, penalty) - raw_best)
                total += after - weight
                weight = after
            put_f64(found + 8 * number, weight)
            best = max(best, weight)
        if penalty == 1 or best * least >= bound:
            break
    if not best > 0:
        return 0
    count = keep_from(places, found, count, best * least)
    for number in range(count):
        put_f64(found + 8 * number, get_f64(found + 8 * number) / best)
    put_f64(task + 8 * TOTAL, total / best)
    if count > MOST_LIKELY:  # at high temperatures most are likely
        first = count - sort_heaviest(places, found, count, MOST_LIKELY, math.inf)
        for number in range(MOST_LIKELY):
            put_i64(places + 8 * number, get_i64(places + 8 * (first + number)))
            put_f64(found + 8 * number, get_f64(found + 8 * (first + number)))
    return min(count, MOST_LIKELY)


@compiled
def rank_drafts(task: int) -> int:
    """Fill in the best few; returns how many, or 0: it cannot be told so."""
    temperature, least = get_f64(task + 8 * TEMPERATURE), get_f64(task + 8 * LEAST)
    stream = _stream(task, get_i64(task + 8 * NUM_DRAFTED))
    greedy, tokens = temperature == 0, get_i64(task + 8 * TOKENS)
    penalty = get_f64(task + 8 * PENALTY)
    if penalty < 1:  # an unlikely one may become a likely one
        return 0
    if greedy:
        # What the penalty takes from the likely ones counts, whoever is asked for.
        most = 1.0 if penalty == 1 else LIKELY
        bound = min(most, max(NEGLIGIBLE, least * get_f64(task + 8 * TOTAL)))
    else:
        bound = exp_of(log_of(LIKELY) * temperature)
    count = _likely(task, bound)
    if count == 0:
        return 0
    places = get_i64(task + 8 * SCRATCH)
    speeds = places + 8 * MOST_ALONE
    total = get_f64(task + 8 * TOTAL) if greedy else 0.0
    for number in range(count):
        token = get_i64(tokens + 8 * get_i64(places + 8 * number))
        put_i64(places + 8 * number, token)
        if not greedy:
            weight = get_f64(speeds + 8 * number)
            speed = exp_of(log_of(weight) / temperature) / arrival(stream, token)
            put_f64(speeds + 8 * number, speed)
            total += speed
    ranked = sort_heaviest(places, speeds, count, MOST_RANKED, math.inf)
    kept = 0
    for number in range(ranked):
        chance = get_f64(speeds + 8 * (count - 1 - number)) / total
        if number == 0 or chance >= least:
            put_i64(task + 8 * (RANKED + kept), get_i64(places + 8 * (count - 1 - number)))
            put_f64(task + 8 * (CHANCES + kept), chance)
            kept += 1
    return kept


def native_code() -> dict[str, tuple[str, bytes]]:
    """The entry points, compiled for this CPU: of each its symbol and its object file.

    ``choose(task)`` and ``rank(task)``: see :mod:`engine.kernels.choice_fields`.
    """

    def choose(task: int) -> None:
        logits, penalty = get_i64(task + 8 * LOGITS), np.float32(get_f64(task + 8 * PENALTY))
        seen, count, size = get_i64(task + 8 * SEEN), get_i64(task + 8 * NUM_SEEN), get_i64(task + 8 * SIZE)
        kept = get_i64(task + 8 * KEPT)
        for number in range(count):  # in place: the logits are put back below
            token = get_i64(seen + 8 * number)
            if token < size:
                logit = get_f32(logits + 4 * token)
                put_f32(kept + 4 * number, logit)
                put_f32(logits + 4 * token, _penalized(logit, penalty))
        put_i64(task + 8 * TOKEN, _pick(task))
        for number in range(count):
            token = get_i64(seen + 8 * number)
            if token < size:
                put_f32(logits + 4 * token, get_f32(kept + 4 * number))

    def rank(task: int) -> None:
        put_i64(task + 8 * NUM_RANKED, rank_drafts(task))

    return compile_entry_points(choose, rank)
