"""Training an accelerator by self-distillation, the base model frozen.

One batch: run the base model over whole sequences, keeping keys, values and final states; then run the
accelerated stream for every position at once. Drafting several tokens ahead is unrolled: in pass ``j``
each position's condition is the exit state that pass ``j - 1`` gave its left neighbour, exactly as in
decoding (the unrolling follows EAGLE-3's training-time test, arXiv 2503.01840; applying it here is
our choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.decoder import Decoder, rms_norm
from engine.models.feed_forward import MixtureOfExperts, Route
from engine.residuals.accelerator import Accelerator, unit_rms
from engine.residuals.corpus import Sequences, causal_attention


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters. Learning rates follow a short warm-up and a cosine to a tenth.

    Attributes:
        tokens_per_batch: positions per optimiser step, padding included.
        num_passes: how many draft steps are unrolled.
        pass_decay: weight of pass ``j`` is ``pass_decay ** j``.
        alignment: weight of the term that pulls the exit state towards the model's final state.
        hard: share of the loss that is cross-entropy with the model's own argmax.
    """

    tokens_per_batch: int = 16384
    num_passes: int = 3
    pass_decay: float = 0.8
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    alignment: float = 0.5
    hard: float = 0.2
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimiser step, and their final states where these were kept from an earlier run.

    Attributes:
        finals: final states of unit RMS, ``[B, T, D]``; None: the base model computes them again.
    """

    sequences: Sequences
    finals: Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """What the base model gives for one batch: everything the accelerated stream learns from."""

    embedded: Tensor  # [B, T, D]
    keys: list[Tensor]  # of the first layers, [B, T, Hkv, hd], rotated
    values: list[Tensor]
    routes: list[Route | None]  # of the same layers, for all positions
    final: Tensor  # final state of unit RMS, [B, T, D]
    cos: Tensor
    sin: Tensor


@torch.no_grad()
def run_teacher(decoder: Decoder, tokens: Tensor, depth: int, finals: Tensor | None = None) -> Teacher:
    """The base model over ``tokens [B, T]``; K/V of the first ``depth`` layers are kept.

    With ``finals`` (see :class:`Batch`) only those layers run.
    """
    config = decoder.config
    decoder.rope.ensure(tokens.shape[1])
    cos, sin = decoder.rope.rows(torch.arange(tokens.shape[1], device=tokens.device)[None], decoder.dtype)
    embedded = hidden = decoder.embed(tokens)
    keys, values, routes = [], [], []
    for index in range(config.num_layers if finals is None else depth):
        hidden, k, v, route = _slow_layer(decoder, index, hidden, cos, sin)
        if index < depth:
            keys.append(k)
            values.append(v)
            routes.append(route)
    if finals is None:
        finals = unit_rms(hidden, config.norm_eps)
    return Teacher(embedded, keys, values, routes, finals.to(hidden), cos, sin)


def _slow_layer(
    decoder: Decoder, index: int, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Route | None]:
    config, layer = decoder.config, decoder.layers[index]
    x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
    q, k, v = decoder.project_qkv(index, x, cos, sin)
    hidden = hidden + layer.o(causal_attention(q, k, v))
    x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
    if not isinstance(layer.ffn, MixtureOfExperts):
        return hidden + layer.ffn(x), k, v, None
    rows = x.flatten(0, -2)
    route = layer.ffn.route(rows)
    return hidden + layer.ffn.mix(rows, *route).view(x.shape), k, v, route


def travel(accelerator: Accelerator, decoder: Decoder, teacher: Teacher, condition: Tensor | None) -> Tensor:
    """The accelerated stream at every position, before the exit: ``[B, T, D]``."""
    state = accelerator.begin(teacher.embedded, condition)
    for index in range(accelerator.config.depth):
        q = accelerator.queries(decoder, index, state, teacher.cos, teacher.sin)
        attended = causal_attention(q, teacher.keys[index], teacher.values[index])
        state = accelerator.mix(decoder, index, state, attended, teacher.routes[index])
    return state


def accelerate(
    accelerator: Accelerator, decoder: Decoder, teacher: Teacher, condition: Tensor | None
) -> Tensor:
    """As :func:`travel`, through the exit: what stands in for the final state, ``[B, T, D]``."""
    state = travel(accelerator, decoder, teacher, condition)
    return accelerator.finish(decoder, state, condition)


def shift_right(states: Tensor) -> Tensor:
    """Each position's left neighbour; the first keeps its own zeros."""
    return F.pad(states, (0, 0, 1, 0))[:, :-1]


class Objective:
    """Distillation loss of an accelerator on batches of sequences, and its agreement with the model."""

    def __init__(self, decoder: Decoder, accelerator: Accelerator, config: TrainingConfig) -> None:
        self.decoder, self.accelerator, self.config = decoder, accelerator, config
        self._head = accelerator.draft_head(decoder)

    def accelerate(self, teacher: Teacher, condition: Tensor | None) -> Tensor:
        """Exit states at every position, ``[B, T, D]``; a variant of the stream overrides this."""
        return accelerate(self.accelerator, self.decoder, teacher, condition)

    def __call__(self, batch: Batch, num_passes: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss, and per pass the share of positions whose drafted argmax is the model's.

        Positions count from the prompt's last token to the continuation's last but one.
        """
        decoder, accelerator, config = self.decoder, self.accelerator, self.config
        device = decoder.device
        tokens = batch.sequences.tokens.long().to(device)
        counted = counted_positions(batch.sequences, device).flatten()
        teacher = run_teacher(decoder, tokens, accelerator.config.depth, batch.finals)
        final = teacher.final.flatten(0, 1)[counted]
        with torch.no_grad():
            full = decoder.weights.lm_head(final * decoder.weights.final_norm.to(final.dtype))
            logits = full[:, accelerator.draft_vocab.to(device)].float()
            target, hard = logits.softmax(-1), logits.argmax(-1)
            in_vocab = logits.amax(-1) == full.amax(-1).float()  # the model's choice can be drafted at all
        condition = shift_right(teacher.final) if accelerator.config.conditioned else None
        loss = torch.zeros((), device=device)
        agreements = []
        for ahead in range(num_passes or config.num_passes):
            exit_state = self.accelerate(teacher, condition)
            chosen = exit_state.flatten(0, 1)[counted]
            log_q = F.linear(chosen, self._head).float().log_softmax(-1)
            soft = -(target * log_q).sum(-1).mean()
            exact = F.nll_loss(log_q, hard)
            align = F.smooth_l1_loss(chosen.float(), final.float())
            weight = config.pass_decay**ahead
            loss = loss + weight * ((1 - config.hard) * soft + config.hard * exact + config.alignment * align)
            drafted = log_q.max(-1).indices  # argmax takes four times as long
            agreements.append(((drafted == hard) & in_vocab).float().mean().detach())
            if accelerator.config.conditioned:
                condition = shift_right(exit_state)
            else:
                break  # every pass would compute the same thing
        return loss, agreements


def counted_positions(batch: Sequences, device: torch.device) -> Tensor:
    """Positions whose next token the model wrote, bool ``[B, T]``."""
    position = torch.arange(batch.tokens.shape[1], device=device)
    first, last = batch.prompt_lengths.to(device)[:, None] - 1, batch.lengths.to(device)[:, None] - 1
    return (position >= first) & (position < last)


class BatchOrder:
    """Which sequences make up the batch of each step: those of similar length, shuffled anew each epoch.

    It depends on the lengths, the seed and the step alone, so that a run can go on anywhere.

    Args:
        lengths: int ``[n]``. kept: bool ``[n]``, whose final states are kept: a batch has either kind.
    """

    def __init__(self, lengths: Tensor, kept: Tensor, tokens_per_batch: int, seed: int) -> None:
        self._lengths, self._kept = lengths, kept
        self._tokens_per_batch, self._seed = tokens_per_batch, seed
        self._epoch, self._first, self._groups = -1, 0, list[Tensor]()

    def rows(self, step: int) -> Tensor:
        """Indices of the sequences of batch ``step``, counted from 0."""
        if step < self._first:
            self._epoch, self._first, self._groups = -1, 0, []
        while step >= self._first + len(self._groups):
            self._first += len(self._groups)
            self._epoch += 1
            self._groups = self._plan(self._epoch)
        return self._groups[step - self._first]

    def _plan(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        # Noise on the sort key mixes neighbours without mixing long with short.
        noisy = self._lengths.float() + 32 * torch.rand(len(self._lengths), generator=generator)
        groups = []
        for kind in (True, False):
            members = (self._kept == kind).nonzero()[:, 0]
            order, begin = members[noisy[members].argsort()], 0
            while begin < len(order):
                end, width = begin, 0
                while end < len(order):
                    width = max(width, padded(int(self._lengths[order[end]])))
                    if (end + 1 - begin) * width > self._tokens_per_batch and end > begin:
                        break
                    end += 1
                groups.append(order[begin:end])
                begin = end
        return [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]


def padded(length: int) -> int:
    """Sequences are padded to multiples of 64."""
    return -(-length // 64) * 64


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


_OWN = "accelerator."  # before the names of parameters in a checkpoint; it is older than other modules


class Trainer:
    """AdamW over a module's parameters; state can be saved and restored between any two steps.

    Args:
        average: called between the backward pass and the step, where several processes train together.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        total_steps: int,
        average: Callable[[list[torch.nn.Parameter]], None] | None = None,
    ) -> None:
        self._module, self._config, self._total, self.step = module, config, total_steps, 0
        self._average = average
        self._parameters = dict(module.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.learning_rate, betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )  # fmt: skip

    def descend(self, loss: Tensor) -> None:
        """One optimiser step down ``loss``."""
        factor = learning_rate_factor(self.step, self._total, self._config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._average is not None:
            self._average(list(self._parameters.values()))
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, but for the data: parameters and the optimiser's moments."""
        result = {_OWN + k: v for k, v in self._module.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key != "step":
                    result[f"{key}.{name}"] = value
        return result

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Continue after ``step`` steps from what :meth:`state` gave."""
        self._module.load_state_dict(
            {k.removeprefix(_OWN): v for k, v in state.items() if k.startswith(_OWN)}
        )
        self.step = step
        for name, parameter in self._parameters.items():
            if f"exp_avg.{name}" in state:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{key: state[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
                }


class ExitFit:
    """Closed-form exit map: ridge regression from the stream's state and condition to the final state.

    With zero adapters the stream's state is that of the plain layers; the regression already drafts,
    and training starts from there.

    Attributes:
        gram: float64 ``[W, W]``, cross: float64 ``[W, D]``: what the batches have added up to.
    """

    def __init__(self, accelerator: Accelerator, decoder: Decoder) -> None:
        self._accelerator, self._decoder = accelerator, decoder
        hidden, width = accelerator.exit.shape
        self.gram = torch.zeros(width, width, device=decoder.device, dtype=torch.float64)
        self.cross = torch.zeros(width, hidden, device=decoder.device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Count one batch."""
        accelerator, decoder = self._accelerator, self._decoder
        tokens = batch.sequences.tokens.long().to(decoder.device)
        counted = counted_positions(batch.sequences, decoder.device)
        teacher = run_teacher(decoder, tokens, accelerator.config.depth, batch.finals)
        condition = shift_right(teacher.final) if accelerator.config.conditioned else None
        state = travel(accelerator, decoder, teacher, condition)
        if condition is not None:
            state = torch.cat((state, condition), dim=-1)
        x = state[counted].double()
        self.gram += x.T @ x
        self.cross += x.T @ teacher.final[counted].double()

    @torch.no_grad()
    def solve(self, ridge: float = 1e-5) -> None:
        """Put the solution into the accelerator."""
        damping = ridge * self.gram.diagonal().mean() * torch.eye(len(self.gram)).to(self.gram)
        self._accelerator.exit.copy_(torch.linalg.solve(self.gram + damping, self.cross).T.float())


class Evaluation:
    """Greedy agreement with the model at each draft position, over the batches counted so far.

    Attributes:
        totals: float64 ``[num_passes + 1]``: agreeing tokens by draft position, then the tokens seen.
    """

    def __init__(self, objective: Objective, num_passes: int = 6) -> None:
        self._objective, self._num_passes = objective, num_passes
        self.totals = torch.zeros(num_passes + 1, dtype=torch.float64)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Count one batch."""
        new = batch.sequences.num_new_tokens
        if new:
            _, agreements = self._objective(batch, self._num_passes)
            # a stream without condition drafts alike at every position, and is run once
            agreements += agreements[-1:] * (self._num_passes - len(agreements))
            self.totals += new * torch.tensor([*map(float, agreements), 1.0], dtype=torch.float64)

    @property
    def agreements(self) -> list[float]:
        """Share of held-out positions whose draft is the model's choice, by draft position."""
        return [round(float(total / self.totals[-1].clamp(min=1)), 4) for total in self.totals[:-1]]


def evaluate(objective: Objective, batches: Iterable[Batch], num_passes: int = 6) -> list[float]:
    """Greedy agreement with the model at each draft position, over all batches."""
    evaluation = Evaluation(objective, num_passes)
    for batch in batches:
        evaluation.add(batch)
    return evaluation.agreements
