"""A round of self-speculation in one command: behind the drafts, rank 0 puts together the pass that verifies them and, behind
that, accepts what the model itself would have chosen, by the rules of :mod:`engine.decoding.m2r2`,
:mod:`engine.decoding.context`, :mod:`engine.decoding.controller` and :mod:`engine.decoding.acceptance`.

Between two commands Python finds nothing in the caches: a tenth of a small model's time went there.
"""

from __future__ import annotations

from engine.kernels.choice_fields import ARE_NOTED, MASK, NUM_SEEN, PENALTY, POSITION, SIZE
from engine.kernels.choice_fields import LOGITS as CHOICE_LOGITS
from engine.kernels.choice_fields import NOTES as CHOICE_NOTES
from engine.kernels.choice_fields import SEEN as SEEN_TOKENS
from engine.kernels.choices import pick
from engine.kernels.compiling import compiled
from engine.kernels.control import (
    BEGUN,
    CHAIN,
    CHOICE,
    FIRST,
    HIDDEN,
    IDS,
    LAST,
    LINEAR,
    LOGITS,
    NOTES,
    OUT,
    OUTPUTS,
    PLAN,
    POSITIONS,
    ROUND,
    ROWS,
    SLOTS,
)
from engine.kernels.intrinsics import get_i8, get_i64, put_i8, put_i64
from engine.kernels.matches import find_match
from engine.kernels.plan_fields import (
    ALTERNATIVE,
    BINS,
    CONFIDENCE,
    DRAFT_TOKEN,
    FACTOR,
    FORCED,
    HIGHEST_OTHER,
    KEPT_SECONDS,
    NUM_KEPT,
    NUM_OTHERS,
    NUM_STEPS,
    OTHER_CHANCES,
    OTHER_RIGHT,
    OTHER_SEEN,
    OTHERS,
    RATE,
    RIGHT,
    ROW_SECONDS,
    SEEN,
    STEP_FIELDS,
    STEPS,
    SURE,
)
from engine.kernels.round_fields import (
    ALTERNATIVE_PLACES,
    ALTERNATIVES,
    CHAIN_TOKENS,
    FOUND,
    HAS_ALTERNATIVE,
    HAS_SLOW_STATES,
    INDEX,
    LAST_TOKEN,
    LONGEST_MATCH,
    LUCK_RIGHT,
    LUCK_SEEN,
    MATCH_LENGTH,
    MOST_FROM_CONTEXT,
    MOST_ROWS,
    NEW_TOKENS,
    NOTE_STEP,
    NUM_ALTERNATIVES,
    NUM_CHAIN,
    NUM_NEW,
    NUM_RIGHT,
    NUM_TOKENS,
    PASS_FIRST,
    PASS_LAST,
    PASS_OUT,
    ROOM,
    ROW,
    SLOW_STATES,
    SLOW_STEP,
    TEXT,
    WORTH,
    WORTHS,
)
from engine.kernels.scalars import get_f64, put_f64

_TAKEN = -1.0  # instead of an alternative's chance


@compiled
def prepare_pass(control: int) -> None:
    """Have the command go on with the pass that verifies the drafts made, some from the context behind them, and alternatives."""
    task, chain = get_i64(control + 8 * ROUND), get_i64(control + 8 * CHAIN)
    steps, kept = -get_i64(chain + 8 * NUM_STEPS), get_i64(chain + 8 * NUM_KEPT)
    for number in range(kept):
        token = get_i64(chain + 8 * (STEPS + number * STEP_FIELDS + DRAFT_TOKEN))
        put_i64(task + 8 * (CHAIN_TOKENS + number), token)
    put_i64(task + 8 * MATCH_LENGTH, 0)
    drafts = kept
    if kept == steps and get_i64(task + 8 * INDEX) != 0:
        drafts = _take_from_context(control, kept)
    put_i64(task + 8 * NUM_CHAIN, drafts)
    others = 0
    if get_f64(get_i64(control + 8 * PLAN) + 8 * FORCED) < 0:
        others = _take_alternatives(control, kept, steps, drafts)
    put_i64(task + 8 * NUM_ALTERNATIVES, others)
    _lay_out(control, steps, drafts, others)


@compiled
def _chance(plan: int, chain: int, number: int) -> float:
    """That a draft is right if those before it are."""
    confidence = get_f64(chain + 8 * (STEPS + number * STEP_FIELDS + CONFIDENCE))
    place = min(BINS - 1, max(0, int(confidence * BINS)))
    luck = get_f64(plan + 8 * (RIGHT + place)) / get_f64(plan + 8 * (SEEN + place))
    return min(SURE, get_f64(plan + 8 * FACTOR) * luck)


@compiled
def _take_from_context(control: int, kept: int) -> int:
    """How many drafts there are with what follows them in the context, as far as that is worth its rows."""
    task, chain = get_i64(control + 8 * ROUND), get_i64(control + 8 * CHAIN)
    plan, index, tokens = (
        get_i64(control + 8 * PLAN),
        get_i64(task + 8 * INDEX),
        get_i64(task + 8 * NUM_TOKENS),
    )
    text, chance = get_i64(index + 8 * TEXT), 1.0
    for number in range(kept):
        put_i64(text + 8 * (tokens + number), get_i64(task + 8 * (CHAIN_TOKENS + number)))
        chance *= _chance(plan, chain, number)
    length = find_match(index, tokens, tokens + kept)
    if length == 0:
        return kept
    put_i64(task + 8 * MATCH_LENGTH, length)
    first, worth = get_i64(index + 8 * FOUND), get_f64(task + 8 * WORTH)
    most = min(get_i64(task + 8 * ROOM), get_i64(task + 8 * MOST_FROM_CONTEXT), kept + tokens - first)
    drafts = kept
    while drafts < most:
        known = min(length + drafts - kept, LONGEST_MATCH)
        right = get_f64(get_i64(task + 8 * LUCK_RIGHT) + 8 * known)
        chance *= right / get_f64(get_i64(task + 8 * LUCK_SEEN) + 8 * known)
        if chance <= worth * get_f64(plan + 8 * (ROW_SECONDS + drafts)):
            break
        put_i64(task + 8 * (CHAIN_TOKENS + drafts), get_i64(text + 8 * (first + drafts - kept)))
        drafts += 1
    return drafts


@compiled
def _take_alternatives(control: int, kept: int, steps: int, drafts: int) -> int:
    """Choose among the tokens that were offered in place of drafts, the likeliest first; returns how many."""
    task, chain, plan = (
        get_i64(control + 8 * ROUND),
        get_i64(control + 8 * CHAIN),
        get_i64(control + 8 * PLAN),
    )
    worths, before, offered = task + 8 * WORTHS, 1.0, 0
    for place in range(kept):
        entry = chain + 8 * (STEPS + place * STEP_FIELDS)
        for other in range(get_i64(entry + 8 * NUM_OTHERS)):
            probability = get_f64(entry + 8 * (OTHER_CHANCES + other))
            number = min(BINS - 1, max(0, int(probability / (HIGHEST_OTHER / BINS))))
            luck = get_f64(plan + 8 * (OTHER_RIGHT + number)) / get_f64(plan + 8 * (OTHER_SEEN + number))
            put_f64(worths + 8 * offered, before * luck)
            offered += 1
        before *= _chance(plan, chain, place)
    room, count = min(get_i64(task + 8 * ROOM), MOST_ROWS - 1) - drafts, 0
    while count < min(room, offered):
        best, chance = 0, _TAKEN
        for number in range(offered):
            if get_f64(worths + 8 * number) > chance:
                best, chance = number, get_f64(worths + 8 * number)
        cost = get_f64(plan + 8 * (ROW_SECONDS + drafts + count))
        if count == 0 and steps > drafts:
            cost = get_f64(plan + 8 * (KEPT_SECONDS + drafts + 1))
        if chance <= ALTERNATIVE * get_f64(plan + 8 * RATE) * cost:
            break
        put_f64(worths + 8 * best, _TAKEN)
        place = 0
        while best >= get_i64(chain + 8 * (STEPS + place * STEP_FIELDS + NUM_OTHERS)):
            best -= get_i64(chain + 8 * (STEPS + place * STEP_FIELDS + NUM_OTHERS))
            place += 1
        token = get_i64(chain + 8 * (STEPS + place * STEP_FIELDS + OTHERS + best))
        put_i64(task + 8 * (ALTERNATIVES + count), token)
        put_i64(task + 8 * (ALTERNATIVE_PLACES + count), place)
        count += 1
    return count


@compiled
def _lay_out(control: int, steps: int, drafts: int, others: int) -> None:
    """The rows: those of the chain, the first ``steps`` of which are some layers deep, if their states are the model's own, and
    the alternatives."""
    task = get_i64(control + 8 * ROUND)
    begun = steps if get_i64(task + 8 * HAS_SLOW_STATES) != 0 else 0
    for row in range(begun):
        address = get_i64(task + 8 * SLOW_STATES) + row * get_i64(task + 8 * SLOW_STEP)
        put_i64(get_i64(control + 8 * HIDDEN) + 8 * row, address)
    positions, slots, ids = (
        get_i64(control + 8 * POSITIONS),
        get_i64(control + 8 * SLOTS),
        get_i64(control + 8 * IDS),
    )
    start = get_i64(task + 8 * NUM_TOKENS) - 1
    rows = 1 + drafts + others
    for row in range(rows):
        place, token = row, get_i64(task + 8 * LAST_TOKEN)
        if row > drafts:
            place = 1 + get_i64(task + 8 * (ALTERNATIVE_PLACES + row - 1 - drafts))
            token = get_i64(task + 8 * (ALTERNATIVES + row - 1 - drafts))
        elif row > 0:
            token = get_i64(task + 8 * (CHAIN_TOKENS + row - 1))
        put_i64(positions + 8 * row, start + place)
        put_i64(slots + 8 * row, start + row)
        if row >= begun:
            put_i64(ids + 8 * (row - begun), token)
    put_i64(control + 8 * ROWS, rows)
    put_i64(control + 8 * BEGUN, begun)
    put_i64(control + 8 * FIRST, get_i64(task + 8 * PASS_FIRST))
    put_i64(control + 8 * LAST, get_i64(task + 8 * PASS_LAST))
    put_i64(control + 8 * OUT, get_i64(task + 8 * PASS_OUT))


@compiled
def accept_rows(control: int) -> None:
    """Choose the model's tokens up to one that is not drafted, or follows the last draft."""
    task, choice = get_i64(control + 8 * ROUND), get_i64(control + 8 * CHOICE)
    drafts, count, place, row = get_i64(task + 8 * NUM_CHAIN), 0, 0, 0
    has_alternative, seen = 0, get_i64(choice + 8 * NUM_SEEN)
    put_i64(choice + 8 * SIZE, get_i64(get_i64(control + 8 * LINEAR) + 8 * OUTPUTS))
    put_i64(choice + 8 * ARE_NOTED, 1)
    while True:
        token = _choose(control, row, count)
        if token < 0:
            count = 0
            break
        put_i64(task + 8 * (NEW_TOKENS + count), token)
        count += 1
        if has_alternative != 0 or place == drafts:
            break
        _note_seen(choice, token)
        if token == get_i64(task + 8 * (CHAIN_TOKENS + place)):
            place += 1
            row = place
            continue
        for other in range(get_i64(task + 8 * NUM_ALTERNATIVES)):
            if (
                get_i64(task + 8 * (ALTERNATIVE_PLACES + other)) == place
                and get_i64(task + 8 * (ALTERNATIVES + other)) == token
            ):
                has_alternative, row = 1, drafts + 1 + other
                break
        if has_alternative == 0:
            break
    _forget_seen(choice, seen)
    put_i64(task + 8 * NUM_NEW, count)
    put_i64(task + 8 * NUM_RIGHT, place)
    put_i64(task + 8 * HAS_ALTERNATIVE, has_alternative)
    put_i64(task + 8 * ROW, row)


@compiled
def _choose(control: int, row: int, before: int) -> int:
    """The model's token for a row, behind so many of this round; -1: it cannot be told so."""
    task, choice = get_i64(control + 8 * ROUND), get_i64(control + 8 * CHOICE)
    size = get_i64(choice + 8 * SIZE)
    put_i64(choice + 8 * POSITION, get_i64(task + 8 * NUM_TOKENS) + before)
    put_i64(choice + 8 * CHOICE_LOGITS, get_i64(control + 8 * LOGITS) + 4 * row * size)
    put_i64(choice + 8 * CHOICE_NOTES, get_i64(control + 8 * NOTES) + row * get_i64(task + 8 * NOTE_STEP))
    return pick(choice)


@compiled
def _note_seen(choice: int, token: int) -> None:
    """For the repetition penalty."""
    if get_f64(choice + 8 * PENALTY) != 1:
        mask, count = get_i64(choice + 8 * MASK), get_i64(choice + 8 * NUM_SEEN)
        if get_i8(mask + token) == 0:
            put_i8(mask + token, 1)
            put_i64(get_i64(choice + 8 * SEEN_TOKENS) + 8 * count, token)
            put_i64(choice + 8 * NUM_SEEN, count + 1)


@compiled
def _forget_seen(choice: int, count: int) -> None:
    """All but the first ``count``: who keeps the text's tokens adds them."""
    tokens, mask = get_i64(choice + 8 * SEEN_TOKENS), get_i64(choice + 8 * MASK)
    for number in range(count, get_i64(choice + 8 * NUM_SEEN)):
        put_i8(mask + get_i64(tokens + 8 * number), 0)
    put_i64(choice + 8 * NUM_SEEN, count)
