"""Drafts on the fused kernels: one command of the team for a whole round, and step by step where layers have experts."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.decoding.acceptance import Accepted, Alternative, accept
from engine.decoding.base import TokenSequence
from engine.decoding.context_index import NO_MATCH, Match
from engine.decoding.draft_plan import MOST_DRAFTS, DraftPlan
from engine.decoding.native_memory import address, numbers
from engine.decoding.ranking import Candidates, Rank, likeliest
from engine.kernels import control, plan_fields, round_fields
from engine.kernels.adapters import describe_adapter, int8_map
from engine.kernels.draft_head import DraftHead
from engine.kernels.draft_layers import use_copies
from engine.kernels.expert_stepper import FusedExpertStepper, Side
from engine.kernels.stepper import MAX_ROWS, FusedStepper
from engine.models.kv_cache import KVCache
from engine.residuals.accelerator import Accelerator
from engine.residuals.drafter import Draft, Drafted, RoundContext, StepwiseDrafter, Verified
from engine.threads import use_threads


@dataclass(frozen=True)
class _Slot:
    """Where a draft step puts its rows ``[2, D]`` and its exit state: made once, for behind a step that swept the caches
    making a tensor takes tens of microseconds."""

    rows: Tensor
    slow_state: Tensor
    exit_state: Tensor


class _Round:
    """Where the steps of a round put theirs, and what they drafted."""

    def __init__(self, size: int) -> None:
        self.rows, self.exit_states = (
            torch.zeros(MOST_DRAFTS + 1, 2, size),
            torch.zeros(MOST_DRAFTS + 1, size),
        )
        self._slow_states = [rows[:1] for rows in self.rows]
        chain = np.zeros(plan_fields.NUM_CHAIN_FIELDS, np.int64)
        self._words, self._floats, self.address = (
            numbers(chain), numbers(chain.view(np.float64)), address(chain),
        )  # fmt: skip

    def drafted(self, has_slow_states: bool) -> Drafted:
        words, floats = self._words, self._floats
        found, steps = Drafted(), -words[plan_fields.NUM_STEPS]
        if has_slow_states:
            found.slow = self._slow_states[:steps]
        for entry in range(
            plan_fields.STEPS, plan_fields.STEPS + steps * plan_fields.STEP_FIELDS, plan_fields.STEP_FIELDS
        ):
            found.all_tokens.append(words[entry + plan_fields.DRAFT_TOKEN])
            found.confidences.append(floats[entry + plan_fields.CONFIDENCE])
            if not (count := words[entry + plan_fields.NUM_OTHERS]):
                found.offers.append(())
                continue
            first, chances = entry + plan_fields.OTHERS, entry + plan_fields.OTHER_CHANCES
            others = [(words[first + other], floats[chances + other]) for other in range(count)]
            found.offers.append(tuple(others))
        found.tokens = found.all_tokens[: words[plan_fields.NUM_KEPT]]
        return found


class _Task:
    """What a round in one command is told, and what comes of it."""

    def __init__(self) -> None:
        block = np.zeros(round_fields.NUM_ROUND_FIELDS, np.int64)
        self.words, self.floats = numbers(block), numbers(block.view(np.float64))
        self.address = address(block)

    def take(self, ids: Sequence[int], room: int, context: RoundContext | None) -> None:
        """Be about the text ``ids``, with room for so many drafts."""
        words = self.words
        words[round_fields.NUM_TOKENS], words[round_fields.LAST_TOKEN] = len(ids), ids[-1]
        words[round_fields.ROOM] = room
        if context is None:
            words[round_fields.INDEX] = 0
            return
        context.index.follow()
        words[round_fields.INDEX], self.floats[round_fields.WORTH] = context.index.address, context.worth
        words[round_fields.LUCK_RIGHT], words[round_fields.LUCK_SEEN] = context.luck
        words[round_fields.MOST_FROM_CONTEXT] = context.most

    def tokens(self, first: int, count: int) -> list[int]:
        """So many of them from a field on."""
        found: list[int] = self.words[first : first + count].tolist()
        return found

    def alternatives(self) -> list[Alternative]:
        count = self.words[round_fields.NUM_ALTERNATIVES]
        tokens = self.tokens(round_fields.ALTERNATIVES, count)
        places = self.tokens(round_fields.ALTERNATIVE_PLACES, count)
        return [Alternative(token, place) for token, place in zip(tokens, places, strict=True)]


def _slot(size: int) -> _Slot:
    rows = torch.zeros(2, size)
    return _Slot(rows, rows[:1], torch.zeros(size))


class FusedDrafter(StepwiseDrafter):
    """A :class:`engine.residuals.drafter.Drafter` on a :class:`FusedStepper`.

    Adapters and maps are rounded to int8 and the draft head to int4, whatever the model's own format, and where the
    stepper ``drafts_on_copies``, the layers too. The slow row then only comes near the stepper's own, which it has the
    bits of otherwise. A round's drafts last until the next round's.
    """

    def __init__(self, stepper: FusedStepper, accelerator: Accelerator) -> None:
        decoder, table = stepper.decoder, stepper.table
        self.stepper = stepper
        self.depth = accelerator.config.depth
        self._adapters = np.zeros((self.depth, control.ADAPTER_FIELDS), np.int64)
        self._sides: dict[int, Side] = {}  # of the layers with experts
        for index in range(self.depth):
            adapters = accelerator.adapters(index)
            pairs = [adapters.q, adapters.o]
            pairs += (
                [adapters.experts] if decoder.config.is_sparse(index) else [adapters.gate_up, adapters.down]
            )
            described = np.concatenate([describe_adapter(table, pair) for pair in pairs])
            self._adapters[index, : described.size] = described
            if decoder.config.is_sparse(index):
                places = (control.SIDE_QUERY, control.SIDE_OUTPUT, control.SIDE_FEED_FORWARD)
                step = 8 * 2 * control.LINEAR_FIELDS
                at = self._adapters[index].ctypes.data
                self._sides[index] = Side(1, {place: at + n * step for n, place in enumerate(places)})
        self._parts = _parts(self.depth, self._sides)
        self._head = DraftHead(decoder.weights.lm_head, accelerator.draft_vocab, stepper.draft_head_is_int4)
        layers, kept = stepper.layers, self.depth
        if stepper.drafts_on_copies:  # behind the head, which takes more memory to make
            records = stepper.copy_layers()
            use_copies(table, records, decoder.layers[: self.depth])
            layers, kept = records.ctypes.data, 0
        stepper.team.control[control.KEPT_LAYERS] = kept
        start = 0
        if accelerator.start is not None:
            start = table.describe(int8_map(accelerator.start)).ctypes.data
        self._weights = np.zeros(len(self._head.tokens), np.float32)
        self._total_and_best = np.zeros(2, np.float32)
        size = decoder.config.hidden_size
        self._slots = itertools.cycle([_slot(size) for _ in range(MAX_ROWS)])
        self._exit_map = table.describe(int8_map(accelerator.exit)).ctypes.data
        self._fields = {
            control.ROWS: 2,
            control.NORM: stepper.final_norm,
            control.DRAFT_LAYERS: layers,
            control.ADAPTERS: self._adapters.ctypes.data,
            control.START_MAP: start,
            control.DRAFT_HEAD: table.describe(self._head.linear).ctypes.data,
            control.NO_GAIN: table.vector(torch.ones(size)),
            control.DRAFT_LOGITS: self._weights.ctypes.data,
            control.DRAFT_TOTAL: self._total_and_best.ctypes.data,
        }
        self._round, self._state_bytes = _Round(size), 4 * size
        self._round_fields = {
            **self._fields,
            control.FIRST: 0,
            control.LAST: self.depth,
            control.EXIT_MAP: self._exit_map,
            control.OUT: self._round.rows.data_ptr(),
            control.DRAFT_BUFFER: self._round.exit_states.data_ptr(),
            control.CHAIN: self._round.address,
            control.ROUND: 0,
        }
        self._task = _Task()
        for field, value in (
            (round_fields.HAS_SLOW_STATES, int(not stepper.drafts_on_copies)),
            (round_fields.SLOW_STATES, self._round.rows.data_ptr()),
            (round_fields.SLOW_STEP, 2 * self._state_bytes),
            (round_fields.PASS_FIRST, self.depth),
            (round_fields.PASS_LAST, decoder.config.num_layers),
        ):
            self._task.words[field] = value
        stepper.reserve_adapters(
            max(accelerator.adapters(index).q.down.shape[0] for index in range(self.depth))
        )

    def take_up(self, ids: Sequence[int]) -> None:
        self._head.take_up(ids)

    def draft(
        self,
        token: int,
        state: Tensor,
        cache: KVCache,
        position: int,
        rank: Rank = likeliest,
        least: float = 1.0,
    ) -> Draft:
        stepper, slot = self.stepper, next(self._slots)
        stepper.follow(cache, position + 1)
        stepper.use_tokens((token,))
        rows = slot.rows
        for part in self._parts:
            if isinstance(part, int):
                with use_threads(1):
                    rows = self._run_experts(part, rows, position)
            else:
                self._run_dense(part, rows, slot, state, position)
                rows = slot.rows
        total, best = self._total_and_best.tolist()
        slow_state = None if stepper.drafts_on_copies else slot.slow_state
        ranked = rank(Candidates(self._head.tokens, self._weights, total, best), least)
        return Draft(*ranked[0], slow_state, slot.exit_state, ranked[1:])

    def draft_round(self, sequence: TokenSequence, states: Tensor, row: int, plan: DraftPlan) -> Drafted:
        """In one command, unless layers have experts."""
        task = None
        if not self._sides:
            task = sequence.sampler.draft_task(sequence.ids, self._head.tokens, self._weights)
        if task is None:
            return super().draft_round(sequence, states, row, plan)
        stepper, position, fields = self.stepper, sequence.cache.length, self._round_fields
        stepper.follow(sequence.cache, position + plan.limit)
        stepper.use_tokens(sequence.ids[-1:])
        stepper.use_positions((position, position), (position, -1))
        fields[control.CONDITION] = states.data_ptr() + row * self._state_bytes
        fields[control.PLAN], fields[control.CHOICE], fields[control.ROUND] = plan.address, task, 0
        stepper.team.run(control.RUN_DRAFTS, fields)
        return self._round.drafted(not stepper.drafts_on_copies)

    def whole_round(
        self,
        sequence: TokenSequence,
        states: Tensor,
        row: int,
        plan: DraftPlan,
        room: int,
        context: RoundContext | None,
    ) -> Verified | None:
        """In one command, where the model is dense and native code can tell its tokens."""
        stepper, ids, sampler = self.stepper, sequence.ids, sequence.sampler
        if not stepper.runs_rounds or plan.wants_alternatives:
            return None
        vocabulary = stepper.decoder.config.vocab_size
        choice = sampler.draft_task(ids, self._head.tokens, self._weights, vocabulary)
        if choice is None:
            return None
        started, position, fields, task = (
            perf_counter(),
            sequence.cache.length,
            self._round_fields,
            self._task,
        )
        stepper.follow(sequence.cache, position + min(room + 1, round_fields.MOST_ROWS))
        stepper.use_tokens(ids[-1:])
        stepper.use_positions((position, position), (position, -1))
        task.take(ids, room, context)
        passed = stepper.pass_fields(round_fields.MOST_ROWS, sampler.weighs_at)
        task.words[round_fields.PASS_OUT] = stepper.states_address
        task.words[round_fields.NOTE_STEP] = stepper.note_step
        fields[control.CONDITION] = states.data_ptr() + row * self._state_bytes
        fields[control.PLAN], fields[control.CHOICE] = plan.address, choice
        fields[control.ROUND] = task.address
        stepper.team.run(control.RUN_ROUND, fields | passed)
        return self._verified(sequence, started)

    def _verified(self, sequence: TokenSequence, started: float) -> Verified:
        """What came of a round in one command."""
        words, task, ids = self._task.words, self._task, sequence.ids
        drafted = self._round.drafted(has_slow_states=False)
        chain, others = words[round_fields.NUM_CHAIN], words[round_fields.NUM_ALTERNATIVES]
        states, logits = self.stepper.given(1 + chain + others)
        if count := words[round_fields.NUM_NEW]:
            ids += task.tokens(round_fields.NEW_TOKENS, count)
            right, instead = words[round_fields.NUM_RIGHT], bool(words[round_fields.HAS_ALTERNATIVE])
            is_bonus = instead or right == chain > 0
            accepted = Accepted(right, instead, words[round_fields.ROW], is_bonus)
        else:
            drafts = task.tokens(round_fields.CHAIN_TOKENS, chain)
            accepted = accept(logits, drafts, ids, sequence.sampler, task.alternatives())
        length = words[round_fields.MATCH_LENGTH]
        share = 1 - words[round_fields.DRAFT_TICKS] / max(1, words[round_fields.TICKS])
        seconds = share * (perf_counter() - started)
        return Verified(
            drafted, chain, Match(length) if length else NO_MATCH, others, accepted, states, seconds
        )

    def _run_dense(self, layers: range, rows: Tensor, slot: _Slot, state: Tensor, position: int) -> None:
        """Neighbouring dense layers, if any, with token and start map before the first layer and the exit behind the
        last; from ``rows``, if there are layers before, into the slot's."""
        self.stepper.use_positions((position, position), (position, -1))
        fields = {
            **self._fields,
            control.FIRST: layers.start,
            control.LAST: layers.stop,
            control.EXIT_MAP: self._exit_map if layers.stop == self.depth else 0,
            control.HIDDEN: rows.data_ptr(),
            control.OUT: slot.rows.data_ptr(),
            control.CONDITION: state.data_ptr(),
            control.DRAFT_BUFFER: slot.exit_state.data_ptr(),
        }
        self.stepper.team.run(control.RUN_DRAFT, fields)

    def _run_experts(self, index: int, rows: Tensor, position: int) -> Tensor:
        stepper = cast(FusedExpertStepper, self.stepper)
        attended = stepper.attend(index, rows, (position, position), (position, -1), self._sides[index])
        if stepper.decoder.watch is not None:
            stepper.decoder.watch(index, attended.hidden[None, :1])
        return stepper.feed_forward(index, attended)


def _parts(depth: int, sparse: Container[int]) -> list[range | int]:
    """A draft step's layers: ranges of dense ones, an empty one perhaps at the start and at the end, and single ones
    with experts."""
    found: list[range | int] = []
    index = 0
    while True:
        end = next((i for i in range(index, depth) if i in sparse), depth)
        found.append(range(index, end))
        if end == depth:
            return found
        while end < depth and end in sparse:
            found.append(end)
            end += 1
        index = end
