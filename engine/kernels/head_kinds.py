"""What a model's head is made of, as :mod:`engine.kernels.draft_rows` is told."""

INT4, INT8, BF16, FP32 = range(4)
INT8_BLOCK = 16  # outputs of a tile
