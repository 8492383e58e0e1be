"""One running answer: an iterator of rounds over a backend, stoppable from any thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from time import perf_counter

from engine.decoding.base import Backend, Step, TakesTurns, TokenSequence
from engine.errors import OutOfMemoryError, SlipstreamError
from engine.mapped_files import check_mapped_files
from engine.metrics import GenerationMetrics
from engine.requests import FinishReason, GenerationRequest, GenerationResult, Piece, Round
from engine.text_stream import TextStream
from engine.threads import use_threads

# One lock for everything that computes, whichever session it belongs to: two computations at once would
# only halve each other's speed and spoil the timings. It is held for one round or one prefill chunk, so
# several generations take turns.
ENGINE_LOCK = threading.Lock()


def _nobody() -> None:
    """Instead of a method to which it matters who steps next."""


_latest: Callable[[], TakesTurns | None] = _nobody  # whose step was the latest


class Generation:
    """Iterate to compute: each ``next`` runs one decoding step and yields its :class:`Round`.

    The first step includes the prefill. Closing (or dropping out of a ``with``) ends the generation
    where it stands. ``cancel`` may be called from any thread.

    Attributes:
        metrics: live counters.
        prefill_progress: prompt tokens done and in total, live.
        request: what was asked.
        sequence: token ids and cache; belongs to the engine.
    """

    def __init__(
        self,
        backend: Backend,
        request: GenerationRequest,
        sequence: TokenSequence,
        text: TextStream,
        eos_ids: frozenset[int],
        *,
        notices: tuple[str, ...] = (),
        prepare_seconds: float = 0.0,
        num_threads: int | None = None,
        on_finish: Callable[[Generation], None] | None = None,
    ) -> None:
        self._backend = backend
        self._method = backend.method(request.method)
        self._turn: Callable[[], TakesTurns | None] = _nobody
        if isinstance(self._method, TakesTurns):
            self._turn = weakref.ref(self._method)
        self.request = request
        self.sequence = sequence
        self._text = text
        self._eos_ids = frozenset() if request.ignore_eos else eos_ids
        self._notices = notices
        self._prepare_seconds = prepare_seconds
        # Beside the fused kernels' own threads, which wait for the next step at full tilt, a second thread of
        # torch's would wait for a core. Their steps do nothing by torch that they do not see to themselves.
        self._in_torch = backend.kernel != "fused"
        self._num_threads = num_threads if self._in_torch else 1
        self._on_finish = on_finish
        self._cancelled = threading.Event()
        self._busy = threading.Lock()  # one next() at a time; close() waits for none
        self._started = False
        self._result: GenerationResult | None = None
        self._released: list[str] = []
        self._token_ids: list[int] = []
        self.metrics = GenerationMetrics(
            num_prompt_tokens=sequence.num_prompt_tokens, num_cached_tokens=sequence.cache.length
        )

    def __iter__(self) -> Generation:
        return self

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __next__(self) -> Round:
        """Compute one round.

        Raises:
            OutOfMemoryError: there is no memory for a longer context.
            ModelFileError: the disk that the model is read from fails.
        """
        try:
            with self._busy:
                return self._guarded_advance()
        finally:
            # close() came from another thread while this round was computed: nobody may call again.
            if self._cancelled.is_set():
                self.close()

    @property
    def prefill_progress(self) -> tuple[int, int]:
        total = self.sequence.num_prompt_tokens
        # The last prompt token is fed by the first decoding step.
        done = total if self.metrics.ttft is not None else min(self.sequence.cache.length, total - 1)
        return done, total

    @property
    def result(self) -> GenerationResult:
        """The outcome, once the generation is exhausted, cancelled or closed.

        Raises:
            SlipstreamError: it is still running.
        """
        if self._result is None:
            raise SlipstreamError("The answer is not finished yet; wait for it or stop it.")
        return self._result

    @property
    def finished(self) -> bool:
        return self._result is not None

    def cancel(self) -> None:
        """Ask the generation to end; obeyed within one round or one prefill chunk."""
        self._cancelled.set()

    def close(self) -> None:
        """End now. A round that another thread is computing ends the generation when it is done."""
        self._cancelled.set()
        if self._busy.acquire(blocking=False):
            try:
                self._finish(FinishReason.CANCELLED)
            finally:
                self._busy.release()

    def _guarded_advance(self) -> Round:
        if self._result is not None:
            raise StopIteration
        try:
            return self._advance()
        except StopIteration:
            raise
        except BaseException as error:
            self._finish(FinishReason.CANCELLED)
            if (sentence := _memory_sentence(error)) is not None:
                raise OutOfMemoryError(sentence) from error
            raise

    def _advance(self) -> Round:
        if not self._started:
            self._prefill()
            self._started = True
        self._stop_if_cancelled()
        with ENGINE_LOCK:
            _take_turn(self._turn)
            started = perf_counter()
            if self._in_torch:
                with use_threads(self._num_threads):
                    step = self._method.step(self._room())
            else:
                step = self._method.step(self._room())
            check_mapped_files()
            pieces, reason = self._read(step)  # counted too: text is part of what a token costs
            seconds = perf_counter() - started
        self._count(step, len(pieces), seconds)
        if reason is None and len(self._token_ids) >= self.request.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is None and self._room() < 1:
            reason = FinishReason.CONTEXT
        if reason is not None:
            last = pieces[-1]
            pieces[-1] = Piece(last.token_id, last.provenance, last.text + self._text.finish())
        self._released.extend(piece.text for piece in pieces)
        round_ = Round(
            tuple(pieces), step.num_draft_tokens, step.num_accepted_tokens,
            step.draft_seconds, step.verify_seconds, seconds,
        )  # fmt: skip
        if reason is not None:
            self._finish(reason)
        return round_

    def _prefill(self) -> None:
        """Every prompt token but the last, in chunks, looking at the stop flag between them."""
        sequence, backend = self.sequence, self._backend
        end = sequence.num_prompt_tokens - 1
        while sequence.cache.length < end:
            self._stop_if_cancelled()
            begin = sequence.cache.length
            chunk = sequence.ids[begin : min(begin + backend.prefill_chunk, end)]
            with ENGINE_LOCK, use_threads(self._num_threads):
                started = perf_counter()
                backend.prefill(chunk, sequence.cache)
                check_mapped_files()
                self.metrics.prefill_seconds += perf_counter() - started
        self._stop_if_cancelled()
        self._method.start(sequence)

    def _stop_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            self._finish(FinishReason.CANCELLED)
            raise StopIteration

    def _room(self) -> int:
        """Tokens that may still come."""
        left = self.request.max_new_tokens - len(self._token_ids)
        return min(left, self._backend.context_length - len(self.sequence.ids))

    def _read(self, step: Step) -> tuple[list[Piece], FinishReason | None]:
        """Pieces up to the end of the answer; tokens behind an end are dropped."""
        pieces: list[Piece] = []
        for token, provenance in zip(step.token_ids, step.provenance, strict=True):
            self._token_ids.append(token)
            is_end = token in self._eos_ids
            pieces.append(Piece(token, provenance, "" if is_end else self._text.push(token)))
            if is_end or self._text.stopped:
                return pieces, FinishReason.STOP
        return pieces, None

    def _count(self, step: Step, num_kept: int, seconds: float) -> None:
        metrics = self.metrics
        if metrics.ttft is None:  # the first step completes the prompt: its time is the prompt's
            metrics.prefill_seconds += seconds
            metrics.ttft = self._prepare_seconds + metrics.prefill_seconds
        else:
            metrics.decode_seconds += seconds
            metrics.num_decode_tokens += num_kept
        metrics.num_new_tokens = len(self._token_ids)
        metrics.speculation.observe(step.num_draft_tokens, step.num_accepted_tokens)

    def _finish(self, reason: FinishReason) -> None:
        if self._result is not None:
            return
        self._result = GenerationResult(
            "".join(self._released), tuple(self._token_ids), reason, self.metrics, self._notices
        )
        on_finish, self._on_finish = self._on_finish, None
        if on_finish is not None:
            on_finish(self)


def _take_turn(turn: Callable[[], TakesTurns | None]) -> None:
    """Have whoever stepped last, if it was another, step aside."""
    global _latest
    if turn is not _latest:
        if (last := _latest()) is not None:
            last.step_aside()
        _latest = turn


def _memory_sentence(error: BaseException) -> str | None:
    import torch

    # torch's CPU allocator raises a bare RuntimeError
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if cpu or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return "There is not enough memory to go on; start a new chat, close other programs or choose int4."
    return None
