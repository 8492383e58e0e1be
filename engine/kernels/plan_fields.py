"""Where the numbers lie that a round's drafts are decided by, and where native code puts the drafts: what
:mod:`engine.decoding.draft_plan` and :mod:`engine.kernels.draft_chain` share."""

from __future__ import annotations

from engine.kernels.choice_fields import MOST_RANKED

MOST_DRAFTS = 15
SURE = 0.98  # no draft is likelier
OFFERED = 0.8  # of a row's worth, from there on another token may become an alternative: its probability may be too modest
BINS = 8  # of confidences
HIGHEST_OTHER = 0.5  # probability that another token than the likeliest can have
ALTERNATIVE = 1.3  # times its row is what an alternative has to be worth: it takes more than that row

# Of a plan, float64 each:
LIMIT, FORCED, LEAST, RATE, FACTOR, FOLLOWING, DRAFT_SECONDS = range(7)  # FORCED: -1, it is not
RIGHT, SEEN = 8, 8 + BINS  # by confidence: how many drafts were right, of how many
KEPT_SECONDS = (
    SEEN + BINS
)  # by number of drafts: what it takes to verify the last of them, rather than drop it
ROW_SECONDS = KEPT_SECONDS + MOST_DRAFTS + 1  # by number of drafts: what one more takes to verify
OTHER_RIGHT = ROW_SECONDS + MOST_DRAFTS + 1  # as RIGHT and SEEN, of other tokens by their probability
OTHER_SEEN = OTHER_RIGHT + BINS
NUM_PLAN_FIELDS = OTHER_SEEN + BINS

# Of drafts, int64 each (F: it holds a float64): how many were made, how many are kept, and of each step
NUM_STEPS, NUM_KEPT, STEPS = range(3)
(
    DRAFT_TOKEN,
    CONFIDENCE,  # F
    NUM_OTHERS,
    OTHERS,  # other tokens, one less than MOST_RANKED
) = range(4)
OTHER_CHANCES = OTHERS + MOST_RANKED - 1  # F, as many
STEP_FIELDS = OTHER_CHANCES + MOST_RANKED - 1
NUM_CHAIN_FIELDS = STEPS + (MOST_DRAFTS + 1) * STEP_FIELDS
