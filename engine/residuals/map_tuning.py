"""Fitting router maps of a model that is too large to train on: quantized, its experts read from the disk, as in a chat.

All that the maps take can be seen while the model answers prompts (:attr:`engine.models.decoder.Decoder.watch`): the
states of every layer. They are kept on the disk, and the maps fitted from there, layer after layer, so that memory holds
one layer's states and products at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import InvalidRequestError
from engine.models.decoder import Decoder
from engine.requests import GenerationRequest, SamplingParams
from engine.residuals.adapter_file import fingerprint, tuned_dir
from engine.residuals.expert_files import FOLDER, save_maps
from engine.residuals.router_maps import RouterFit, RouterMaps, router_logits
from engine.residuals.stages import EVALUATE, GENERATE, INITIALISE, Runner
from engine.residuals.tuning import TuneRequest
from engine.residuals.tuning_data import STATE_BYTES, Prompts, encode_prompts
from engine.residuals.tuning_store import Store, TuningError, TuningStoppedError, states_name
from engine.session import Session

FIT_MAPS = replace(INITIALISE, label="Fitting the maps", unit="layers")
AGAIN, REPEATED = "next_token", "last_token"
_HELD_OUT = 8  # one in so many answers is measured with
_LENGTHS = "lengths"  # of an answer: the prompt's, and that of what was written


def tune_maps(request: TuneRequest, work_dir: Path, runner: Runner) -> Path:
    """Fit the maps, or go on with them; returns their ``.safetensors`` file.

    Raises: as :func:`engine.residuals.tuning.tune`.
    """
    session = Session.load(
        request.source, device="cpu", threads=request.threads, on_progress=runner.on_progress,
        cancel=runner.cancel, memory=request.memory,
    )  # fmt: skip
    try:
        decoder, began = session.backend.decoder, time.monotonic()  # type: ignore[attr-defined]
        prompts = encode_prompts(request.prompts, session.tokenizer, decoder, request.data)
        settings = (
            fingerprint(decoder), session.info.name, session.info.weight_format, prompts.digest,
            request.data.max_new_tokens, request.data.temperature, request.data.seed,
        )  # fmt: skip
        store = Store(work_dir / f"maps-{_digest(settings)}")
        answers = _Answers(session, decoder, prompts, request, store, runner)
        training, held_out = answers.write()
        maps = RouterMaps(decoder.config)
        with torch.inference_mode():
            _fit(maps, decoder, training, store, runner)
            measured = _measure(maps, decoder, held_out, store, runner)
        path = (
            request.out or tuned_dir() / FOLDER / f"{Path(session.info.name).stem.lower()}-maps.safetensors"
        )
        about = {
            "tokens_written": sum(answer.num_new for answer in training),
            "seconds": round(time.monotonic() - began, 1), "settings": asdict(request.data),
        }  # fmt: skip
        save_maps(path, maps, decoder, session.info.name, about, measured)
        store.remove("*")  # it is large
        return path
    finally:
        session.close()


@dataclass(frozen=True)
class _Answer:
    """One prompt and its answer, on the disk.

    Attributes:
        num_prompt, num_new: tokens.
    """

    store: Store
    name: str
    num_prompt: int
    num_new: int

    @staticmethod
    def find(store: Store, name: str) -> _Answer | None:
        """What an earlier run has written."""
        found = store.load(name, (_LENGTHS,))
        return None if found is None else _Answer(store, name, *found[0][_LENGTHS].tolist())

    def states(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Of these layers, ``[1, T, D]`` each; the last token written is not among the T.

        Raises:
            TuningError: the file is not whole.
        """
        found = self.store.load(self.name, map(str, layers))
        if found is None:
            self.store.remove(self.name)
            raise TuningError(
                f"{self.name} could not be read back; start the tuning again, it is written anew."
            )
        return {layer: found[0][str(layer)][None] for layer in layers}


class _Answers:
    """Has the model answer prompts, and keeps the states."""

    def __init__(
        self, session: Session, decoder: Decoder, prompts: Prompts, request: TuneRequest, store: Store, runner: Runner
    ) -> None:  # fmt: skip
        self._session, self._decoder, self._prompts = session, decoder, prompts
        self._request, self._store, self._runner = request, store, runner
        sparse = [layer for layer in range(decoder.config.num_layers) if decoder.config.is_sparse(layer)]
        self._layers = sorted({layer - back for layer in sparse for back in (0, 1) if layer >= back})

    def write(self) -> tuple[list[_Answer], list[_Answer]]:
        """As many tokens as the request and its disk budget say, those to measure with apart."""
        config = self._request.data
        token_bytes = len(self._layers) * self._decoder.config.hidden_size * STATE_BYTES
        room = self._request.disk_budget // token_bytes
        answers, written, size = list[_Answer](), 0, 0
        meter = self._runner.meter(GENERATE, 0, min(config.num_tokens, room))
        while len(answers) < 2 or (written < config.num_tokens and size < room):
            number = len(answers)
            name = states_name(number)
            answer = _Answer.find(self._store, name) or self._answer(number, name)
            answers.append(answer)
            written += answer.num_new
            size += answer.num_prompt + answer.num_new
            meter.report(min(written, size if room < config.num_tokens else written))
        held_out = answers[::_HELD_OUT]
        return [answer for answer in answers if answer not in held_out], held_out

    def _answer(self, number: int, name: str) -> _Answer:
        config, prompts = self._request.data, self._prompts.training
        prompt = prompts[number % len(prompts)]
        request = GenerationRequest(
            prompt_ids=prompt,
            # Half of the answers are greedy, as in other tuning, and those that are measured with.
            sampling=SamplingParams(
                temperature=0.0 if number % 2 == 0 else config.temperature, seed=config.seed * 1_000_003 + number
            ),
            max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        with self._recording() as seen:
            generation = self._session.stream_generate(request, reuse_prefix=False)
            for _ in generation:
                if self._runner.stopped():
                    generation.close()
                    raise TuningStoppedError
        states = {str(layer): torch.cat(seen[layer]) for layer in self._layers}
        answer = _Answer(self._store, name, len(prompt), generation.metrics.num_new_tokens)
        lengths = torch.tensor([answer.num_prompt, answer.num_new])
        self._store.save(name, {**states, _LENGTHS: lengths})
        return answer

    @contextmanager
    def _recording(self) -> Iterator[dict[int, list[Tensor]]]:
        """Yields what passes by, by layer, ``[T, D]`` bfloat16."""
        seen, others = defaultdict[int, list[Tensor]](list), self._decoder.watch

        def watch(layer: int, hidden: Tensor) -> None:
            seen[layer].append(hidden.flatten(0, -2).to(torch.bfloat16, copy=True))
            if others is not None:
                others(layer, hidden)

        self._decoder.watch = watch
        try:
            yield seen
        finally:
            self._decoder.watch = others


def _fit(
    maps: RouterMaps, decoder: Decoder, answers: Sequence[_Answer], store: Store, runner: Runner
) -> None:
    def step(number: int) -> str:
        layer = maps.sparse[number]
        fit = RouterFit(maps, [layer])
        for answer in answers:
            states = answer.states(fit.sources)
            lengths = torch.tensor([states[layer].shape[1]])
            fit.add(states, {layer: router_logits(decoder, layer, states[layer].float())}, lengths)
        fit.solve()
        return ""

    def restore(saved: dict[str, Tensor], done: int) -> None:
        maps.load_state_dict(saved)

    runner.run(
        FIT_MAPS, store, "router-maps", len(maps.sparse), step, lambda: dict(maps.state_dict()), restore
    )


def _measure(
    maps: RouterMaps, decoder: Decoder, answers: Sequence[_Answer], store: Store, runner: Runner
) -> dict[str, Any]:
    """Recall of the experts that the routers choose, of the maps and of what they replace."""
    assert decoder.config.experts is not None
    k, names = decoder.config.experts.num_experts_per_tok, ("next_gate 1", "ridge_gate 1", REPEATED, AGAIN)
    hits, chosen = torch.zeros(len(names)), torch.zeros(len(names))

    def step(number: int) -> str:
        layer = maps.sparse[number]
        sources = [source for source in (layer - 1, layer) if source >= 0]
        for answer in answers:
            states = {source: state[0].float() for source, state in answer.states(sources).items()}
            own, again = (
                router_logits(decoder, layer, states[layer]),
                maps.inputs(states[layer]) @ maps.again[number].T,
            )
            found = [None, None, own.roll(1, dims=0), again.roll(1, dims=0)]
            if layer:
                before = states[layer - 1]
                found[:2] = router_logits(decoder, layer, before), maps.inputs(before) @ maps.ahead[number].T
            written = slice(answer.num_prompt, None)
            wanted = own[written].topk(k, dim=-1).indices
            for place, logits in enumerate(found):
                if logits is not None:
                    named = logits[written].topk(k, dim=-1).indices
                    hits[place] += (wanted[:, :, None] == named[:, None]).sum()
                    chosen[place] += wanted.numel()
        return ""

    def restore(saved: dict[str, Tensor], done: int) -> None:
        hits.copy_(saved["hits"])
        chosen.copy_(saved["chosen"])

    runner.run(
        replace(EVALUATE, unit="layers"), store, "measured", len(maps.sparse), step,
        lambda: {"hits": hits, "chosen": chosen}, restore,
    )  # fmt: skip
    if not chosen.all():
        raise InvalidRequestError("The model ended its answers at once; give other prompts with --prompts.")
    return {
        "recall_by_lookahead": dict(zip(names, (hits / chosen).tolist(), strict=True)),
        "note": f"Share of the {k} experts chosen that are among the {k} named, on held-out text. {AGAIN}: named by the "
        f"maps while the last token is in the layer; {REPEATED}: those that the last token was given.",
    }


def _digest(settings: object) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
