"""Lanes: one engine with one model, living in a worker process (see :mod:`engine.evaluation.worker`).

A lane answers token ids with greedy or sampled tokens, as many as asked or up to the answer's end.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Protocol

from engine.errors import SlipstreamError, UnsupportedModelError
from engine.requests import SamplingParams


class Lane(Protocol):
    """What the worker needs of an engine."""

    def peak_memory_mb(self) -> float | None:
        """Most memory so far in MB (10^6 bytes): of the process, or of the GPU where it computes there."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts of the lane for the report."""
        ...

    def generate(
        self, ids: list[int], max_tokens: int, sampling: SamplingParams, ignore_eos: bool
    ) -> dict[str, Any]:
        """Up to ``max_tokens`` tokens, or exactly as many, whatever they end: the fields of a
        :class:`~engine.evaluation.statistics.Sample`."""
        ...


def peak_memory_mb() -> float | None:
    """Largest resident size of this process so far, in MB (10^6 bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return peak / 1e6 if peak else None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def peak_gpu_memory_mb() -> float:
    """Most that torch has taken of the GPU so far, in MB (10^6 bytes)."""
    import torch

    return torch.cuda.max_memory_reserved() / 1e6


class SlipstreamLane:
    """Our own engine: one session, any of its methods."""

    def __init__(self, source: str, weight_format: str, method: str, threads: int) -> None:
        from engine.session import Session

        self.session = Session.load(source, weight_format, threads=threads)
        self.method = method
        if method not in self.session.methods():
            known = ", ".join(self.session.methods())
            raise UnsupportedModelError(f"The method {method!r} is not available here; choose from {known}.")

    def peak_memory_mb(self) -> float | None:
        return peak_memory_mb() if self.session.info.device == "cpu" else peak_gpu_memory_mb()

    def describe(self) -> dict[str, Any]:
        info = self.session.info
        return {
            "model": info.name,
            "format": info.weight_format,
            "device": info.device,
            "kernel": info.kernel,
            "weight_bytes": info.weight_bytes,
            "context_length": info.context_length,
        }

    def encode(self, text: str) -> list[int]:
        """A user's message through the chat template."""
        from engine.requests import Message

        return self.session.encode_chat([Message("user", text)])

    def generate(
        self, ids: list[int], max_tokens: int, sampling: SamplingParams, ignore_eos: bool
    ) -> dict[str, Any]:
        from engine.requests import GenerationRequest

        request = GenerationRequest(
            prompt_ids=ids,
            sampling=sampling,
            max_new_tokens=max_tokens,
            method=self.method,
            ignore_eos=ignore_eos,
        )
        generation = self.session.stream_generate(request, reuse_prefix=False)
        for _ in generation:
            pass
        metrics = generation.metrics
        return {
            "token_ids": list(generation.result.token_ids),
            "ttft": metrics.ttft,
            "decode_seconds": metrics.decode_seconds,
            "num_decode_tokens": metrics.num_decode_tokens,
            "num_rounds": metrics.speculation.num_rounds,
            "num_draft_tokens": metrics.speculation.num_draft_tokens,
            "num_accepted_tokens": metrics.speculation.num_accepted_tokens,
        }


class LlamaCppLane:
    """llama.cpp through llama-cpp-python, on the GGUF file itself."""

    def __init__(self, source: str, threads: int, context_length: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise UnsupportedModelError("The peer llama.cpp needs the package llama-cpp-python.") from None
        path = model_path(source)
        if path.suffix != ".gguf":
            raise UnsupportedModelError(f"llama.cpp reads GGUF files only, not {path.name}.")
        self.model = llama_cpp.Llama(
            str(path), n_ctx=context_length, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.version = llama_cpp.__version__
        self.system = llama_cpp.llama_print_system_info().decode().strip()

    def peak_memory_mb(self) -> float | None:
        return peak_memory_mb()

    def describe(self) -> dict[str, Any]:
        return {
            "format": "gguf",
            "kernel": "llama.cpp",
            "version": f"llama-cpp-python {self.version}",
            "system": self.system,
        }

    def generate(
        self, ids: list[int], max_tokens: int, sampling: SamplingParams, ignore_eos: bool
    ) -> dict[str, Any]:
        self.model.reset()
        self.model.set_seed(sampling.seed or 0)
        tokens: list[int] = []
        marks: list[float] = []
        started = time.perf_counter()
        # All are named: most filters are on by default there. (Its repetition penalty looks at the last 64 tokens.)
        stream = self.model.generate(
            ids, temp=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            repeat_penalty=sampling.repetition_penalty, reset=False,
        )  # fmt: skip
        for token in stream:
            marks.append(time.perf_counter())
            tokens.append(int(token))
            if len(tokens) == max_tokens or (token == self.model.token_eos() and not ignore_eos):
                break
        return timed(tokens, started, marks)


class TransformersLane:
    """transformers' own ``generate`` in bfloat16, on the same (dequantized) weights."""

    def __init__(self, source: str, threads: int) -> None:
        import torch
        import transformers

        from engine.loading import pick_device

        torch.set_num_threads(threads)
        path = model_path(source)
        folder, gguf = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **gguf)
        self.model.to(pick_device("auto")).eval()
        self._ends = self.model.generation_config.eos_token_id or self.model.config.eos_token_id
        # no filter that its own settings bring along
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.version = transformers.__version__

    def peak_memory_mb(self) -> float | None:
        return peak_memory_mb() if self.model.device.type == "cpu" else peak_gpu_memory_mb()

    def describe(self) -> dict[str, Any]:
        return {
            "format": "bf16",
            "device": str(self.model.device),
            "kernel": "transformers",
            "version": f"transformers {self.version}",
        }

    def generate(
        self, ids: list[int], max_tokens: int, sampling: SamplingParams, ignore_eos: bool
    ) -> dict[str, Any]:
        import torch
        from transformers import StoppingCriteriaList

        marks: list[float] = []

        def note_time(tokens: Any, scores: Any, **_: Any) -> Any:
            marks.append(time.perf_counter())
            return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

        torch.manual_seed(sampling.seed or 0)
        settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}
        if not sampling.greedy:
            settings |= {"do_sample": True, "temperature": sampling.temperature}
            settings |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        prompt = torch.tensor([ids], device=self.model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                eos_token_id=None if ignore_eos else self._ends,
                stopping_criteria=StoppingCriteriaList([note_time]),
                **settings,
            )
        return timed(output[0, len(ids) :].tolist(), started, marks)


def timed(tokens: list[int], started: float, marks: list[float]) -> dict[str, Any]:
    """A sample from the times at which the tokens came; the first one belongs to the prefill."""
    if not marks:
        raise SlipstreamError("A peer produced no tokens.")
    return {
        "token_ids": tokens,
        "ttft": marks[0] - started,
        "decode_seconds": marks[-1] - marks[0],
        "num_decode_tokens": len(marks) - 1,
    }


def model_path(source: str) -> Path:
    """Where the model lies, fetched if need be."""
    from engine.hub import resolve

    return Path(resolve(source).path)


def build_lane(spec: dict[str, Any]) -> Lane:
    """The lane of a worker's first message.

    Raises:
        SlipstreamError: the peer is unknown or cannot run here.
    """
    peer, source, threads = spec["peer"], spec["source"], int(spec["threads"])
    if peer == "slipstream":
        return SlipstreamLane(source, spec["format"], spec["method"], threads)
    if peer == "llama.cpp":
        return LlamaCppLane(source, threads, int(spec["context_length"]))
    if peer == "transformers":
        return TransformersLane(source, threads)
    raise UnsupportedModelError(f"Unknown peer {peer!r}; choose from transformers and llama.cpp.")
