"""Where the numbers lie that a round in one command is decided by, and where native code puts its outcome: what
:mod:`engine.kernels.drafter` and :mod:`engine.kernels.whole_round` share, and :mod:`engine.decoding.context_index` and
:mod:`engine.kernels.matches`."""

from __future__ import annotations

from engine.kernels.choice_fields import MOST_RANKED
from engine.kernels.plan_fields import MOST_DRAFTS

MOST_ROWS = 16  # of the pass that verifies

# Of an index of a text's runs of tokens, int64 each (F: it holds a float64).
(
    TEXT,  # address of the tokens, int64, with room for drafts behind them
    NUM_KNOWN,  # runs that end before this place are in the table
    TABLE,  # address of the runs: a run's end times MOST_LENGTH plus its length, int64; 0: free
    NUM_PLACES,  # of the table, a power of 2
    FOUND, FOUND_LENGTH,  # what is behind the run that was found, and its length; 0: none was
) = range(6)  # fmt: skip
NUM_INDEX_FIELDS = 6
MOST_LENGTH = 8  # is above a run's length
LENGTHS = (2, 3, 4, 5)  # of runs
LONGEST_MATCH = LENGTHS[-1] + 3  # a match that drafts have made longer counts as one of this length at most

# Of a round, likewise.
(
    INDEX,  # address of the text's; 0: drafts do not come from the context
    NUM_TOKENS, LAST_TOKEN,  # of the text
    ROOM,  # for drafts in all
    LUCK_RIGHT, LUCK_SEEN,  # addresses: how many tokens of matches of so many tokens were right, of how many, float64 each
    MOST_FROM_CONTEXT,  # drafts in all, where some are from the context
    WORTH,  # F, tokens per second that time is worth to them
    HAS_SLOW_STATES,
    SLOW_STATES,  # address of the first's, float32
    SLOW_STEP,  # bytes from one to the next
    PASS_FIRST, PASS_LAST, PASS_OUT,  # fields of the command that verifies
    NOTE_STEP,  # bytes from what is noted of one row's logits to the next's
    # The outcome:
    MATCH_LENGTH,  # of the match behind the stream's drafts
    NUM_CHAIN,  # drafts in the chain, those from the context behind the stream's
    NUM_ALTERNATIVES,
    NUM_NEW,  # tokens that the round gives; 0: that cannot be told so
    NUM_RIGHT,  # drafts of the chain
    HAS_ALTERNATIVE,  # whether one was right
    ROW,  # that the last token was chosen in
    DRAFT_TICKS, TICKS,  # that drafting took, and all of it
) = range(24)  # fmt: skip
CHAIN_TOKENS = 24  # MOST_ROWS of each
ALTERNATIVES = CHAIN_TOKENS + MOST_ROWS
ALTERNATIVE_PLACES = ALTERNATIVES + MOST_ROWS
NEW_TOKENS = ALTERNATIVE_PLACES + MOST_ROWS
WORTHS = NEW_TOKENS + MOST_ROWS  # F, room for all tokens that may be offered
NUM_ROUND_FIELDS = WORTHS + MOST_DRAFTS * (MOST_RANKED - 1)
