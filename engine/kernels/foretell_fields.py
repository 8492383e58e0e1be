"""Where in a task of :mod:`engine.kernels.foretell` things lie, in int64 each."""

from __future__ import annotations

SIZE_STEP = 16  # what sizes are multiples of

(
    SIZE,  # of a state
    EPS,  # float32
    NUM_MAPS,
    NUM_EXPERTS,
    NUM_CHOSEN,  # by a router
    MATRIX,  # address of the maps, float32 [maps, experts, size]
    OFFSETS,  # of what they add, float32 [maps, experts]
    SCALES,  # of what turns a distance in logits into the logistic function's, float32 [maps]
    AHEAD,  # whether the first map names experts
    LEAST,  # float32: the chance from which on they are named; 0: as many are as a router chooses
    NAMED,  # of how many they are and their numbers, the likeliest first, int64 [1 + experts]
    CHANCES,  # of what the last map gives, float32 [experts, up to a multiple of SIZE_STEP]; 0: nobody asks
    SCRATCH,  # of float32 [maps + 3, experts, up to a multiple of SIZE_STEP]
    TARGET,  # the layer whose experts are named
    NUM_FIELDS,
) = range(15)
