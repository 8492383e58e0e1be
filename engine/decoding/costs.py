"""What passes take on this machine, measured while decoding. All our choice."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from engine.decoding.calibration import number

_SAMPLES = 9  # timings kept of each kind; their median counts
_KNOWN = 3  # timings of a kind from which on a further one says how fast the machine is at the moment
_YOUNG, _STEADY = 64, 8  # from that round on costs are added up anew every so many rounds only
_ROW_SHARE = 0.12  # first guess: an extra row costs this share of a plain step
_LONGEST = 2.0  # times what is usual: a longer time counts as this one
_FOLLOWS = 0.02  # of a mean, per time
# Rounds for which a time says something about others than its own kind: a text grows, and all passes take longer.
_RECENT = 128


class RoundCosts:
    """Seconds of plain steps, draft steps and verifications, and guesses at those that were not seen yet.

    A machine is slower at times, for others share it, and all passes take longer as a text grows. What was measured at such a
    time and what was not would not compare: while drafts are made there are few plain steps. So each time is taken beside the
    pace of the moment, which all kinds tell of, and costs are those at the usual pace.

    Attributes:
        pace: what passes take at the moment, beside what is usual.
        max_drafts: as many as are ever made; drafts from elsewhere may be more.
        edition: changes whenever costs may have.
    """

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._times: dict[str, deque[float]] = {}
        self._medians: dict[str, float] = {}  # of those: a round asks for them dozens of times
        self._noted: dict[str, int] = {}  # in which round last
        self._costs: dict[tuple[int, bool], float] = {}  # of verifications, until they are added up anew
        self._plain: float | None = None  # likewise
        self._paces: deque[float] = deque(maxlen=_SAMPLES)  # that the latest times tell of
        self.pace = 1.0
        self._hiccups = 1.0  # how much longer than their median plain steps take on average
        self._rounds = self.edition = 0

    def next_round(self) -> None:
        """Let what is known grow older."""
        self._rounds += 1

    def note_plain(self, seconds: float) -> None:
        """A plain step took so long."""
        if (usual := self.measured_plain) is not None:
            self._hiccups += _FOLLOWS * (min(_LONGEST, seconds / usual) - self._hiccups)
        self._note("plain", seconds)

    def without_hiccups(self, seconds: float, usual: float) -> float:
        """What a round that took ``seconds`` says of rounds of its kind, to be compared with plain steps.

        Args:
            usual: what it takes, by the medians.
        """
        return min(_LONGEST * usual, seconds / self.pace) / self._hiccups

    def note_verification(self, drafts: int, seconds: float) -> None:
        """To verify ``drafts`` took so long."""
        self._note(f"verify {drafts}", seconds)

    def note_round(
        self, num_steps: int, draft_seconds: float, drafts: int, dropped: bool, verify_seconds: float
    ) -> None:
        """So many draft steps took so long, and to verify ``drafts``."""
        self._note("draft", draft_seconds / num_steps)
        self._note(f"{'dropped' if dropped else 'verify'} {drafts}", verify_seconds)

    @property
    def measured_plain(self) -> float | None:
        """A plain step at the pace of the moment, by the median of the latest; None: not measured yet."""
        plain = self._medians.get("plain")
        return None if plain is None else plain * self.pace

    @property
    def measured_draft(self) -> float | None:
        """A draft step, likewise."""
        draft = self._medians.get("draft")
        return None if draft is None else draft * self.pace

    def plain(self) -> float:
        """A plain step. There are few of them, and all may have fallen into a busy moment: passes of more rows bound it."""
        if self._plain is None:
            plain = self._medians.get("plain")
            more = [self._recent(f"verify {drafts}") for drafts in range(1, self.max_drafts + 1)]
            self._plain = min([plain, *(time for time in more if time)]) if plain else 1.0
        return self._plain

    def draft_step(self) -> float:
        """A draft step, measured or guessed."""
        return self._medians.get("draft") or 0.2 * self.plain()

    def verify(self, drafts: int, dropped: bool = False) -> float:
        """To verify ``drafts``, measured or guessed; ``dropped``: one more was drafted, so the last row is already under way
        (unless the drafter has no slow states: then it only costs the same)."""
        cost = self._costs.get((drafts, dropped))
        if cost is None:
            cost = self._costs[drafts, dropped] = self._verification(drafts, dropped)
        return cost

    def export(self) -> dict[str, list[float]]:
        """All times at the pace of the moment, as JSON."""
        return {kind: [time * self.pace for time in times] for kind, times in self._times.items()}

    @staticmethod
    def read(state: Any) -> dict[str, float]:
        """Of times that :meth:`export` gave the median of each kind.

        Raises:
            ValueError, TypeError, AttributeError: they are broken.
        """
        return {str(kind): median([number(time) for time in times]) for kind, times in state.items() if times}

    def restore(self, medians: dict[str, float]) -> None:
        """Take over what :meth:`read` gave, and begin with round 0. The machine may have been busier then: this session's own
        times soon outvote these."""
        self._times = {kind: deque([time], maxlen=_SAMPLES) for kind, time in medians.items()}
        self._medians, self._noted, self._rounds = dict(medians), {}, 0
        self._paces.clear()
        self.pace = 1.0
        self._forget()

    def _note(self, kind: str, seconds: float) -> None:
        times = self._times.get(kind)
        if times is None:
            times = self._times[kind] = deque(maxlen=_SAMPLES)
        seconds = max(seconds, 1e-9)
        if len(times) >= _KNOWN:
            self._paces.append(seconds / self._medians[kind])
            self.pace = sorted(self._paces)[len(self._paces) // 2]
        times.append(seconds / self.pace)
        self._medians[kind], self._noted[kind] = sorted(times)[len(times) // 2], self._rounds
        if self._rounds < _YOUNG or self._rounds % _STEADY == 0:
            self._forget()

    def _forget(self) -> None:
        self._costs.clear()
        self._plain = None
        self.edition += 1

    def _recent(self, kind: str) -> float | None:
        """The median of a kind's times, unless they are old."""
        if self._rounds - self._noted.get(kind, -_RECENT) < _RECENT:
            return self._medians.get(kind)
        return None

    def _verification(self, drafts: int, dropped: bool) -> float:
        kind = "dropped" if dropped else "verify"
        # Fewer rows never cost more: a time that says so is a hiccup of the machine.
        # (Drafts from elsewhere may be more than the controller's own ever are.)
        most = max(drafts, self.max_drafts)
        own = self._recent(f"{kind} {drafts}")
        if own is not None:
            known = [self._recent(f"{kind} {more}") for more in range(drafts + 1, most + 1)]
            return min([own, *(seconds for seconds in known if seconds is not None)])
        # What has not been seen for long is seen again soon, if it cost more than one would guess: it may have been
        # measured in a busy moment, and would be shunned for good.
        guess, old = self._guess(drafts, dropped), self._medians.get(f"{kind} {drafts}")
        return guess if old is None else min(guess, old)

    def _guess(self, drafts: int, dropped: bool) -> float:
        """What the verification should take, from others."""
        if dropped:
            # About a plain step's share of the draft layers is done.
            full = self.plain() if drafts == 0 else self.verify(drafts)
            return max(0.8 * full, full - 0.7 * self.draft_step())
        below = self.verify(drafts - 1) if drafts > 1 else self.plain()
        return below + self._row_seconds(drafts)

    def _row_seconds(self, drafts: int) -> float:
        """A guess at what the last of so many further rows costs: as much as those that were measured."""
        for fewer in range(drafts - 1, 1, -1):
            if seconds := self._recent(f"verify {fewer}"):
                return max(0.0, seconds - self.plain()) / fewer
        return _ROW_SHARE * self.plain()
