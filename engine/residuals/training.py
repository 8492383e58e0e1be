"""Training an accelerator by self-distillation, the base model frozen.

One batch: run the base model over whole sequences, keeping keys, values and final states; then run the
accelerated stream for every position at once. Drafting several tokens ahead is unrolled: in pass ``j``
each position's condition is the exit state that pass ``j - 1`` gave its left neighbour, exactly as in
decoding (the unrolling follows EAGLE-3's training-time test, arXiv 2503.01840; applying it here is
our choice).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.decoder import Decoder, rms_norm
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
class Teacher:
    """What the base model gives for one batch: everything the accelerated stream learns from."""

    embedded: Tensor  # [B, T, D]
    keys: list[Tensor]  # of the first layers, [B, T, Hkv, hd], rotated
    values: list[Tensor]
    final: Tensor  # final state of unit RMS, [B, T, D]
    cos: Tensor
    sin: Tensor


@torch.no_grad()
def run_teacher(decoder: Decoder, tokens: Tensor, depth: int) -> Teacher:
    """The base model over ``tokens [B, T]``; K/V of the first ``depth`` layers are kept."""
    config = decoder.config
    decoder.rope.ensure(tokens.shape[1])
    cos, sin = decoder.rope.rows(torch.arange(tokens.shape[1], device=tokens.device)[None])
    embedded = hidden = decoder.embed(tokens)
    keys, values = [], []
    for index in range(config.num_layers):
        hidden, k, v = _slow_layer(decoder, index, hidden, cos, sin)
        if index < depth:
            keys.append(k)
            values.append(v)
    return Teacher(embedded, keys, values, unit_rms(hidden, config.norm_eps), cos, sin)


def _slow_layer(
    decoder: Decoder, index: int, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    config, layer = decoder.config, decoder.layers[index]
    x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
    q, k, v = decoder.project_qkv(index, x, cos, sin)
    hidden = hidden + layer.o(causal_attention(q, k, v))
    x = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
    return hidden + decoder.mlp(index, x), k, v


def travel(accelerator: Accelerator, decoder: Decoder, teacher: Teacher, condition: Tensor | None) -> Tensor:
    """The accelerated stream at every position, before the exit: ``[B, T, D]``."""
    state = accelerator.begin(teacher.embedded, condition)
    for index in range(accelerator.config.depth):
        q = accelerator.queries(decoder, index, state, teacher.cos, teacher.sin)
        attended = causal_attention(q, teacher.keys[index], teacher.values[index])
        state = accelerator.mix(decoder, index, state, attended)
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

    def __call__(self, batch: Sequences, num_passes: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss, and per pass the share of positions whose drafted argmax is the model's.

        Positions count from the prompt's last token to the continuation's last but one.
        """
        decoder, accelerator, config = self.decoder, self.accelerator, self.config
        device = decoder.device
        tokens = batch.tokens.long().to(device)
        counted = _counted(batch, device).flatten()
        teacher = run_teacher(decoder, tokens, accelerator.config.depth)
        final = teacher.final.flatten(0, 1)[counted]
        with torch.no_grad():
            full = decoder.weights.lm_head(final * decoder.weights.final_norm.to(final.dtype))
            top = full.argmax(-1)
            target = full[:, accelerator.draft_vocab.to(device)].float().softmax(-1)
            hard = target.argmax(-1)
            in_vocab = accelerator.draft_vocab.to(device)[hard] == top
        condition = shift_right(teacher.final) if accelerator.config.conditioned else None
        loss = torch.zeros((), device=device)
        agreements = []
        for ahead in range(num_passes or config.num_passes):
            exit_state = accelerate(accelerator, decoder, teacher, condition)
            chosen = exit_state.flatten(0, 1)[counted]
            log_q = F.linear(chosen, self._head).float().log_softmax(-1)
            soft = -(target * log_q).sum(-1).mean()
            exact = F.nll_loss(log_q, hard)
            align = F.smooth_l1_loss(chosen.float(), final.float())
            weight = config.pass_decay**ahead
            loss = loss + weight * ((1 - config.hard) * soft + config.hard * exact + config.alignment * align)
            agreements.append(((log_q.argmax(-1) == hard) & in_vocab).float().mean().detach())
            if accelerator.config.conditioned:
                condition = shift_right(exit_state)
            else:
                break  # every pass would compute the same thing
        return loss, agreements


def _counted(batch: Sequences, device: torch.device) -> Tensor:
    """Positions whose next token the model wrote, bool ``[B, T]``."""
    position = torch.arange(batch.tokens.shape[1], device=device)
    first, last = batch.prompt_lengths.to(device)[:, None] - 1, batch.lengths.to(device)[:, None] - 1
    return (position >= first) & (position < last)


def batches(data: Sequences, tokens_per_batch: int, seed: int) -> Iterator[Sequences]:
    """Endless batches of sequences of similar length, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        # Noise on the sort key mixes neighbours without mixing long with short.
        noisy = data.lengths.float() + 32 * torch.rand(len(data.lengths), generator=generator)
        order = noisy.argsort()
        groups, begin = [], 0
        while begin < len(order):
            end, width = begin, 0
            while end < len(order):
                width = max(width, _padded(int(data.lengths[order[end]])))
                if (end + 1 - begin) * width > tokens_per_batch and end > begin:
                    break
                end += 1
            groups.append(order[begin:end])
            begin = end
        for group in torch.randperm(len(groups), generator=generator).tolist():
            part = data.select(groups[group])
            yield Sequences(
                part.tokens[:, : _padded(int(part.lengths.max()))], part.prompt_lengths, part.lengths
            )


def _padded(length: int) -> int:
    return -(-length // 64) * 64


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


class Trainer:
    """AdamW over an accelerator's parameters; state can be saved and restored between any two steps."""

    def __init__(self, objective: Objective, total_steps: int) -> None:
        self.objective, self.total_steps, self.step = objective, total_steps, 0
        config = objective.config
        self.optimizer = torch.optim.AdamW(
            objective.accelerator.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )  # fmt: skip

    def train_on(self, batch: Sequences) -> tuple[float | Tensor, list[Tensor]]:
        """One optimiser step."""
        config = self.objective.config
        factor = learning_rate_factor(self.step, self.total_steps, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        loss, agreements = self.objective(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.accelerator.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach(), agreements


@torch.no_grad()
def fit_exit(objective: Objective, data: Iterator[Sequences], num_batches: int, ridge: float = 1e-5) -> None:
    """Closed-form exit map: ridge regression from the stream's state and condition to the final state.

    With zero adapters the stream's state is that of the plain layers; the regression already drafts,
    and training starts from there.
    """
    accelerator, decoder = objective.accelerator, objective.decoder
    width = accelerator.exit.shape[1]
    gram = torch.zeros(width, width, device=decoder.device, dtype=torch.float64)
    cross = torch.zeros(width, accelerator.exit.shape[0], device=decoder.device, dtype=torch.float64)
    for _ in range(num_batches):
        batch = next(data)
        tokens = batch.tokens.long().to(decoder.device)
        teacher = run_teacher(decoder, tokens, accelerator.config.depth)
        condition = shift_right(teacher.final) if accelerator.config.conditioned else None
        state = travel(accelerator, decoder, teacher, condition)
        if condition is not None:
            state = torch.cat((state, condition), dim=-1)
        x = state[_counted(batch, decoder.device)].double()
        gram += x.T @ x
        cross += x.T @ teacher.final[_counted(batch, decoder.device)].double()
    scale = gram.diagonal().mean()
    solved = torch.linalg.solve(
        gram + ridge * scale * torch.eye(width, device=gram.device, dtype=gram.dtype), cross
    )
    accelerator.exit.copy_(solved.T.float())


@torch.no_grad()
def evaluate(objective: Objective, data: Sequences, num_passes: int = 6) -> list[float]:
    """Greedy agreement with the model at each draft position, over all of ``data``."""
    totals, count = [0.0] * num_passes, 0
    for begin in range(0, len(data.lengths), 32):
        part = data.select(torch.arange(begin, min(begin + 32, len(data.lengths))))
        new = part.num_new_tokens
        if not new:
            continue
        width = _padded(int(part.lengths.max()))
        _, agreements = objective(
            Sequences(part.tokens[:, :width], part.prompt_lengths, part.lengths), num_passes
        )
        for ahead in range(num_passes):
            totals[ahead] += float(agreements[min(ahead, len(agreements) - 1)]) * new
        count += new
    return [total / max(count, 1) for total in totals]
