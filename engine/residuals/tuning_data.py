"""What an accelerator is trained on: the model's own text, and its final states, shard by shard on disk.

A shard depends on the prompts, the settings and its number alone. So a stopped run goes on with the next
shard, and a request for more text goes on from what is there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InvalidRequestError
from engine.evaluation.suites import PROMPTS_FOLDER, load_prompts
from engine.models.decoder import Decoder
from engine.requests import Message
from engine.residuals.adapter_file import fingerprint
from engine.residuals.corpus import Sequences, generate_continuations
from engine.residuals.invention import MAX_TOKENS, TEMPERATURE, Frame, as_prompts, chat_frame
from engine.residuals.stages import CACHE, GENERATE, INVENT, Meter, Runner
from engine.residuals.training import run_teacher
from engine.residuals.tuning_store import (
    Corpus,
    Store,
    TuningError,
    TuningStoppedError,
    cut,
    in_groups,
    invented_name,
    load_sequences,
    save_sequences,
    states_name,
    text_name,
)
from engine.tokenizer import Tokenizer

TRAINING_PROMPTS = PROMPTS_FOLDER / "train.jsonl"
HELD_OUT = "held-out"
STATE_BYTES = 2  # bfloat16
# Work of one shard on a CPU: 20 s at 60 GFLOP/s, so that a killed run loses less than a minute even on a
# machine of a third of that speed; so many times that in bf16, which is for machines that are faster with it.
_SHARD_FLOPS = 1.2e12
_BF16_FACTOR = 4
# Of a GPU's memory for the keys and values of one shard: many rows at once, as their weights are read once for all.
_CUDA_SHARE, _MAX_CUDA_ROWS = 0.3, 2048
_FRUITLESS_SHARDS = 8  # a model that has ended no new prompt in as many hardly will


@dataclass(frozen=True)
class DataConfig:
    """Which text the model writes.

    Attributes:
        num_tokens: how many tokens it writes, prompts not counted; the last shard may bring a few more.
        max_new_tokens, max_prompt_tokens: longer answers are cut, longer prompts left out.
        num_held_out: prompts on which the accelerator is measured and never trained.
        num_invented: prompts that the model makes up itself, beside the others; a few more or fewer.
        temperature: of the sampled half; the other half is greedy.
    """

    num_tokens: int = 300_000
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    num_held_out: int = 64
    temperature: float = 0.8
    seed: int = 0
    num_invented: int = 0


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts, shuffled; those held out apart; and how others are made.

    Attributes:
        special: ids that stand in no prompt's own text.
    """

    training: list[list[int]]
    held_out: list[list[int]]
    frame: Frame
    special: frozenset[int]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.training, self.held_out)).encode()).hexdigest()[:16]


def encode_prompts(path: Path | None, tokenizer: Tokenizer, decoder: Decoder, config: DataConfig) -> Prompts:
    """The prompts of a file (None: those shipped for training), as the chat would send them.

    Raises:
        InvalidRequestError: the file is missing or has a broken line, or too few prompts are short enough.
    """
    prompts = load_prompts(path or TRAINING_PROMPTS)
    limit = _prompt_limit(decoder, config)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed))
    encoded = [
        ids
        for index in order.tolist()
        if len(ids := tokenizer.encode_chat([Message("user", prompts[index].turns[0])])) <= limit
    ]
    if len(encoded) < 2:
        raise InvalidRequestError(
            f"Fewer than two prompts are at most {limit} tokens long; tuning needs some to train on and some to "
            "measure with."
        )
    held_out = min(config.num_held_out, max(1, len(encoded) // 8))
    return Prompts(
        encoded[held_out:], encoded[:held_out], chat_frame(tokenizer), frozenset(tokenizer.special_ids)
    )


def context_limit(decoder: Decoder) -> int:
    """Longest sequence to train on: attention there is full, so it has to fit every window."""
    windows = [window for window in decoder.config.sliding_windows if window]
    return min(decoder.config.context_length, *windows) if windows else decoder.config.context_length


def _prompt_limit(decoder: Decoder, config: DataConfig) -> int:
    return min(config.max_prompt_tokens, context_limit(decoder) // 2)


class DataStages:
    """Text, then final states, for one model.

    Args:
        store: of everything that depends on the model, the prompts and ``config`` but for ``num_tokens``.
    """

    def __init__(
        self, decoder: Decoder, eos_ids: list[int], prompts: Prompts, config: DataConfig, store: Store, runner: Runner
    ) -> None:  # fmt: skip
        self._decoder, self._eos_ids, self._prompts = decoder, eos_ids, prompts
        self._config, self._store, self._runner = config, store, runner
        self._training = prompts.training  # and those invented, once they are there
        self._max_new = min(config.max_new_tokens, context_limit(decoder) // 2 - 16)
        if decoder.device.type == "cpu":
            per_row = 2 * num_weights(decoder) * self._max_new
            flops = _SHARD_FLOPS * (_BF16_FACTOR if decoder.dtype == torch.bfloat16 else 1)
            self._rows = max(4, min(64, int(flops / per_row)))
        else:
            model = decoder.config
            per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * decoder.dtype.itemsize
            memory = torch.cuda.get_device_properties(decoder.device).total_memory * _CUDA_SHARE
            fitting = int(memory / (per_token * (config.max_prompt_tokens + self._max_new)))
            self._rows = max(16, min(_MAX_CUDA_ROWS, fitting))
        # Made here, outside of inference mode: training differentiates through what depends on it.
        decoder.rope.ensure(context_limit(decoder))

    def generate(self) -> tuple[list[Sequences], Sequences]:
        """The training shards and the held-out text, written as far as they are not there."""
        workers, config = self._runner.workers, self._config
        if config.num_invented:
            more = [*self._prompts.training, *self._invent()]
            order = torch.randperm(len(more), generator=torch.Generator().manual_seed(config.seed))
            self._training = [more[index] for index in order.tolist()]
        shards, meter = list[Sequences](), None
        while (done := sum(shard.num_new_tokens for shard in shards)) < config.num_tokens:
            mine = len(shards) + workers.rank
            if load_sequences(self._store, text_name(mine)) is None:
                meter = meter or self._runner.meter(GENERATE, done, config.num_tokens)
                seed = config.seed * 1_000_003 + mine
                self._write(text_name(mine), *self._shard(mine), seed, self._max_new, meter, done)
            self._check()
            for index in range(len(shards), len(shards) + workers.count):
                shards.append(self._read(text_name(index)))
            if meter is not None:
                meter.report(sum(shard.num_new_tokens for shard in shards))
        return shards, self._held_out()

    def _invent(self) -> list[list[int]]:
        """Prompts of the model's own, as many as were asked for. Shards go on until there are enough: how many of their
        rows are of use shows when they are written."""
        workers, prompts, frame = self._runner.workers, self._prompts, self._prompts.frame
        room = _prompt_limit(self._decoder, self._config) - len(frame.before) - len(frame.behind)
        found, number, fruitless, meter = dict[tuple[int, ...], None](), 0, 0, None  # each prompt once
        while len(found) < self._config.num_invented:
            mine = invented_name(number + workers.rank)
            if load_sequences(self._store, mine) is None:
                meter = meter or self._runner.meter(INVENT, len(found), self._config.num_invented)
                rows, heat = [list(frame.before)] * self._rows, [TEMPERATURE] * self._rows
                seed = -1 - self._config.seed * 1_000_003 - number - workers.rank  # none of an answer's
                self._write(mine, rows, heat, seed, max(1, min(MAX_TOKENS, room)))
            self._check()
            before = len(found)
            for index in range(number, number + workers.count):
                written = self._read(invented_name(index))
                found |= dict.fromkeys(as_prompts(written, frame, self._eos_ids, prompts.special))
            number += workers.count
            fruitless = 0 if len(found) > before else fruitless + workers.count
            if fruitless >= _FRUITLESS_SHARDS:
                raise TuningError(
                    f"The model makes up {len(found)} prompts and no more: it is no chat model, or not with this "
                    "template. Ask for fewer, or tune without invented prompts."
                )
            if meter is not None:
                meter.report(len(found))
        return [list(ids) for ids in found]

    def _held_out(self) -> Sequences:
        parts, prompts = list[Sequences](), self._prompts.held_out
        for begin in range(0, len(prompts), self._rows):
            name, chosen = f"{HELD_OUT}-{begin:05d}", prompts[begin : begin + self._rows]
            if self._runner.workers.is_first and load_sequences(self._store, name) is None:
                heat = [0.0] * len(chosen)  # greedy: nothing is drawn
                self._write(name, chosen, heat, 0, self._max_new)
            self._check()
            parts.append(self._read(name))
        return Sequences.join(parts)

    def _read(self, name: str) -> Sequences:
        sequences = load_sequences(self._store, name)
        if sequences is None:
            raise TuningError(f"{name} could not be read back; start the tuning again.")
        return sequences

    def keep_states(self, shards: list[Sequences], disk_budget: int) -> Corpus:
        """The text with the final states of as many of its first shards as ``disk_budget`` bytes hold.

        Raises:
            TuningError: the disk is full before the budget is.
        """
        size, num_kept = 0, 0
        for shard in shards:
            size += int(shard.lengths.sum()) * self._decoder.config.hidden_size * STATE_BYTES
            num_kept += size <= disk_budget
        missing = [i for i in range(num_kept) if not self._store.path(states_name(i)).is_file()]
        workers, done = self._runner.workers, num_kept - len(missing)
        meter = self._runner.meter(CACHE, done, num_kept)
        for begin in range(0, len(missing), workers.count):
            for index in missing[begin : begin + workers.count][workers.rank : workers.rank + 1]:
                self._store.save(states_name(index), {"states": self._final_states(shards[index])})
            self._check()
            done = min(done + workers.count, num_kept)
            meter.report(done)
        return Corpus(self._store, shards, num_kept)

    def _shard(self, index: int) -> tuple[list[list[int]], list[float]]:
        """Prompts and temperatures of a shard. Every second prompt is answered greedily in the first round
        through the prompts, the others in the second; all other answers are sampled."""
        training, rows, heat = self._training, list[list[int]](), list[float]()
        for number in range(index * self._rows, (index + 1) * self._rows):
            round_, place = divmod(number, len(training))
            rows.append(training[place])
            heat.append(0.0 if round_ < 2 and place % 2 == round_ else self._config.temperature)
        return rows, heat

    def _write(
        self, name: str, prompts: list[list[int]], temperatures: list[float], seed: int, max_new_tokens: int,
        meter: Meter | None = None, done: int = 0,
    ) -> None:  # fmt: skip
        def on_step(step: int) -> bool:
            if meter is not None:  # a guess until the lengths are known: half of the answers have ended
                meter.report(done + step * len(prompts) // 2)
            return self._runner.stopped()

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            text = generate_continuations(
                self._decoder, prompts, temperatures, max_new_tokens, self._eos_ids, on_step
            )
        if not self._runner.stopped():  # what was stopped in the middle is not whole
            save_sequences(self._store, name, text)

    @torch.no_grad()
    def _final_states(self, shard: Sequences) -> Tensor:
        """bfloat16 ``[all lengths, D]``, in the order of the shard."""
        states: list[Tensor] = [torch.empty(0)] * len(shard.lengths)
        tokens_per_batch = 4096 if self._decoder.device.type == "cpu" else 65536
        for rows in in_groups(shard, tokens_per_batch):
            tokens = cut(shard, rows).tokens.long().to(self._decoder.device)
            final = run_teacher(self._decoder, tokens, 0).final.bfloat16().cpu()
            for row, state in zip(rows.tolist(), final, strict=True):
                states[row] = state[: int(shard.lengths[row])].clone()
        return torch.cat(states)

    def _check(self) -> None:
        """Wait for the others, and stop together."""
        self._runner.workers.wait()
        if self._runner.workers.any(self._runner.stopped()):
            raise TuningStoppedError


def data_name(decoder: Decoder, model_file: str, prompts: Prompts, config: DataConfig) -> str:
    """Folder name of the text: whatever its shards depend on, and not how many there are."""
    settings = (
        fingerprint(decoder), model_file, str(decoder.dtype), decoder.device.type, prompts.digest,
        config.max_new_tokens, config.temperature, config.seed, *([config.num_invented] if config.num_invented else ()),
    )  # fmt: skip
    return "data-" + hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def num_weights(decoder: Decoder) -> int:
    """Weights that one token passes through."""
    matrices = [m for layer in decoder.layers for m in layer.matrices()]
    return sum(m.in_features * m.out_features for m in (*matrices, decoder.weights.lm_head))


def most_frequent(sequences: Sequences, size: int, vocab_size: int) -> Tensor:
    """The ``size`` tokens that the model wrote most often, the most frequent first: ``int64 [size]``. Ties go to low ids,
    which are the earlier merges of most tokenizers."""
    positions = torch.arange(sequences.tokens.shape[1])
    written = (positions >= sequences.prompt_lengths[:, None]) & (positions < sequences.lengths[:, None])
    counts = torch.bincount(sequences.tokens[written].long(), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size]
