"""How far to draft: a small economist that weighs measured costs against measured luck. All our choice.

What it knows, all of it measured while decoding: the time of a plain step, of a draft step, of verifying so
many rows; how often drafts of a given confidence were right; and how much more often, or less, they lately are in the text at
hand. From these:

* a draft is kept if the chance that it and all before it are right is worth more, at the going rate of
  tokens per second, than the row that it adds to the verification;
* another draft is made if the same holds for it, its own cost included;
* other tokens that the stream thought likely join the verification as alternatives to drafts, the likeliest first,
  while each is worth its row;
* if rounds that draft do not beat plain steps, drafting is switched off for a while, and tried again later.

The output is the same whatever it decides; only the speed differs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from engine.decoding.acceptance import Alternative
from engine.decoding.calibration import Calibration, Drift, number

MAX_DRAFTS = 7
_SURE = 0.98  # no draft is likelier
_HIGHEST_OTHER = 0.5  # probability that another token than the likeliest can have
_ALTERNATIVE = 1.3  # times its row is what an alternative has to be worth: it takes more than that row
_OFFERED = 0.8  # of a row's worth, from there on it may become one: its probability may be too modest
_PRIOR = 3.0  # observations' worth of a guess
_FADE = 0.998  # per observation: old luck counts less
_SAMPLES = 9  # timings kept of each kind; their median counts
_YOUNG, _STEADY = 64, 8  # from that round on costs are added up anew every so many rounds only
_ROW_SHARE = 0.12  # first guess: an extra row costs this share of a plain step
# Forced numbers of drafts at first, so that every cost is known; the first of each kind may be cold.
_SCHEDULE = (0, 1, 0, 1, 2, 3, 0, 2, 3, 1)
_REFRESH = 48  # rounds between two forced ones that keep rarely seen costs fresh
_REFRESHED = (0, 1, 0, 2, 0, 3)  # their numbers of drafts: a cost that once looked too high is seen again
# A plain step so many times longer or shorter than known is looked into after a few rounds: the machine may have changed.
_SURPRISE, _SOON = 1.15, 6
# Luck makes a few rounds look bad where many would not, and being off costs the whole gain.
_WINDOW = 64  # drafting rounds that are judged together
_EARLY = 24  # a clear loss is seen sooner
_LOSS, _CLEAR_LOSS = 0.98, 0.88  # of the plain speed
_PAUSE, _LONGEST_PAUSE = 48, 768  # plain rounds until drafting is tried again
# Rounds for which a time says something about others than its own kind: a text grows, and all passes take longer.
_RECENT = 128


@dataclass(frozen=True)
class SpeculationState:
    """What the controller knows at the moment, for people to read. None: not measured yet.

    Attributes:
        plain_seconds: a plain step, the median of the latest. Its inverse is the plain rate.
        draft_seconds: a draft step.
        acceptance: share of right ones among drafts whose predecessors were right.
        is_off: drafting is switched off for now; ``reason`` says why in one sentence.
    """

    plain_seconds: float | None = None
    draft_seconds: float | None = None
    acceptance: float | None = None
    is_off: bool = False
    reason: str | None = None

    @property
    def plain_tokens_per_second(self) -> float | None:
        """The plain rate as measured on this machine, between rounds that draft."""
        return 1 / self.plain_seconds if self.plain_seconds else None


@dataclass(frozen=True)
class RoundRecord:
    """One round as it went: what was drafted and verified, and what it took, in seconds.

    Attributes:
        num_steps: draft steps, that of a dropped last draft included.
        num_drafts: drafts that were verified: alternatives, and those from elsewhere, counted in.
        num_tokens: that the round gave.
        outcomes: for each draft of the stream behind right ones only, its confidence and whether it was right.
        others: for each other token that the stream offered in their place, likewise.
    """

    num_steps: int
    num_drafts: int
    num_tokens: int
    draft_seconds: float
    verify_seconds: float
    outcomes: tuple[tuple[float, bool], ...] = ()
    others: tuple[tuple[float, bool], ...] = ()


class DepthController:
    """Decides round by round; one per loaded model, so that what it learns carries over to the next answer.

    Args:
        max_drafts: never draft more.
        fixed: always draft this many (0: never), whatever it costs: for tests and measurements.
        fixed_alternatives: then verify this many other tokens, if so many are offered.
    """

    def __init__(
        self, max_drafts: int = MAX_DRAFTS, fixed: int | None = None, fixed_alternatives: int = 0
    ) -> None:
        self.max_drafts = max_drafts
        self._fixed, self._fixed_alternatives = fixed, fixed_alternatives
        self._times: dict[str, deque[float]] = {}
        self._medians: dict[str, float] = {}  # of those: a round asks for them dozens of times
        self._noted: dict[str, int] = {}  # in which round last
        self._costs: dict[tuple[int, bool], float] = {}  # of verifications, until they are added up anew
        self._plain_seconds: float | None = None  # of a plain step, likewise
        self._luck, self._others = Calibration(), Calibration(_HIGHEST_OTHER)
        self._next_right, self._next_seen = 0.5 * _PRIOR, _PRIOR  # any draft whose predecessors were right
        self._drift = Drift()
        self._rounds = 0
        self._next_refresh, self._refreshes = _REFRESH, 0
        self._forced: int | None = None
        self._limit = 0
        self._tokens = self._seconds = 0.0  # of the drafting rounds under judgement
        self._judged = 0
        self._paused = 0  # plain rounds left
        self._pause = _PAUSE
        self.reason: str | None = None

    @property
    def is_off(self) -> bool:
        """Is drafting switched off at the moment? ``reason`` then holds one sentence for people."""
        return self._paused > 0

    @property
    def rate(self) -> float | None:
        """Tokens per second as things stand, the better of plain and drafting; None: not measured yet."""
        return self._rate() if self._time("plain") else None

    def plan(self, limit: int, drift: Drift | None = None) -> bool:
        """Should this round draft at all, where at most ``limit`` drafts are allowed?

        Args:
            drift: of the text that it belongs to, until the next call.
        """
        self._drift = drift or Drift()
        self._limit = min(limit, self.max_drafts)
        self._forced = self._fixed if self._fixed is not None else self._scheduled()
        if self._limit < 1 or self._forced == 0:
            return False
        return self._forced is not None or not self.is_off

    def keep(self, confidences: list[float]) -> bool:
        """Is the last draft worth verifying?"""
        if self._forced is not None:
            return True
        count = len(confidences)
        cost = self._verify(count, dropped=False) - self._verify(count - 1, dropped=True)
        return self.chance(confidences) > self._rate() * cost

    def more(self, confidences: list[float]) -> bool:
        """Is another draft worth making after these, all kept?"""
        count = len(confidences)
        if count >= self._limit:
            return False
        if self._forced is not None:
            return count < self._forced
        cost = (
            self._draft_step() + self._verify(count + 1, dropped=False) - self._verify(count, dropped=False)
        )
        following = min(1.0, self._drift.factor * self._next_right / self._next_seen)
        return self.chance(confidences) * following > self._rate() * cost

    def least_offer(self, confidences: list[float]) -> float:
        """The least probability that makes another token than the next draft worth knowing, behind these drafts."""
        if self._forced is not None:
            return 0.0 if self._fixed_alternatives else 1.0
        count = len(confidences) + 1
        cost = self._verify(count + 1, dropped=False) - self._verify(count, dropped=False)
        return _OFFERED * self._rate() * cost / self.chance(confidences)

    def alternatives(
        self,
        confidences: list[float],
        offers: Sequence[Sequence[tuple[int, float]]],
        num_drafts: int,
        room: int,
    ) -> tuple[Alternative, ...]:
        """Which other tokens to verify.

        Args:
            confidences: of each draft step.
            offers: for each draft of the stream that was kept, other tokens in its place, with their probabilities.
            num_drafts: that are verified without them.
            room: how many more there may be.
        """
        found, before = [], 1.0
        for place, (confidence, others) in enumerate(zip(confidences, offers, strict=False)):
            found += [
                (before * self._others.chance(chance), Alternative(token, place)) for token, chance in others
            ]
            before *= self.chance([confidence])
        found = sorted(found, key=lambda each: -each[0])[:room]
        if self._forced is not None:
            return tuple(each for _, each in found[: self._fixed_alternatives])
        rate, dropped = self._rate() if found else 0.0, len(confidences) > num_drafts
        for count, (chance, _) in enumerate(found):
            cost = self._verify(num_drafts + count + 1, dropped=False)
            cost -= self._verify(num_drafts + count, dropped and count == 0)
            if chance <= _ALTERNATIVE * rate * cost:
                return tuple(each for _, each in found[:count])
        return tuple(each for _, each in found)

    def observe_plain(self, seconds: float) -> None:
        """Learn from a finished round without drafts, whose passes took so long."""
        self._rounds += 1
        known = self._time("plain") or seconds
        if not 1 / _SURPRISE < seconds / known < _SURPRISE:
            self._next_refresh, self._refreshes = min(self._next_refresh, self._rounds + _SOON), 0
        self._note("plain", seconds)
        if self._paused:
            self._paused -= 1

    def observe(self, record: RoundRecord) -> None:
        """Learn from a finished round that drafted."""
        self._rounds += 1
        dropped = record.num_steps > record.num_drafts
        expected = record.num_steps * self._draft_step() + self._verify(record.num_drafts, dropped)
        self._note("draft", record.draft_seconds / record.num_steps)
        self._note(f"{'dropped' if dropped else 'verify'} {record.num_drafts}", record.verify_seconds)
        for confidence, was_right in record.outcomes:
            self._drift.learn(self._luck.chance(confidence), was_right)
            self._luck.learn(confidence, was_right)
            self._next_right = self._next_right * _FADE + was_right
            self._next_seen = self._next_seen * _FADE + 1
        for probability, was_right in record.others:
            self._others.learn(probability, was_right)
        if self._forced is None:
            # A hiccup of the machine says nothing about drafting.
            seconds = min(record.draft_seconds + record.verify_seconds, 2 * expected)
            self._judge(record.num_tokens, seconds)

    def state(self) -> SpeculationState:
        """Where things stand; may be called from any thread."""
        drafts = self._time("draft")
        acceptance = self._next_right / self._next_seen if drafts else None
        is_off = self.is_off
        return SpeculationState(
            self._time("plain"), drafts, acceptance, is_off, self.reason if is_off else None
        )

    def export(self) -> dict[str, Any]:
        """Everything learnt, as JSON; the caller keeps it per model and machine."""
        return {
            "version": 2,
            "times": {name: list(times) for name, times in self._times.items()},
            "luck": self._luck.export(),
            "others": self._others.export(),
            "next": [self._next_right, self._next_seen],
            "pause": self._pause,
            "paused": self._paused,
            "reason": self.reason,
        }

    def restore(self, state: Any) -> bool:
        """Take over what :meth:`export` gave; False, and nothing changed, if it is not of this version or broken.

        The machine may have been busier then: of the timings one median of each kind stays, which this
        session's own soon outvote, and the opening schedule measures all of them again.
        """
        try:
            if state["version"] != 2:
                return False
            times = {
                str(k): deque([median([number(t) for t in v])], maxlen=_SAMPLES)
                for k, v in state["times"].items()
                if v
            }
            luck, others = Calibration(), Calibration(_HIGHEST_OTHER)
            luck.restore(state["luck"])
            others.restore(state["others"])
            next_right, next_seen = (number(x) for x in state["next"])
            counts = [int(number(state[name])) for name in ("pause", "paused")]
            if next_seen <= 0:
                return False
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        self._times, self._luck, self._others = times, luck, others
        self._medians, self._noted = {name: median(values) for name, values in times.items()}, {}
        self._forget_costs()
        self._next_right, self._next_seen = next_right, next_seen
        self._pause, self._paused = counts
        self._rounds, self._next_refresh = 0, _REFRESH
        self._pause = min(max(self._pause, _PAUSE), _LONGEST_PAUSE)
        self.reason = state.get("reason") if self._paused else None
        return True

    def _scheduled(self) -> int | None:
        """A forced number of drafts for this round, or None."""
        if self._rounds < len(_SCHEDULE):
            return min(_SCHEDULE[self._rounds], self._limit)
        if self.is_off or self._rounds < self._next_refresh:
            return None
        self._next_refresh = self._rounds + _REFRESH
        self._refreshes += 1
        return min(_REFRESHED[(self._refreshes - 1) % len(_REFRESHED)], self._limit)

    def chance(self, confidences: list[float]) -> float:
        """That all of these drafts are right."""
        factor = self._drift.factor
        return math.prod(min(_SURE, factor * self._luck.chance(confidence)) for confidence in confidences)

    def _judge(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds
        self._judged += 1
        plain = self._plain()
        ratio = self._tokens / self._seconds * plain
        clear = (
            _CLEAR_LOSS if self._pause == _PAUSE else _LOSS
        )  # it has been off before: so much is likely again
        if self._judged >= _WINDOW or (self._judged >= _EARLY and ratio < clear):
            if ratio < _LOSS:
                self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
                self.reason = self._sentence(ratio)
            else:
                self._pause, self.reason = _PAUSE, None
            self._tokens, self._seconds, self._judged = 0.0, 0.0, 0

    def _sentence(self, ratio: float) -> str:
        share = self._next_right / self._next_seen
        return (
            f"The accelerated stream is off for now: {share:.0%} of the drafts that could be right were, and a draft costs "
            f"{1e3 * self._draft_step():.1f} ms beside a plain step's {1e3 * self._plain():.1f} ms, so drafting "
            f"ran at {ratio:.2f} times the plain speed."
        )

    def _rate(self) -> float:
        """Tokens per second that time is worth now: the better of plain and drafting."""
        plain = 1 / self._plain()
        return max(plain, self._tokens / self._seconds) if self._judged >= _EARLY else plain

    def _note(self, name: str, seconds: float) -> None:
        times = self._times.setdefault(name, deque(maxlen=_SAMPLES))
        times.append(max(seconds, 1e-9))
        self._medians[name], self._noted[name] = sorted(times)[len(times) // 2], self._rounds
        if self._rounds < _YOUNG or self._rounds % _STEADY == 0:
            self._forget_costs()

    def _forget_costs(self) -> None:
        self._costs.clear()
        self._plain_seconds = None

    def _time(self, name: str) -> float | None:
        return self._medians.get(name)

    def _recent(self, name: str) -> float | None:
        """The same, unless it is old."""
        return self._time(name) if self._rounds - self._noted.get(name, -_RECENT) < _RECENT else None

    def _plain(self) -> float:
        """Seconds of a plain step. There are few of them, and all may have fallen into a busy moment: passes of more rows
        bound it."""
        if self._plain_seconds is None:
            plain = self._time("plain")
            more = [self._recent(f"verify {drafts}") for drafts in range(1, self.max_drafts + 1)]
            self._plain_seconds = min([plain, *(time for time in more if time)]) if plain else 1.0
        return self._plain_seconds

    def _draft_step(self) -> float:
        return self._time("draft") or 0.2 * self._plain()

    def _verify(self, drafts: int, dropped: bool) -> float:
        """Seconds to verify ``drafts``; ``dropped``: one more was drafted, so the last row is already under way (unless
        the drafter has no slow states: then it only costs the same)."""
        cost = self._costs.get((drafts, dropped))
        if cost is None:
            cost = self._costs[drafts, dropped] = self._verification(drafts, dropped)
        return cost

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
        guess, old = self._guess(drafts, dropped), self._time(f"{kind} {drafts}")
        return guess if old is None else min(guess, old)

    def _guess(self, drafts: int, dropped: bool) -> float:
        """What the verification should take, from others."""
        if dropped:
            # About a plain step's share of the draft layers is done.
            full = self._plain() if drafts == 0 else self._verify(drafts, dropped=False)
            return max(0.8 * full, full - 0.7 * self._draft_step())
        below = self._verify(drafts - 1, dropped=False) if drafts > 1 else self._plain()
        return below + self._row_seconds(drafts)

    def _row_seconds(self, drafts: int) -> float:
        """A guess at what the last of so many further rows costs: as much as those that were measured."""
        for fewer in range(drafts - 1, 1, -1):
            if seconds := self._recent(f"verify {fewer}"):
                return max(0.0, seconds - self._plain()) / fewer
        return _ROW_SHARE * self._plain()
