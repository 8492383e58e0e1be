"""How a token is chosen from logits, and a draft from a draft distribution, as native code: what
:mod:`engine.decoding.sampling` says in numpy, whose every little operation takes some microseconds behind a pass that swept
the caches. What is rare it leaves to that."""

from __future__ import annotations

import math

import numpy as np

from engine.kernels.block_notes import note_row, padded
from engine.kernels.choice_fields import (
    ALONE,
    ARE_NOTED,
    BEST,
    CHANCES,
    DRAFTED,
    FEWER,
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
    NOTES,
    NUM_DRAFTED,
    NUM_RANKED,
    NUM_SEEN,
    PENALTY,
    POSITION,
    RANKED,
    SCRATCH,
    SEEN,
    SHARPNESS,
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
from engine.kernels.control import BLOCK
from engine.kernels.intrinsics import get_f32, get_i8, get_i64, put_i64, top
from engine.kernels.rows import weighed_total
from engine.kernels.scalars import arrival, exp_of, get_f64, log_of, put_f64, random_bits
from engine.kernels.shortlists import (
    collect,
    collect_from_blocks,
    first_of,
    heaviest,
    keep_from,
    mass_of,
    sort_heaviest,
)

_NOTHING = 1e-9  # what a token below loses by a penalty does not count
_LEFT = 0.05  # of what the penalty takes, at least, has to be left for that to be told by subtraction
_MARGIN = 0.1  # by which a penalty may lower the best draft without a second look at all


@compiled
def _score(task: int, token: int) -> float:
    """A token's logit after the penalty."""
    logit = get_f32(get_i64(task + 8 * LOGITS) + 4 * token)
    if get_i64(task + 8 * NUM_SEEN) != 0 and get_i8(get_i64(task + 8 * MASK) + token) != 0:
        return _penalized(logit, np.float32(get_f64(task + 8 * PENALTY)))
    return logit


@compiled
def _reach(task: int, bound: float) -> int:
    """The tokens whose logits before the penalty, which only lowers them, reach ``bound``. Returns how many they are; one more
    than ``MOST_ALONE``: too many."""
    return collect_from_blocks(
        get_i64(task + 8 * LOGITS),
        get_i64(task + 8 * SIZE),
        get_i64(task + 8 * NOTES),
        bound,
        get_i64(task + 8 * SCRATCH),
        MOST_ALONE,
    )


@compiled
def _best(task: int) -> float:
    """The best score. Infinite: there are values that are no numbers, or too many good ones."""
    best = top(get_i64(task + 8 * NOTES), padded((get_i64(task + 8 * SIZE) + BLOCK - 1) // BLOCK))
    if get_i64(task + 8 * NUM_SEEN) == 0 or not -math.inf < best < math.inf:
        return best
    # If the best logit was seen, it is this much at least.
    floor = _penalized(best, np.float32(get_f64(task + 8 * PENALTY)))
    count, tokens = _reach(task, floor), get_i64(task + 8 * SCRATCH)
    if count > MOST_ALONE:
        return math.inf
    best = floor
    for number in range(count):
        best = max(best, _score(task, get_i64(tokens + 8 * number)))
    return best


@compiled
def _weigh(task: int, best: float, least: float) -> int:
    """The tokens that weigh ``least`` or more, the best one 1, and their weights. Returns how many they are; 0: too many."""
    tokens, temperature = get_i64(task + 8 * SCRATCH), get_f64(task + 8 * TEMPERATURE)
    weights, bound = tokens + 8 * MOST_ALONE, np.float32(best + temperature * log_of(least))
    found, count = _reach(task, bound), 0
    if found > MOST_ALONE:
        return 0
    for number in range(found):
        token = get_i64(tokens + 8 * number)
        score = _score(task, token)
        if score >= bound:
            put_i64(tokens + 8 * count, token)
            put_f64(weights + 8 * count, 1.0 if score == best else exp_of((score - best) / temperature))
            count += 1
    return count


@compiled
def _stream(task: int, ahead: int) -> int:
    """Where the random numbers begin of a position, so many behind the task's."""
    return random_bits(get_i64(task + 8 * KEY), get_i64(task + 8 * POSITION) + ahead)


@compiled
def pick(task: int) -> int:
    """The choice, after the penalty; -1: it cannot be told so."""
    size, tokens = get_i64(task + 8 * SIZE), get_i64(task + 8 * SCRATCH)
    weights, stream = tokens + 8 * MOST_ALONE, _stream(task, 0)
    top_k, top_p, min_p = get_i64(task + 8 * TOP_K), get_f64(task + 8 * TOP_P), get_f64(task + 8 * MIN_P)
    best = _best(task)
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
    maxima, blocks = get_i64(task + 8 * NOTES), (get_i64(task + 8 * SIZE) + BLOCK - 1) // BLOCK
    count, temperature = padded(blocks), get_f64(task + 8 * TEMPERATURE)
    sharpness = np.float32(get_f64(task + 8 * SHARPNESS))
    raw = top(maxima, count)  # before the penalty
    total = float(weighed_total(maxima + 4 * count, maxima, raw, sharpness, count))
    if get_i64(task + 8 * NUM_SEEN) == 0:
        return total
    lost = _lost(task, raw)
    if total - lost < _LEFT * lost:  # which the sum is not exact enough for
        return _total_one_by_one(task, best)
    return (total - lost) / exp_of((best - raw) / temperature)


@compiled
def _lost(task: int, raw: float) -> float:
    """What the penalty takes from all tokens, where one with the logit ``raw`` weighs 1."""
    logits, maxima, size = get_i64(task + 8 * LOGITS), get_i64(task + 8 * NOTES), get_i64(task + 8 * SIZE)
    temperature, penalty = get_f64(task + 8 * TEMPERATURE), np.float32(get_f64(task + 8 * PENALTY))
    seen, lost, bound = get_i64(task + 8 * SEEN), 0.0, raw + temperature * log_of(_NOTHING)
    for number in range(get_i64(task + 8 * NUM_SEEN)):
        token = get_i64(seen + 8 * number)
        if token < size and get_f32(maxima + 4 * (token // BLOCK)) > bound:
            logit = get_f32(logits + 4 * token)
            if logit > bound:
                after = _penalized(logit, penalty)
                lost += exp_of((logit - raw) / temperature) - exp_of((after - raw) / temperature)
    return lost


@compiled
def _total_one_by_one(task: int, best: float) -> float:
    """As :func:`_total`."""
    temperature, total = get_f64(task + 8 * TEMPERATURE), 0.0
    for token in range(get_i64(task + 8 * SIZE)):
        total += exp_of((_score(task, token) - best) / temperature)
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
        count = collect(weights, 0, size, np.float32(bound), places, 0, MOST_ALONE)
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
        if get_i64(task + 8 * ARE_NOTED) == 0:
            logits, size = get_i64(task + 8 * LOGITS), get_i64(task + 8 * SIZE)
            note_row(logits, size, np.float32(get_f64(task + 8 * SHARPNESS)), get_i64(task + 8 * NOTES))
        put_i64(task + 8 * TOKEN, pick(task))

    def rank(task: int) -> None:
        put_i64(task + 8 * NUM_RANKED, rank_drafts(task))

    return compile_entry_points(choose, rank)
