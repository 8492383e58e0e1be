"""M2R2 self-speculative decoding: the accelerated residual stream drafts, the model verifies.

A round, from the last token ``t`` at position ``L`` (the cache holds ``L`` tokens):

1. Draft, up to ``d`` times: the slow row and the accelerated row of the last token through layers
   ``[0, k)``; the exit gives the next draft. The slow row's keys, values and state are kept. Where the exit thought other
   tokens likely as well, some join as alternatives: leaves of a tree whose trunk the drafts are (our choice).
2. Verify: all kept slow states through layers ``[k, N)`` in one pass, then the head. (A last draft that was kept has
   the first layers still before it.) A drafter on coarser copies of the layers gives no slow states: then the last
   token and all drafts go through layers ``[0, N)``, which writes the model's own keys and values over the drafter's.
3. Accept the longest prefix that the model itself would have chosen, then an alternative, if that is what it would have
   chosen next, and one token of the model's own.
4. Roll back: an accepted alternative's keys and values move to its position, and the cache's length is set behind the
   last accepted token.

Where the text repeats itself, the drafts are taken from the context instead, without any of the first step's work
(our choice; see :mod:`engine.decoding.context`).

The accelerated row starts from what is known of the position before it: its verified final state for the
first draft, the stream's own exit state for the later ones (our choice; see ``engine.residuals``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor

from engine.decoding.acceptance import accept, round_step, verify_chain
from engine.decoding.base import Step, TokenSequence
from engine.decoding.calibration import Drift
from engine.decoding.context import MAX_DRAFTS, ContextDrafter
from engine.decoding.context_index import NO_MATCH, Match, NativeIndex, index_of
from engine.decoding.controller import DepthController, RoundRecord, SpeculationState
from engine.decoding.draft_plan import DraftPlan
from engine.requests import Provenance
from engine.residuals.drafter import Drafted, Drafter, RoundContext, Verified


class M2R2Decoding:
    """Self-speculation with a trained accelerator; the controller chooses how far to draft.

    Args:
        context: what takes drafts from the context; None: the stream alone drafts.
    """

    name = "m2r2"
    lossless = True

    def __init__(
        self, drafter: Drafter, controller: DepthController, context: ContextDrafter | None = None
    ) -> None:
        self._drafter, self._controller, self._context = drafter, controller, context
        self._stepper = drafter.stepper

    def start(self, sequence: TokenSequence) -> None:
        self._sequence = sequence
        self._drift = Drift()
        # The last verified position's state is a row of these; the prefill keeps none.
        self._states: Tensor | None = None
        self._row = self._taken_up = 0  # the latter: tokens of the text that the drafter knows of
        self._index = index_of(sequence.ids)

    def step(self, max_tokens: int) -> Step:
        started = perf_counter()
        if self._context is not None and (step := self._from_context(max_tokens, started, self._context)):
            return step
        limit = min(max_tokens, self._stepper.max_rows) - 1
        if self._states is None or (plan := self._controller.plan(limit, self._drift)) is None:
            return self._plain_step(started)
        return self._round(plan, limit, started)

    def step_aside(self) -> None:
        """Keep the state that the next drafts start from: a pass gives its states until the next one."""
        if self._states is not None:
            self._states, self._row = self._states[self._row : self._row + 1].clone(), 0

    def _plain_step(self, started: float) -> Step:
        """A round that drafts nothing."""
        sequence = self._sequence
        cache, ids = sequence.cache, sequence.ids
        self._row, first = 0, self._states is None
        self._states, logits = self._stepper.forward(ids[-1:], cache, weigh_at=sequence.sampler.weighs_at)
        cache.length += 1
        token = sequence.sampler.choose(logits, ids, 0)
        ids.append(token)
        seconds = perf_counter() - started
        # The first step behind a prompt finds caches and threads cold and takes half as long again: counted
        # among the plain steps, it would make drafting look better than it is.
        if not first:
            self._controller.observe_plain(seconds)
        return Step((token,), (Provenance.VERIFIED,), verify_seconds=seconds)

    def _round(self, plan: DraftPlan, limit: int, started: float) -> Step:
        """A round that drafts."""
        sequence, drafter, states = self._sequence, self._drafter, self._states
        cache, ids = sequence.cache, sequence.ids
        assert states is not None
        drafter.take_up(ids[self._taken_up :])
        start, self._taken_up = cache.length, len(ids)
        context, found = self._context, None
        if context is None or context.fixed is None:
            found = drafter.whole_round(sequence, states, self._row, plan, limit, self._round_context())
        if found is None:
            found = self._verify(drafter.draft_round(sequence, states, self._row, plan), plan, limit)
        accepted, own = found.accepted, len(found.drafted.tokens)
        if accepted.alternative:
            self._stepper.copy_slot(cache, start + accepted.row, start + accepted.num_drafts)
        cache.length = start + accepted.num_drafts + 1
        self._states, self._row = found.states, accepted.row

        times = perf_counter() - started - found.seconds, found.seconds
        tokens, num_drafts = ids[start + 1 :], found.num_in_chain + found.num_alternatives
        self._controller.observe(_record(found.drafted, tokens, num_drafts, *times))
        if context is not None and found.num_in_chain > own:
            context.observe(found.match, found.num_in_chain - own, accepted.num_in_chain - own)
        return round_step(tokens, num_drafts, accepted, *times)

    def _verify(self, drafted: Drafted, plan: DraftPlan, limit: int) -> Verified:
        """What there is to be verified of a round."""
        started, sequence = perf_counter(), self._sequence
        cache, ids = sequence.cache, sequence.ids
        drafts, confidences = drafted.tokens, drafted.confidences
        match, own = NO_MATCH, len(drafts)
        if own and own == len(confidences):  # the last draft was kept
            match, more = self._more_from_context(plan, drafts, confidences, limit - own)
            drafts = [*drafts, *more]
        num_drafts = len(drafts)
        offers, room = drafted.offers[:own], limit - num_drafts
        others = self._controller.alternatives(confidences, offers, num_drafts, room)

        unfed = [ids[-1], *drafts, *(each.token for each in others)][len(drafted.slow) :]
        instead_of = [each.place + 1 for each in others]
        states, logits = self._stepper.forward(
            unfed, cache, drafted.slow, self._drafter.depth, instead_of, sequence.sampler.weighs_at
        )
        accepted = accept(logits, drafts, ids, sequence.sampler, others)
        seconds = perf_counter() - started
        return Verified(drafted, num_drafts, match, len(others), accepted, states, seconds)

    def _round_context(self) -> RoundContext | None:
        """What a round in one command may take drafts from."""
        context, index, worth = self._context, self._index, self._controller.rate
        if context is None or worth is None or not isinstance(index, NativeIndex):
            return None
        return RoundContext(index, context.luck, MAX_DRAFTS, worth)

    def _more_from_context(
        self, plan: DraftPlan, drafts: list[int], confidences: list[float], limit: int
    ) -> tuple[Match, tuple[int, ...]]:
        """What the context says behind the stream's drafts."""
        controller, context = self._controller, self._context
        if context is None or controller.rate is None:
            return NO_MATCH, ()
        match = self._index.find(limit, drafts)
        if not match.tokens:
            return NO_MATCH, ()
        chance, rate = plan.chance(confidences), controller.rate
        return match, context.extend(match, limit, len(drafts), chance, controller.costs, rate)

    def _from_context(self, max_tokens: int, started: float, context: ContextDrafter) -> Step | None:
        """A round with drafts from the context, if there are any worth verifying."""
        limit = min(max_tokens, self._stepper.max_rows) - 1
        match = self._index.find(limit)
        if not match.tokens:
            return None
        costs = self._controller.costs
        drafts = context.choose(match, limit, costs, self._controller.rate)
        if not drafts:
            return None
        is_first = self._states is None
        accepted, step, self._states = verify_chain(self._stepper, self._sequence, drafts, started)
        self._row = accepted
        context.observe(match, len(drafts), accepted)
        if not is_first:
            costs.next_round()
            costs.note_verification(len(drafts), step.verify_seconds)
        return step


def _record(
    drafted: Drafted, tokens: Sequence[int], num_drafts: int, draft_seconds: float, verify_seconds: float
) -> RoundRecord:
    """For the controller: a round that gave ``tokens``."""
    outcomes, others = [], []
    steps = zip(drafted.all_tokens, drafted.confidences, drafted.offers, tokens, strict=False)
    for draft, confidence, offers, right in steps:
        outcomes.append((confidence, draft == right))
        others += [(probability, token == right) for token, probability in offers]
        if draft != right:
            break  # behind a wrong draft nothing is known
    return RoundRecord(
        len(drafted.confidences),
        num_drafts,
        len(tokens),
        draft_seconds,
        verify_seconds,
        tuple(outcomes),
        tuple(others),
    )


class M2R2:
    """What all generations of one loaded model share: the drafter, built on first use, and the controller.

    Args:
        make_drafter: loads the accelerator; may take a moment and some megabytes.
        keep: called when the model is unloaded, to remember what the controller has learnt.
        context: what takes drafts from the context; None: the stream alone drafts.
    """

    def __init__(
        self,
        make_drafter: Callable[[], Drafter],
        controller: DepthController | None = None,
        keep: Callable[[], None] | None = None,
        context: ContextDrafter | None = None,
    ) -> None:
        self._make_drafter = make_drafter
        self._context = context
        self._drafter: Drafter | None = None
        self.controller = controller or DepthController()
        self._keep = keep

    def keep(self) -> None:
        """Remember what the controller has learnt, if it has drafted at all."""
        if self._keep is not None and self._drafter is not None:
            self._keep()

    def state(self) -> SpeculationState:
        """Where things stand."""
        return self.controller.state()

    def new_method(self) -> M2R2Decoding:
        """A method for one generation.

        Raises:
            AdapterError: the accelerator's file is damaged.
        """
        if self._drafter is None:
            self._drafter = self._make_drafter()
        return M2R2Decoding(self._drafter, self.controller, self._context)
