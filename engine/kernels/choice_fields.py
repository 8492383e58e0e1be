"""Where in a task of :mod:`engine.kernels.choices` things lie, in int64 each (F: it holds a float64), and what it shares
with :mod:`engine.decoding.sampling`."""

from __future__ import annotations

# Of the best token's weight. Tokens from the first on draw times of their own, or, if those are too many, from the second.
ALONE, FEWER = 1e-6, 1e-3
NEGLIGIBLE = 1e-7  # tokens below change a nucleus hardly ever
LIKELY = 0.02  # others are not drafted
MOST_ALONE = 4096
MOST_LIKELY = 256  # drafts that are looked at
MOST_RANKED = 4  # that are put in order
NO_TOKEN = 1 << 63  # what TOKEN is not below, as an unsigned number, where it cannot be told
# SplitMix64 (Steele, Lea and Flood 2014).
STEP, MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

# Of both tasks:
(
    SIZE,  # of logits, or of draft weights
    TEMPERATURE,  # F; 0: greedy
    PENALTY,  # F
    KEY,  # of the seed's random numbers
    POSITION,  # of the next token
    # Of a choice:
    LOGITS,  # address of float32 [SIZE]
    NOTES,  # address of what is noted of their blocks (:mod:`engine.kernels.block_notes`), or of room for it
    ARE_NOTED,  # 0: that has to be done first
    SHARPNESS,  # F, what logits are multiplied by before they are weighed
    TOP_K,  # 0: off
    TOP_P,  # F
    MIN_P,  # F
    SEEN,  # address of the different tokens so far, int64 [NUM_SEEN]
    NUM_SEEN,
    TOKEN,  # the choice; -1: it cannot be told so
    # Of a ranking:
    WEIGHTS,  # address of float32 [SIZE], the largest 1
    TOKENS,  # address of what they stand for, int64 [SIZE]
    TOTAL,  # F, of the whole distribution's weights
    BEST,  # F, the largest one's logit
    MASK,  # address of which tokens the text holds, a byte each
    DRAFTED,  # address of the drafts from POSITION on, before this one, int64 [NUM_DRAFTED]
    NUM_DRAFTED,
    LEAST,  # F, the chance from which on others than the first are asked for
    NUM_RANKED,  # 0: it cannot be told so
    RANKED,  # the tokens, MOST_RANKED of them
) = range(25)
CHANCES = RANKED + MOST_RANKED  # F, as many
SCRATCH = CHANCES + MOST_RANKED  # address of int64 [2 * MOST_ALONE]
NUM_FIELDS = SCRATCH + 1
