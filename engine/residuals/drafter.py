"""One draft step: the slow row of a token and its accelerated row through the first layers, and the exit.

The slow row is the model's own computation: its keys and values go into the cache and its state is what
verification continues from, so nothing of it is computed twice. (Where a drafter reads coarser copies of the layers,
it is not: later drafts attend to its keys and values, and verification writes the model's own over them.) The
accelerated row only reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decoding.acceptance import Accepted
from engine.decoding.base import TokenSequence
from engine.decoding.context_index import Match, NativeIndex
from engine.decoding.draft_plan import DraftPlan
from engine.decoding.ranking import Candidates, Rank, Ranked, likeliest
from engine.models.attention import Sight, attend
from engine.models.cuda_graph import RamCopy
from engine.models.decoder import Decoder, Place, rms_norm
from engine.models.feed_forward import MixtureOfExperts
from engine.models.graph_stepper import GraphStepper
from engine.models.kv_cache import KVCache
from engine.models.stepper import Stepper, TorchStepper
from engine.quantization.base import Linear
from engine.quantization.dense import DenseLinear
from engine.quantization.int4 import Int4Format, Int4Linear
from engine.quantization.int8 import Int8Linear
from engine.residuals.accelerator import Accelerator, unit_rms


@dataclass(frozen=True)
class Draft:
    """What one draft step gives.

    Attributes:
        token: the drafted token that should follow.
        confidence: its chance, as the draft distribution has it.
        slow_state: ``[1, D]``, the fed token's own state after the draft layers; None: only something near it is known,
            and verification begins before the first layer.
        exit_state: ``[D]``, where the next draft step starts from.
        others: the next in order, with the chances of each, as far as they were asked for.
    """

    token: int
    confidence: float
    slow_state: Tensor | None
    exit_state: Tensor
    others: Ranked = ()


@dataclass
class Drafted:
    """What the stream has drafted in a round.

    Attributes:
        tokens: the drafts that were kept.
        slow: the slow states of all fed tokens; none, if the drafter gives none.
        confidences: of each draft step. The last draft may have been dropped as too unsure; the state of the token before
            it stays useful.
        all_tokens: of each draft step, dropped or kept.
        offers: of each draft step, the other tokens that are likely enough, with their probabilities.
    """

    tokens: list[int] = field(default_factory=list)
    slow: list[Tensor] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    all_tokens: list[int] = field(default_factory=list)
    offers: list[Ranked] = field(default_factory=list)


@dataclass(frozen=True)
class Verified:
    """A round that was drafted and verified, its tokens appended to the text, its cache as the pass left it.

    Attributes:
        drafted: by the stream.
        num_in_chain: drafts, those from the context behind the stream's counted in.
        match: where these are from.
        num_alternatives: tokens verified in place of drafts.
        accepted: what was.
        states: of all rows, ``[T, D]``.
        seconds: that verifying took.
    """

    drafted: Drafted
    num_in_chain: int
    match: Match
    num_alternatives: int
    accepted: Accepted
    states: Tensor
    seconds: float


class Drafter(Protocol):
    """Drafts on a loaded model."""

    depth: int  # layers that a draft step runs

    @property
    def stepper(self) -> Stepper:
        """What verification continues on."""

    def take_up(self, ids: Sequence[int]) -> None:
        """Let the tokens of a text, or of a further part of it, be drafted from now on as well, if this drafter can."""

    def draft(
        self,
        token: int,
        state: Tensor,
        cache: KVCache,
        position: int,
        rank: Rank = likeliest,
        least: float = 1.0,
    ) -> Draft:
        """Feed ``token`` at ``position``: writes the draft layers' keys and values there.

        Args:
            state: what is known of the position before, ``[D]``: its final state if it is verified, else the exit state
                of its draft step.
            rank: which token to draft.
            least: the chance from which on other tokens are asked for.
        """

    def draft_round(self, sequence: TokenSequence, states: Tensor, row: int, plan: DraftPlan) -> Drafted:
        """Draft behind a text, whose last token is to be fed, for as long as the plan will have it.

        Args:
            states: what the stepper gave for the last pass, ``[T, D]``.
            row: of the token before the last.
        """

    def whole_round(
        self,
        sequence: TokenSequence,
        states: Tensor,
        row: int,
        plan: DraftPlan,
        room: int,
        context: RoundContext | None,
    ) -> Verified | None:
        """As :meth:`draft_round`, and verify what there is to be verified; None: this is not done in one here.

        Args:
            room: for drafts in all.
            context: where drafts may come from behind the stream's.
        """


@dataclass(frozen=True)
class RoundContext:
    """A text's earlier tokens as drafts.

    Attributes:
        index: of them.
        luck: addresses of how often matches were right, as :class:`engine.decoding.context.ContextDrafter` has them.
        most: drafts in all, where some are from there.
        worth: tokens per second that time is worth.
    """

    index: NativeIndex
    luck: tuple[int, int]
    most: int
    worth: float


class StepwiseDrafter:
    """A :class:`Drafter` whose rounds are put together here, from its single steps."""

    def take_up(self, ids: Sequence[int]) -> None:
        """It drafts what it was trained to draft, and nothing else."""

    def draft_round(self, sequence: TokenSequence, states: Tensor, row: int, plan: DraftPlan) -> Drafted:
        ids, cache, drafter = sequence.ids, sequence.cache, cast(Drafter, self)
        found, token, state = Drafted(), ids[-1], states[row]
        rank = sequence.sampler.ranking(ids, found.tokens)
        while True:
            least = plan.least_offer(found.confidences)
            draft = drafter.draft(token, state, cache, cache.length + len(found.tokens), rank, least)
            if draft.slow_state is not None:
                found.slow.append(draft.slow_state)
            found.confidences.append(draft.confidence)
            found.all_tokens.append(draft.token)
            found.offers.append(draft.others)
            if not plan.keep(found.confidences):
                return found
            found.tokens.append(draft.token)
            if not plan.more(found.confidences):
                return found
            token, state = draft.token, draft.exit_state

    def whole_round(
        self,
        sequence: TokenSequence,
        states: Tensor,
        row: int,
        plan: DraftPlan,
        room: int,
        context: RoundContext | None,
    ) -> Verified | None:
        """Its steps are not one."""
        return None


class TorchDrafter(StepwiseDrafter):
    """Both rows in one batch through torch: every device and weight format. For a :class:`TorchStepper`."""

    def __init__(self, stepper: Stepper, accelerator: Accelerator) -> None:
        decoder = stepper.decoder
        self.stepper, self.decoder = stepper, decoder
        self.accelerator = accelerator.to(decoder.device, decoder.dtype).requires_grad_(False)
        self.depth = accelerator.config.depth
        vocab = whole_blocks(accelerator.draft_vocab)
        self._vocab = vocab.cpu().numpy()
        self._head = cut_head(decoder, vocab)
        self._in_ram = RamCopy()

    def draft(
        self,
        token: int,
        state: Tensor,
        cache: KVCache,
        position: int,
        rank: Rank = likeliest,
        least: float = 1.0,
    ) -> Draft:
        cache.ensure(position + 1)
        slots = min(cache.capacity, -(-(position + 1) // 16) * 16)
        self.decoder.rope.ensure(slots)
        fed = torch.tensor([[token], [position]], device=self.decoder.device)
        return self._drafted(*self.compute(fed, state, cache, slots), rank, least)

    def compute(
        self, fed: Tensor, state: Tensor, cache: KVCache, slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One draft step without waiting for it.

        Args:
            fed: the token and its position, ``[2, 1]``.
            slots: of the cache that attention looks at.

        Returns:
            The weights of the draft vocabulary's tokens (the largest 1), their total and the largest one's logit, float32
            ``[Vd + 2]``; the slow state ``[1, D]``; the exit state ``[D]``.
        """
        decoder, accelerator = self.decoder, self.accelerator
        condition, embedded = unit_rms(state, decoder.config.norm_eps), decoder.embed(fed[:1])[0]
        rows = torch.cat((embedded, accelerator.begin(embedded, condition)))[None]  # [1, 2, D]
        place = decoder.place(Sight(fed[1:].expand(1, 2), slots), cache)
        for index in range(self.depth):
            rows = self._layer(index, rows, place)
        exit_state = accelerator.finish(decoder, rows[0, 1], condition)
        gain = decoder.weights.final_norm.to(exit_state.dtype)
        logits = self._head((exit_state * gain)[None])[0].float()
        best = logits.amax(0, keepdim=True)
        weights = (logits - best).exp()
        return torch.cat((weights, weights.sum(0, keepdim=True), best)), rows[0, :1], exit_state

    def _drafted(
        self, weights: Tensor, slow_state: Tensor, exit_state: Tensor, rank: Rank, least: float
    ) -> Draft:
        found = self._in_ram(weights).numpy()
        candidates = Candidates(self._vocab, found[:-2], float(found[-2]), float(found[-1]))
        (token, confidence), *others = rank(candidates, least)
        return Draft(token, confidence, slow_state, exit_state, tuple(others))

    def _layer(self, index: int, rows: Tensor, place: Place) -> Tensor:
        decoder, config, cache, sight = self.decoder, self.decoder.config, place.cache, place.sight
        layer, adapters = decoder.layers[index], self.accelerator.adapters(index)
        x = rms_norm(rows, layer.attn_norm, config.norm_eps)
        mixed = layer.qkv(x)
        width = config.num_heads * config.head_dim
        adapters.q.add_to(mixed[0, 1:, :width], x[0, 1:])
        q, k, v = decoder.split_qkv(index, mixed, place.cos, place.sin)
        cache.write(index, sight.positions[:, :1], k[:, :1], v[:, :1])
        attended = attend(q, *cache.read(index, sight.num_slots), sight, config.sliding_window(index))
        out = layer.o(attended)
        adapters.o.add_to(out[0, 1:], attended[0, 1:])
        rows = rows + out
        x = rms_norm(rows, layer.mlp_norm, config.norm_eps)
        if isinstance(layer.ffn, MixtureOfExperts):
            weights, chosen = layer.ffn.route(x[0, :1])
            out = layer.ffn.mix(x[0], weights.expand(2, -1), chosen.expand(2, -1))[None]
            adapters.experts.add_to(out[0, 1:], x[0, 1:])
            return rows + out
        wide = layer.dense.gate_up(x)
        adapters.gate_up.add_to(wide[0, 1:], x[0, 1:])
        gate, up = wide.chunk(2, dim=-1)
        inner = F.silu(gate) * up
        out = layer.dense.down(inner)
        adapters.down.add_to(out[0, 1:], inner[0, 1:])
        return rows + out


class GraphDrafter(TorchDrafter):
    """The same, captured as a CUDA graph. For a :class:`engine.models.graph_stepper.GraphStepper`."""

    def __init__(self, stepper: GraphStepper, accelerator: Accelerator) -> None:
        super().__init__(stepper, accelerator)
        self._graphs = stepper

    def draft(
        self,
        token: int,
        state: Tensor,
        cache: KVCache,
        position: int,
        rank: Rank = likeliest,
        least: float = 1.0,
    ) -> Draft:
        cache.ensure(position + 1)
        slots = self._graphs.num_slots(cache, position + 1)

        def compute(own: KVCache, fed: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            return self.compute(fed, state, own, slots)

        key, fed = ("draft", id(self), slots), torch.tensor([[token], [position]])
        if not self._graphs.has(cache, key):
            self._graphs.prepare(cache, self.depth)
        weights, slow_state, exit_state = self._graphs.run(cache, key, compute, fed, state)
        return self._drafted(weights, slow_state.clone(), exit_state.clone(), rank, least)


def whole_blocks(draft_vocab: Tensor) -> Tensor:
    """The draft vocabulary ``[Vd]``, its last token repeated up to a multiple of 64: packed formats want that.
    A copy stands for the same token, and is drafted at most where that token would be."""
    return F.pad(draft_vocab, (0, -len(draft_vocab) % 64), value=int(draft_vocab[-1]))


def cut_head(decoder: Decoder, draft_vocab: Tensor) -> Linear:
    """The LM head's rows of ``draft_vocab``, in the head's own weight format and with its own codes."""
    head, keep = decoder.weights.lm_head, draft_vocab.to(decoder.device)
    bias = None if head.bias is None else head.bias[keep]
    if isinstance(head, DenseLinear):
        return DenseLinear(head.weight[keep].contiguous(), bias)
    if isinstance(head, Int8Linear):
        return head.rows(keep, bias)
    if isinstance(head, Int4Linear):
        return Int4Format().pack(head.rows(keep), bias, decoder.device)
    weight = head.dequantize()[keep].to(decoder.device, decoder.dtype)
    return DenseLinear(weight.contiguous(), bias)


def make_drafter(stepper: Stepper, accelerator: Accelerator) -> Drafter:
    """The drafter for this stepper; the slow states that it gives have the stepper's own bits."""
    config, depth = stepper.decoder.config, accelerator.config.depth
    if isinstance(stepper, GraphStepper) and not any(config.is_sparse(index) for index in range(depth)):
        return GraphDrafter(stepper, accelerator)
    if isinstance(stepper, (TorchStepper, GraphStepper)):
        return TorchDrafter(stepper, accelerator)
    from engine.kernels.drafter import FusedDrafter  # loads the compiler
    from engine.kernels.stepper import FusedStepper

    return FusedDrafter(cast(FusedStepper, stepper), accelerator)
