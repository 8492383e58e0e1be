"""Where in the control block of :mod:`engine.kernels.loads` things lie, in int64 each."""

from __future__ import annotations

DEMANDED, EXPECTED = 0, 1  # urgencies

(
    CLOSED,
    SLEEPERS,  # threads that sleep for want of work
    SLEEP_AT,  # the pipe's end that they read from
    WAKE_AT,  # its other end
    WAITERS,  # whether somebody sleeps until a load has ended
    WAIT_AT,  # as above
    TELL_AT,
    COMPLETED,  # loads that have ended, well or not
    DESCRIPTOR,  # of the file
    NUM_BYTES,  # of a load
    BANDWIDTH,  # of an imitated link, bytes a second; 0: none, threads read
    LATENCY,  # of it, nanoseconds
    FREE_AT,  # when it is free again, nanoseconds
    ON_LINK,  # address of the entry that it carries; 0: none
    ARRIVES,  # when that will be there
    ENTRIES,  # address of the entries
    RING,  # two rings of entries' numbers
) = range(17)

HEAD, TAIL = range(2)  # of a ring, how many have left and entered it; the numbers follow
RING_SIZE = 8192
RING_FIELDS = TAIL + 1 + RING_SIZE
CONTROL_FIELDS = RING + 2 * RING_FIELDS

# Of an entry: its state, where in the file, an address, when in nanoseconds, and whose it is.
STATE, OFFSET, TARGET, ASKED, WHOSE = range(5)
ENTRY_FIELDS = 8  # a cache line
NUM_ENTRIES = 4096
NEW, QUEUED, STARTED, DONE, FAILED, CANCELLED = range(6)  # states
