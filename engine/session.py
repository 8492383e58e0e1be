"""One loaded model: what the app, the command line and the benchmarks talk to."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from engine.context import check_length, fit_messages
from engine.decoding.base import Backend, TokenSequence
from engine.decoding.sampling import Sampler
from engine.errors import InvalidRequestError, SlipstreamError
from engine.generation import ENGINE_LOCK, Generation
from engine.prefix import KeptCache, PrefixCaches, settle
from engine.requests import GenerationRequest, Message, SamplingParams
from engine.text_stream import TextStream
from engine.threads import use_threads
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from engine.decoding.controller import SpeculationState
    from engine.experts.report import ExpertReport
    from engine.hub import ResolvedModel
    from engine.progress import Progress

log = logging.getLogger(__name__)

Trainable: TypeAlias = Literal["drafts", "experts"]

_SETTLE_PAUSE = 0.05  # seconds between two looks at a busy engine
_ANSWER_HEADROOM = 512  # cache slots allocated ahead for an answer; more come by doubling


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded, for people to read."""

    name: str
    architecture: str
    num_parameters: int
    weight_format: str
    device: str
    context_length: int
    weight_bytes: int  # bytes of weights that one decoding step reads
    kernel: str  # "fused", "torch" or "transformers"
    methods: tuple[str, ...]
    notes: tuple[str, ...] = ()
    recommended: SamplingParams | None = None  # by the model's authors


class Session:
    """A model in memory, with its tokenizer and the key/value caches of recent chats.

    Build one with :meth:`load`; the constructor takes the loaded parts (tests, tools).

    Attributes:
        info: what is loaded.
        tokenizer: text <-> ids.
        backend: the model at the token level.
        settling: the thread that reads the last answer ahead of the next turn, if any.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, info: ModelInfo, num_threads: int | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.info = info
        self.num_threads = num_threads
        self._caches = PrefixCaches()
        self._closed = threading.Event()
        self._running: weakref.WeakSet[Generation] = weakref.WeakSet()
        self.settling: threading.Thread | None = None

    @classmethod
    def load(
        cls,
        source: str,
        weight_format: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: threading.Event | None = None,
        memory: int | None = None,
    ) -> Session:
        """Fetch the model if need be, and load it.

        Args:
            source: a hub repository, a folder or a ``.gguf`` file.
            weight_format: a name of ``WEIGHT_FORMATS``, or ``auto`` for the fastest that fits.
            device: ``cpu``, ``cuda``, ``cuda:1`` ..., or ``auto``.
            threads: CPU threads; None for torch's choice.
            cancel: set it to stop a download, or the first preparation of a model's experts.
            memory: bytes that the process may take with a mixture-of-experts model, whose experts are read from
                disk as far as they do not fit; None: what is free.

        Raises:
            DownloadError, ModelFileError, UnsupportedModelError, OutOfMemoryError, ExpertStoreError.
        """
        from engine.hub import resolve
        from engine.loading import load_session

        if threads is not None and threads < 1:
            raise InvalidRequestError(f"The number of threads must be at least 1, not {threads}.")
        model: ResolvedModel = resolve(source, on_progress, cancel)
        return load_session(
            model.name, Path(model.path), weight_format, device, threads, on_progress, memory, cancel
        )

    def methods(self) -> tuple[str, ...]:
        """Decoding methods that this model can use; the first is the default."""
        return self.backend.methods()

    def speculation(self) -> SpeculationState | None:
        """What the depth controller has measured and decided; None where nothing drafts."""
        for name in ("m2r2", "lookup"):  # a backend of another kind has neither
            if (shared := getattr(self.backend, name, None)) is not None:
                state: SpeculationState = shared.state()
                return state
        return None

    def experts(self) -> ExpertReport | None:
        """What of the model's experts is in memory and how that fares; None where all of them always are."""
        tiers = getattr(self.backend, "tiers", None)  # a backend of another kind has none
        return None if tiers is None else tiers.report()

    def trainable(self) -> Trainable | None:
        """What training on this machine would bring to this model that it has not; None: nothing that we can train."""
        if self.info.kernel == "transformers":
            return None
        if (experts := self.experts()) is not None:
            return None if experts.has_maps else "experts"
        return None if "m2r2" in self.methods() else "drafts"

    def top2_gap(self, ids: Sequence[int]) -> float:
        """How close a call the token after ``ids`` is: the best logit less the second, computed by the
        model's plain step. Where two lanes differ, a gap near zero says that rounding decided.

        Raises:
            InvalidRequestError: ``ids`` is empty or longer than the context.
        """
        ids = self._checked_ids(ids)
        if not ids:
            raise InvalidRequestError("Give at least one token.")
        check_length(len(ids), self.backend.context_length)
        cache: Any = self.backend.new_cache(len(ids))
        sampler = _Listener()
        sequence = TokenSequence(ids, cache, sampler, len(ids))
        for begin in range(0, len(ids) - 1, self.backend.prefill_chunk):
            chunk = ids[begin : min(begin + self.backend.prefill_chunk, len(ids) - 1)]
            with ENGINE_LOCK, use_threads(self.num_threads):
                self.backend.prefill(chunk, cache)
        with ENGINE_LOCK, use_threads(self.num_threads):
            method = self.backend.method("plain")
            method.start(sequence)
            method.step(1)
        return sampler.gap

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text``, without any chat template."""
        return len(self.tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready for the model's answer; nothing is left out."""
        return self.tokenizer.encode_chat(messages)

    def stream_generate(self, request: GenerationRequest, reuse_prefix: bool = True) -> Generation:
        """Prepare an answer; iterate over the returned :class:`Generation` to compute it.

        Args:
            reuse_prefix: take over the cache of an earlier chat with the same beginning. Benchmarks
                and comparisons switch it off, so that every lane reads its whole prompt.

        Raises:
            InvalidRequestError: the prompt is longer than the context, or the method unknown.
            OutOfMemoryError: there is no memory for the cache.
        """
        if self._closed.is_set():
            raise InvalidRequestError("This model has been unloaded; load it again.")
        started = perf_counter()
        context_length = self.backend.context_length
        notices: tuple[str, ...] = ()
        if request.messages is not None:
            fitted = fit_messages(
                request.messages, self.tokenizer.encode_chat, context_length, request.max_new_tokens
            )
            ids, notices = fitted.ids, fitted.notices
        else:
            ids = self._checked_ids(request.prompt_ids or ())
        check_length(len(ids), context_length)
        cache = self._caches.take(ids) if reuse_prefix else None
        if cache is None:
            room = len(ids) + min(request.max_new_tokens, _ANSWER_HEADROOM)
            cache = self.backend.new_cache(min(room, context_length))
        sequence = TokenSequence(ids, cache, Sampler(request.sampling), len(ids))
        text = TextStream(self.tokenizer.token_bytes, request.stop, self.tokenizer.strips_space)
        generation = Generation(
            self.backend,
            request,
            sequence,
            text,
            self.tokenizer.eos_ids,
            notices=notices,
            prepare_seconds=perf_counter() - started,
            num_threads=self.num_threads,
            on_finish=self._keep if reuse_prefix else None,
        )
        self._running.add(generation)
        return generation

    def warm_up(self) -> None:
        """Compute a few tokens, so that the first answer does not pay for thread pools and compilation."""
        cache: Any = self.backend.new_cache(16)
        token = next(iter(self.tokenizer.eos_ids), 0)
        sequence = TokenSequence([token] * 4, cache, Sampler(GenerationRequest(prompt_ids=(0,)).sampling), 4)
        with ENGINE_LOCK, use_threads(self.num_threads):
            self.backend.prefill(sequence.ids[:-1], cache)
            for name in self.methods()[1:]:
                try:
                    self.backend.method(name)  # builds what it needs: a drafter takes a moment
                except SlipstreamError as error:  # whoever asks for it is told; the others can be used
                    log.warning("The method %s cannot be used: %s", name, error)
            method = self.backend.method(self.methods()[0])
            method.start(sequence)
            method.step(1)
            method.step(1)

    def close(self) -> None:
        """End running generations, and release the caches and the weights. Closing twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        for generation in list(self._running):
            generation.close()
        self._caches.clear()
        self.backend.close()

    def _keep(self, generation: Generation) -> None:
        if self._closed.is_set():
            return
        sequence = generation.sequence
        prompt = sequence.ids[: sequence.num_prompt_tokens]
        kept = self._caches.keep(prompt, sequence.cache)
        answer = generation.result.token_ids
        if answer and generation.request.messages is not None:
            rest = [*prompt[len(kept.ids) :], *answer]
            # Not a daemon: torch does not survive an interpreter that ends around it.
            self.settling = threading.Thread(target=self._settle, args=(kept, rest))
            self.settling.start()

    def _settle(self, kept: KeptCache, ids: list[int]) -> None:
        """Read the answer as prompt while the engine is idle; the next turn will want it so."""
        try:
            settle(kept, ids, self._try_prefill, lambda: time.sleep(_SETTLE_PAUSE))
        except Exception:
            # Nobody waits for this. The cache stays valid up to where it got.
            log.warning("Reading the answer ahead of the next turn failed.", exc_info=True)

    def _try_prefill(self, ids: list[int], cache: Any) -> bool:
        if not ENGINE_LOCK.acquire(blocking=False):
            return False
        try:
            with use_threads(self.num_threads):
                self.backend.prefill(ids, cache)
        finally:
            ENGINE_LOCK.release()
        return True

    def _checked_ids(self, prompt_ids: Sequence[int]) -> list[int]:
        ids = [int(index) for index in prompt_ids]
        size = self.tokenizer.vocab_size
        if wrong := next((index for index in ids if not 0 <= index < size), None):
            raise InvalidRequestError(f"The token id {wrong} is not in the vocabulary of {size} tokens.")
        return ids


class _Listener(Sampler):
    """Greedy, and remembers how far ahead the best token was."""

    def __init__(self) -> None:
        super().__init__(SamplingParams())
        self.gap = 0.0

    def choose(self, logits: Tensor, history: Sequence[int], row: int | None = None) -> int:
        best, second = (logits if row is None else logits[row]).topk(2).values.double().tolist()
        self.gap = best - second
        return super().choose(logits, history, row)
