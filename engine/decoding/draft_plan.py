"""How far one round drafts: what :mod:`engine.decoding.controller` knows, as numbers that decide from draft to draft.

They lie in one block of memory, for where a drafter runs in native code its drafts are decided on there
(:mod:`engine.kernels.draft_chain`), by the same rules as here.
"""

from __future__ import annotations

import math

import numpy as np

from engine.decoding.calibration import Calibration
from engine.decoding.costs import RoundCosts
from engine.decoding.native_memory import address, numbers
from engine.kernels import plan_fields as fields

MOST_DRAFTS = fields.MOST_DRAFTS


class DraftPlan:
    """One for a controller, filled anew for each round.

    Attributes:
        luck: how often drafts of a given confidence were right.
        others: how often other tokens of a given probability were.
        address: of the numbers.
    """

    def __init__(self) -> None:
        block = np.zeros(fields.NUM_PLAN_FIELDS)
        self._block, self._numbers, self.address = block, numbers(block), address(block)
        places = (fields.RIGHT, fields.SEEN, fields.OTHER_RIGHT, fields.OTHER_SEEN)
        right, seen, others_right, others_seen = (
            numbers(block[place : place + fields.BINS]) for place in places
        )
        self.luck = Calibration(memory=(right, seen))
        self.others = Calibration(fields.HIGHEST_OTHER, (others_right, others_seen))
        self._numbers[fields.FACTOR] = 1.0
        self._edition = -1

    def force(self, drafts: int, least: float) -> None:
        """Exactly so many drafts, all kept, whatever they cost; other tokens than the likeliest are asked for from the chance
        ``least`` on."""
        block = self._numbers
        block[fields.LIMIT] = block[fields.FORCED] = drafts
        block[fields.LEAST] = least

    def weigh(self, limit: int, rate: float, following: float) -> None:
        """As many drafts as are worth it, up to ``limit``, by what passes take (:meth:`know`).

        Args:
            rate: tokens per second that time is worth.
            following: the chance that a draft is right of which nothing is known but that those before it are.
        """
        block = self._numbers
        block[fields.LIMIT], block[fields.FORCED] = limit, -1
        block[fields.RATE], block[fields.FOLLOWING] = rate, following

    def know(self, costs: RoundCosts) -> None:
        """Take over what passes take."""
        if costs.edition != self._edition:
            block, self._edition = self._numbers, costs.edition
            block[fields.DRAFT_SECONDS] = costs.draft_step()
            for drafts in range(1, MOST_DRAFTS + 1):
                block[fields.ROW_SECONDS + drafts] = costs.verify(drafts + 1) - costs.verify(drafts)
            for drafts in range(1, costs.max_drafts + 1):
                kept = costs.verify(drafts) - costs.verify(drafts - 1, dropped=True)
                block[fields.KEPT_SECONDS + drafts] = kept

    @property
    def wants_alternatives(self) -> bool:
        """Whether other tokens than the drafts are asked for though their number is forced: for tests and measurements."""
        return bool(self._numbers[fields.FORCED] >= 0 and self._numbers[fields.LEAST] < 1)

    @property
    def limit(self) -> int:
        """No more drafts than that."""
        return int(self._numbers[fields.LIMIT])

    @property
    def factor(self) -> float:
        """Of chances, in the text at hand."""
        return float(self._numbers[fields.FACTOR])

    @factor.setter
    def factor(self, factor: float) -> None:
        self._numbers[fields.FACTOR] = factor

    def chance(self, confidences: list[float]) -> float:
        """That all of these drafts are right."""
        factor, luck = self.factor, self.luck
        return math.prod(min(fields.SURE, factor * luck.chance(confidence)) for confidence in confidences)

    def keep(self, confidences: list[float]) -> bool:
        """Is the last draft worth verifying?"""
        block = self._numbers
        if block[fields.FORCED] >= 0:
            return True
        return self.chance(confidences) > block[fields.RATE] * block[fields.KEPT_SECONDS + len(confidences)]

    def more(self, confidences: list[float]) -> bool:
        """Is another draft worth making after these, all kept?"""
        block, count = self._numbers, len(confidences)
        if count >= block[fields.LIMIT]:
            return False
        if block[fields.FORCED] >= 0:
            return True
        cost = block[fields.DRAFT_SECONDS] + block[fields.ROW_SECONDS + count]
        return self.chance(confidences) * block[fields.FOLLOWING] > block[fields.RATE] * cost

    def least_offer(self, confidences: list[float]) -> float:
        """The least probability that makes another token than the next draft worth knowing, behind these drafts."""
        block = self._numbers
        if block[fields.FORCED] >= 0:
            return float(block[fields.LEAST])
        cost = block[fields.ROW_SECONDS + len(confidences) + 1]
        return fields.OFFERED * block[fields.RATE] * cost / self.chance(confidences)
