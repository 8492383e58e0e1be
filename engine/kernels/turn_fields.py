"""Where in the block of :mod:`engine.kernels.turns` things lie, in int64 each. An expert's *key* is its layer times the number
of experts of a layer, plus its number there."""

from __future__ import annotations

# What Python and native code decide by (our choice).
FADE = 0.9  # of a layer's counts, at each of its turns
# Of a pass's wait for a layer's turn, as a share of turns. Layers take their turns in a circle: of two experts that are
# used as often the one should leave whose layer has just had its turn. Without it those leave that are wanted next, as
# LRU does, wherever many are used in every turn and memory does not hold them all.
WAIT = 0.15
WORTH_A_COPY = (
    0.1  # more of its layer's turns than what it replaces, for a slot besides a place in the file cache
)
RANK_FADE = 0.01  # weight of a new load in the precision of its rank
WORTH_LOADING = 0.5  # of the loads of a rank that have to be right

ABSENT, COMING, READY, PINNED, EXPECTED = 0, 1, 2, 4, 8  # of an expert's status; the last two besides

# What compiled code asks of Python about an expert now and then, the answer being 1 or 0: whether what was loaded is whole,
# whether it is in the system's file cache, and whether it may be computed there.
IS_WHOLE, IS_CACHED, MAY_LIE = range(3)
START, GROUP, FINISH, GIVE_UP, AHEAD_OF_TIME, LOOK_AHEAD, NOTE, CLEAR = range(8)  # commands
# States of what a layer has asked for.
MISSING, WAITING, HELD, LYING, IN_USE, IN_USE_THERE, DONE = range(7)
LRU, LFU, FORESEEN, LEAST_STALE, REPLAYED = range(5)  # policies
NOBODY, BY_TASKS, BY_TRACE = range(3)  # predictors

(
    NUM_LAYERS,
    NUM_EXPERTS,
    # Addresses of int64 arrays by key.
    STATUS,
    SLOT_OF,  # -1: none
    AHEAD,  # whether it was loaded ahead of time, and not used yet
    USES,
    CHECKED,  # whether a load of it was found whole
    OFFSETS,  # in the file
    SEEN_UNTIL,  # until when it is taken to be in the system's file cache, nanoseconds
    LIES,  # whether it may be computed there
    IN_WINDOW,  # whether its mapped bytes may be this process's memory
    RANKS,  # 0, or by what rank, from 1 on, it was named for its layer's next turn
    # Slots: how many there are, and addresses of arrays by number.
    NUM_SLOTS,
    KEY_OF,  # -1: none
    ADDRESSES,
    LINEARS,  # the descriptors of both matrices
    FREE,
    NUM_FREE,
    # Loads: the control block of engine.kernels.loads, and its entries without and with a load.
    LOADS,
    FREE_ENTRIES,
    NUM_FREE_ENTRIES,
    PENDING,
    NUM_PENDING,
    SEEN,  # how many have been seen to end
    # Eviction: addresses of float64 arrays by key, and what each policy has besides.
    POLICY,
    WORTH,
    SHARES,
    CHANCES,
    CLOCK,
    UPDATE_FIRSTS,
    UPDATE_KEYS,
    UPDATE_WORTHS,
    # The layer whose turn it is, addresses of the numbers that it has asked for and of their states.
    LAYER,
    ASKED,
    NUM_ASKED,
    STATES,
    # Counters.
    HITS,
    LATE,
    MISSES,
    COMPUTED_IN_PLACE,
    ISSUED,
    USED,
    LOADED,
    STALLED,  # nanoseconds
    # Prediction.
    PREDICTOR,
    ACTIVE,  # whether what is named is loaded
    TASKS,  # address of the addresses of tasks of engine.kernels.foretell, by layer; 0: none
    NUM_TASKS,
    PRECISIONS,  # address of float64 by rank
    NAMED,  # address of keys
    TURN,  # address of how many turns of the trace are over
    TRACE_LAYERS,
    TRACE_FIRSTS,
    TRACE_NUMBERS,
    NUM_TURNS,
    LOOKAHEAD,
    # Computing in place.
    MAPPED,  # address of the file's bytes; 0: nothing is computed there
    FILE,
    BLOB_BYTES,
    BLOB_LINEARS,  # address of the descriptors of an expert at address 0, and of which of their fields are addresses
    AT_ONCE,
    WINDOW,
    WINDOW_SIZE,
    WINDOW_HEAD,
    WINDOW_COUNT,
    CALL,  # address of the function of Python's that is asked
    CODE,  # address of the native code of turns
    TROUBLE,  # 0, or the key, from 1 on, of an expert that could not be loaded
    NUM_FIELDS,
) = range(69)
