"""Where in the table of :mod:`engine.kernels.page_guard` things lie, in int64 each."""

from __future__ import annotations

MOST = 64  # mappings at a time
# Where they begin, where they end, and how many pages of each were lost; whether any was; the earlier handler.
BEGIN, END, LOST, ANY, EARLIER = 0, MOST, 2 * MOST, 3 * MOST, 3 * MOST + 1
ACTION_FIELDS = 19  # of struct sigaction
TABLE_FIELDS = EARLIER + ACTION_FIELDS
SIGBUS = 7
