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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.decoding.acceptance import Alternative
from engine.decoding.calibration import Calibration, Drift, number
from engine.decoding.costs import RoundCosts
from engine.decoding.draft_plan import MOST_DRAFTS, DraftPlan
from engine.kernels.plan_fields import ALTERNATIVE, HIGHEST_OTHER

MAX_DRAFTS = 7
_PRIOR = 3.0  # observations' worth of a guess
_FADE = 0.998  # per observation: old luck counts less
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

    Attributes:
        costs: of passes, as measured; who verifies drafts from elsewhere adds to them.
    """

    def __init__(
        self, max_drafts: int = MAX_DRAFTS, fixed: int | None = None, fixed_alternatives: int = 0
    ) -> None:
        self.max_drafts = min(max_drafts, MOST_DRAFTS)
        self._fixed, self._fixed_alternatives = fixed, fixed_alternatives
        self.costs, self._plan = RoundCosts(self.max_drafts), DraftPlan()
        self._next_right, self._next_seen = 0.5 * _PRIOR, _PRIOR  # any draft whose predecessors were right
        self._drift = Drift()
        self._rounds = 0
        self._next_refresh, self._refreshes = _REFRESH, 0
        self._forced: int | None = None
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
        """Tokens per second that time is worth, at the machine's usual pace; None: not measured yet."""
        return self._rate() if self.costs.measured_plain else None

    def plan(self, limit: int, drift: Drift | None = None) -> DraftPlan | None:
        """How far this round drafts, where at most ``limit`` drafts are allowed, until the next call; None: not at all.

        Args:
            drift: of the text that it belongs to, likewise.
        """
        self._drift = drift or Drift()
        limit = min(limit, self.max_drafts)
        self._forced = self._fixed if self._fixed is not None else self._scheduled(limit)
        if limit < 1 or self._forced == 0 or (self._forced is None and self.is_off):
            return None
        plan, factor = self._plan, self._drift.factor
        plan.factor = factor
        plan.know(self.costs)
        if self._forced is None:
            plan.weigh(limit, self._rate(), min(1.0, factor * self._next_right / self._next_seen))
        else:
            plan.force(min(self._forced, limit), 0.0 if self._fixed_alternatives else 1.0)
        return plan

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
        if room < 1 or not any(offers):
            return ()
        found, before = [], 1.0
        for place, (confidence, others) in enumerate(zip(confidences, offers, strict=False)):
            found += [
                (before * self._plan.others.chance(chance), Alternative(token, place))
                for token, chance in others
            ]
            before *= self._plan.chance([confidence])
        found = sorted(found, key=lambda each: -each[0])[:room]
        if self._forced is not None:
            return tuple(each for _, each in found[: self._fixed_alternatives])
        rate, dropped = self._rate(), len(confidences) > num_drafts
        for count, (chance, _) in enumerate(found):
            cost = self.costs.verify(num_drafts + count + 1)
            cost -= self.costs.verify(num_drafts + count, dropped and count == 0)
            if chance <= ALTERNATIVE * rate * cost:
                return tuple(each for _, each in found[:count])
        return tuple(each for _, each in found)

    def observe_plain(self, seconds: float) -> None:
        """Learn from a finished round without drafts, whose passes took so long."""
        self._rounds += 1
        self.costs.next_round()
        known = self.costs.measured_plain or seconds
        if not 1 / _SURPRISE < seconds / known < _SURPRISE:
            self._next_refresh, self._refreshes = min(self._next_refresh, self._rounds + _SOON), 0
        self.costs.note_plain(seconds)
        if self._paused:
            self._paused -= 1

    def observe(self, record: RoundRecord) -> None:
        """Learn from a finished round that drafted."""
        self._rounds += 1
        costs, luck = self.costs, self._plan.luck
        costs.next_round()
        dropped = record.num_steps > record.num_drafts
        expected = record.num_steps * costs.draft_step() + costs.verify(record.num_drafts, dropped)
        costs.note_round(
            record.num_steps, record.draft_seconds, record.num_drafts, dropped, record.verify_seconds
        )
        for confidence, was_right in record.outcomes:
            self._drift.learn(luck.chance(confidence), was_right)
            luck.learn(confidence, was_right)
            self._next_right = self._next_right * _FADE + was_right
            self._next_seen = self._next_seen * _FADE + 1
        for probability, was_right in record.others:
            self._plan.others.learn(probability, was_right)
        if self._forced is None:
            seconds = record.draft_seconds + record.verify_seconds
            self._judge(record.num_tokens, costs.without_hiccups(seconds, expected))

    def state(self) -> SpeculationState:
        """Where things stand; may be called from any thread."""
        drafts = self.costs.measured_draft
        acceptance = self._next_right / self._next_seen if drafts else None
        is_off = self.is_off
        return SpeculationState(
            self.costs.measured_plain, drafts, acceptance, is_off, self.reason if is_off else None
        )

    def export(self) -> dict[str, Any]:
        """Everything learnt, as JSON; the caller keeps it per model and machine."""
        return {
            "version": 2,
            "times": self.costs.export(),
            "luck": self._plan.luck.export(),
            "others": self._plan.others.export(),
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
            times = RoundCosts.read(state["times"])
            Calibration().restore(state["luck"])  # may raise
            Calibration(HIGHEST_OTHER).restore(state["others"])
            next_right, next_seen = (number(x) for x in state["next"])
            counts = [int(number(state[name])) for name in ("pause", "paused")]
            if next_seen <= 0:
                return False
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        self.costs.restore(times)
        self._plan.luck.restore(state["luck"])
        self._plan.others.restore(state["others"])
        self._next_right, self._next_seen = next_right, next_seen
        self._pause, self._paused = counts
        self._rounds, self._next_refresh = 0, _REFRESH
        self._pause = min(max(self._pause, _PAUSE), _LONGEST_PAUSE)
        self.reason = state.get("reason") if self._paused else None
        return True

    def _scheduled(self, limit: int) -> int | None:
        """A forced number of drafts for this round, or None."""
        if self._rounds < len(_SCHEDULE):
            return min(_SCHEDULE[self._rounds], limit)
        if self.is_off or self._rounds < self._next_refresh:
            return None
        self._next_refresh = self._rounds + _REFRESH
        self._refreshes += 1
        return min(_REFRESHED[(self._refreshes - 1) % len(_REFRESHED)], limit)

    def _judge(self, tokens: int, seconds: float) -> None:
        """Count a round that gave so many tokens, and switch drafting off if such rounds are no better than plain steps.

        Args:
            seconds: that it took, as :meth:`RoundCosts.without_hiccups` gives them.
        """
        self._tokens += tokens
        self._seconds += seconds
        self._judged += 1
        plain = self.costs.plain()
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
        share, costs = self._next_right / self._next_seen, self.costs
        draft, plain = (1e3 * costs.pace * seconds for seconds in (costs.draft_step(), costs.plain()))
        return (
            f"The accelerated stream is off for now: {share:.0%} of the drafts that could be right were, and a draft costs "
            f"{draft:.1f} ms beside a plain step's {plain:.1f} ms, so drafting "
            f"ran at {ratio:.2f} times the plain speed."
        )

    def _rate(self) -> float:
        """Tokens per second that time is worth, the better of plain and drafting; at the machine's usual pace."""
        plain = 1 / self.costs.plain()
        return max(plain, self._tokens / self._seconds) if self._judged >= _EARLY else plain
