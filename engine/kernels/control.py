"""The control block that all threads of a team share: an int64 array whose fields are named here.

Only names: Python fills the block, and the compiled code reads it (:mod:`engine.kernels.program`).
"""

from __future__ import annotations

from engine.models.kv_cache import KEY_BLOCK

# In int64 fields; what several threads write or wait for has cache lines of its own.
# The number of the command times MOST_THREADS, and how many threads it is for: read together.
SEQUENCE = 0
MOST_THREADS = 1024
PHASE_SHIFT = 20  # tickets are told apart by their phase: it may be over when somebody comes to draw one
(
    COMMAND, THREADS, ROWS, FIRST, LAST, HIDDEN, OUT, POSITIONS, SLOTS, LAYERS, COS, SIN, CAPACITY,
    HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, EPS, QKV_BUFFER, PARTS_BUFFER, ACT, GATE_UP, NORM, LINEAR,
) = range(48, 72)  # fmt: skip
# For draft steps. The maps and the head are addresses of descriptors; START_MAP is 0 where there is none. DRAFT_LAYERS is
# what LAYERS is to all else: the weights may be int4 copies there.
(
    DRAFT_LAYERS, ADAPTERS, CONDITION, START_MAP, EXIT_MAP, DRAFT_HEAD, DRAFT_BUFFER, DRAFT_LOGITS, DRAFT_TOTAL,
) = range(72, 81)  # fmt: skip
# For layers with experts (:mod:`engine.kernels.expert_phases`).
(
    WHOLE_NORM, NORMED, ROUTER, TOP_K, NORMALIZE, CHOSEN, WEIGHTS, EXPERTS, NUM_EXPERTS, PLACES, NUM_PLACES, ADD_UP,
    ROUTER_LOGITS, SIDE_ROWS, SIDE_QUERY, SIDE_OUTPUT, SIDE_ATTENTION, SIDE_FEED_FORWARD, SIDE_OUT,
) = range(81, 100)  # fmt: skip
# For whole passes: rows that are some layers deep already, and tokens.
BEGUN, IDS, EMBEDDING, LOGITS, NO_GAIN = range(100, 105)
RECORDS = 105  # of attention, two buffers of them
KEPT_LAYERS = 107  # the first so many, which draft steps read too
# What attention gives, and this and ACT as the next matmul takes them.
MIXED, MIXED_ROUNDED, MIXED_EXTRAS, ACT_ROUNDED, ACT_EXTRAS = range(108, 113)
TOOK = 113  # ticks, rank 0 for all commands
# For layers with experts within a pass (:mod:`engine.kernels.expert_pass`). TURNS is the address of a block of
# :mod:`engine.kernels.turns`, or 0, and THERE of room for an expert's linears. STREAM is the
# address of what an accelerated stream does in each layer, or 0.
SPARSE_LAYERS, WANTED, NUM_WANTED, LEFT, SOURCES, EXPERT_OUTS, EXPERT_ACTS, GATHERED, TURNS, THERE, STREAM = (
    range(114, 125)
)
# For a round's drafts (:mod:`engine.kernels.draft_chain`): addresses.
PLAN, CHAIN, CHOICE = range(125, 128)
# Of a pass's logits: the address of what is noted of their blocks, and what they are multiplied by before they are weighed
# (the bits of a float32; 0: not at all). See :mod:`engine.kernels.block_notes`.
NOTES, SHARPNESS = 128, 129
ROUND = 130  # address of a round (:mod:`engine.kernels.whole_round`); 0: drafts are all that is asked for
RANKS = 144  # per thread RANK_FIELDS; a multiple of 16, for processors fetch cache lines in pairs
RANK_FIELDS = 48
(
    PHASE, SEEN, CREW, MINE, OWED, GUEST, OWN_H, OWN_X, OWN_ROUNDED, OWN_EXTRAS, OWN_SCORES, OWN_KV, OWN_LOW, OWN_RAISED,
    OWN_PAIR, OWN_LOGITS, OWN_ROWS, OWN_POSITIONS, OWN_SLOTS, OWN_QUERIES, OWN_LOW_ROUNDED, OWN_LOW_EXTRAS,
    OWN_FACTORS,
) = range(23)  # fmt: skip
# Ticks that it has spent in long waits for others, and when the present one became long.
HELD_UP, SINCE = 23, 24
OWN_SIDE = 25  # rows of an accelerated stream behind the slow ones
TICKETS, HELPED = 32, 33  # what other threads write as well, when they help
ARRIVED = 40  # at the end of how many phases: what they wait for
(
    RUN_LAYERS, RUN_MATMUL, RUN_FORWARD, RUN_DRAFT, RUN_DRAFTS, RUN_ROUND, RUN_ATTENTION, RUN_EXPERTS, STOP,
) = range(1, 10)  # fmt: skip

# A linear's descriptor: WEIGHT, SCALES and BIAS are addresses (0: none). What PARTS are: engine.kernels.matmul.
LINEAR_FIELDS = 6
WEIGHT, SCALES, BIAS, OUTPUTS, INPUTS, PARTS = range(LINEAR_FIELDS)
ATTENTION_CHUNK, ATTENTION_ROWS = KEY_BLOCK, 8  # slots, and rows, of an attention task
BLOCK = 32  # outputs of a task, of any format

# A layer's record: norms, window (0: none), cache, then four linears.
ATTN_NORM, MLP_NORM, Q_NORM, K_NORM, WINDOW, KEYS, VALUES, QKV = range(8)
O_PROJ, GATE_UP_PROJ, DOWN_PROJ = QKV + LINEAR_FIELDS, QKV + 2 * LINEAR_FIELDS, QKV + 3 * LINEAR_FIELDS
LAYER_FIELDS = QKV + 4 * LINEAR_FIELDS

# A layer's adapters: two linears each, down to the rank and up again.
Q_ADAPTER, O_ADAPTER, GATE_UP_ADAPTER, DOWN_ADAPTER = (pair * 2 * LINEAR_FIELDS for pair in range(4))
ADAPTER_FIELDS = 8 * LINEAR_FIELDS

# A router's record: its linear (router, and below it the shared expert's gate, if there is one), the number of routed
# experts, and how the shared expert weighs: 0, there is none; 1, fully; 2, by its gate.
ROUTER_NUM_EXPERTS, ROUTER_SHARED = LINEAR_FIELDS, LINEAR_FIELDS + 1
ROUTER_FIELDS = LINEAR_FIELDS + 2

# Of each layer: its router's record, all zeros where it has no experts; the address of its experts' linears, two each;
# their inner size; the shared expert's linears.
SPARSE_TABLE, SPARSE_INNER, SPARSE_SHARED = range(ROUTER_FIELDS, ROUTER_FIELDS + 3)
SPARSE_FIELDS = SPARSE_SHARED + 2 * LINEAR_FIELDS

# Of each layer: whether the accelerated stream begins anew there, and whether it ends behind its attention part; its
# adapters beside that and beside the feed-forward part.
STREAM_RESTARTS, STREAM_ENDS, STREAM_ATTENTION, STREAM_FEED_FORWARD = range(4)
STREAM_FIELDS = 4

# One expert's work: its two linears, and the addresses of its inputs ``[rows, D]``, of what is between the linears
# ``[rows, F]`` and of its outputs ``[rows, D]``.
EXPERT_GATE_UP, EXPERT_DOWN = 0, LINEAR_FIELDS
EXPERT_IN, EXPERT_COUNT, EXPERT_ACT, EXPERT_OUT = range(2 * LINEAR_FIELDS, 2 * LINEAR_FIELDS + 4)
EXPERT_FIELDS = 2 * LINEAR_FIELDS + 4

# An expert that some rows of a pass want: its number, where its inputs lie and how many rows they are, and where what is between
# its linears and its outputs go, and whether it has been computed.
WANTED_NUMBER, WANTED_IN, WANTED_COUNT, WANTED_ACT, WANTED_OUT, WANTED_DONE = range(6)
WANTED_FIELDS = 6
