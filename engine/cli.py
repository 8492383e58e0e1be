"""The commands ``generate``, ``bench`` and ``tune``: arguments in, text out. Errors are one sentence, exit code 1."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequestError, SlipstreamError

INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Run ``generate ...``, ``bench ...`` or ``tune ...``; returns the exit code."""
    arguments = build_parser().parse_args(list(argv))
    try:
        if arguments.command == "bench":
            from engine.evaluation.command import bench

            return bench(arguments)
        if arguments.command == "tune":
            from engine.residuals.command import tune_command

            return tune_command(arguments)
        return generate(arguments)
    except SlipstreamError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    from engine.evaluation.suites import SUITES
    from engine.formats import choosable_formats
    from engine.residuals.command import add_arguments

    formats = ", ".join(("auto", *choosable_formats()))
    parser = argparse.ArgumentParser(prog="launch.py")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer one prompt, streaming")
    generate.add_argument("prompt", help="what to ask; - reads standard input")
    generate.add_argument("--model", default=None, help="hub repository, folder or .gguf file")
    generate.add_argument("--format", default="auto", help=f"weight format: {formats}")
    generate.add_argument("--method", default="plain", help="decoding method")
    generate.add_argument("--device", default="auto")
    generate.add_argument("--threads", type=int, default=None)
    generate.add_argument(
        "--memory", default=None, help="what a mixture-of-experts model may take, such as 6GB"
    )
    generate.add_argument("--system", default=None, help="system prompt")
    generate.add_argument("--max-tokens", type=int, default=512)
    generate.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--min-p", type=float, default=0.0)
    generate.add_argument("--repetition-penalty", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=None)
    generate.add_argument("--json", action="store_true", help="one JSON object instead of the text")

    bench = commands.add_parser("bench", help="methods, formats and peers side by side")
    bench.add_argument("--model", default=None, help="hub repository, folder or .gguf file")
    bench.add_argument("--suite", default="mt_bench", help=", ".join(SUITES))
    bench.add_argument("--prompts", default=None, metavar="FILE.jsonl", help="own prompts instead of a suite")
    bench.add_argument("--limit", type=int, default=None, help="number of prompts, spread over the suite")
    bench.add_argument("--max-tokens", type=int, default=128)
    bench.add_argument(
        "--ignore-eos", action="store_true", help="go on to --max-tokens where the model ends its answer"
    )
    bench.add_argument("--formats", default="auto", help=f"weight formats, comma separated: {formats}")
    bench.add_argument("--methods", default="plain", help="decoding methods, comma separated")
    bench.add_argument("--peers", default="", help="transformers, llama.cpp")
    bench.add_argument("--baseline", help="lane that ratios refer to (last peer, or first lane)")
    bench.add_argument("--threads", type=int, default=None)
    bench.add_argument("--temperature", type=float, default=0.0)
    bench.add_argument("--top-p", type=float, default=1.0)
    bench.add_argument("--repetition-penalty", type=float, default=1.0)
    bench.add_argument("--json", default=None, metavar="FILE", help="report, written after every prompt")
    bench.add_argument("--resume", action="store_true", help="go on with the report given by --json")

    add_arguments(commands.add_parser("tune", help="train an accelerator for a model on this machine"))
    return parser


def generate(arguments: argparse.Namespace) -> int:
    """Answer one prompt: text to stdout as it comes, one line of metrics to stderr."""
    from engine.requests import GenerationRequest, Message, SamplingParams

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise InvalidRequestError("The prompt is empty; type something first.")
    system = [Message("system", arguments.system)] if arguments.system else []
    request = GenerationRequest(
        messages=[*system, Message("user", prompt)],
        sampling=SamplingParams(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        ),
        stop=tuple(arguments.stop),
        max_new_tokens=arguments.max_tokens,
        method=arguments.method,
    )
    session = load(arguments)
    try:
        generation = session.stream_generate(request, reuse_prefix=False)
        try:
            for step in generation:
                if not arguments.json:
                    print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            generation.close()
        result = generation.result
        if arguments.json:
            print(json.dumps(as_json(result, session.info), ensure_ascii=False))
        else:
            print()
        for notice in result.notices:
            print(notice, file=sys.stderr)
        print(metrics_line(result, session.info), file=sys.stderr)
        return INTERRUPTED if result.finish_reason.value == "cancelled" else 0
    finally:
        session.close()


def load(arguments: argparse.Namespace) -> Any:
    """The session; loading is reported on stderr if a person watches."""
    from engine.experts.planner import parse_memory
    from engine.hub import DEFAULT_MODEL
    from engine.session import Session

    def show(progress: Any) -> None:
        print(f"\r\033[K{progress.message}", end="", file=sys.stderr, flush=True)

    watched = sys.stderr.isatty()
    try:
        return Session.load(
            arguments.model or DEFAULT_MODEL,
            arguments.format,
            arguments.device,
            arguments.threads,
            on_progress=show if watched else None,
            memory=None if arguments.memory is None else parse_memory(arguments.memory),
        )
    finally:
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def metrics_line(result: Any, info: Any) -> str:
    """What the answer cost, in one line."""
    metrics = result.metrics
    rate = metrics.tokens_per_second
    parts = [
        f"{metrics.num_new_tokens} tokens",
        *([f"{rate:.1f} tokens/s"] if rate else []),
        *([f"first token {metrics.ttft:.2f} s"] if metrics.ttft is not None else []),
        f"prompt {metrics.num_prompt_tokens} tokens",
        f"{info.name}, {info.weight_format}, {info.kernel}",
        f"ended by {result.finish_reason.value}",
    ]
    if metrics.speculation.acceptance_rate is not None:
        parts.insert(2, f"{metrics.speculation.acceptance_rate:.0%} of drafts accepted")
    return " · ".join(parts)


def as_json(result: Any, info: Any) -> dict[str, Any]:
    """The outcome with its counters."""
    metrics = result.metrics
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason.value,
        "notices": list(result.notices),
        "model": info.name,
        "format": info.weight_format,
        "kernel": info.kernel,
        "num_prompt_tokens": metrics.num_prompt_tokens,
        "num_new_tokens": metrics.num_new_tokens,
        "tokens_per_second": metrics.tokens_per_second,
        "ttft": metrics.ttft,
        "acceptance_rate": metrics.speculation.acceptance_rate,
        "mean_acceptance_length": metrics.speculation.mean_acceptance_length
        if metrics.speculation.num_draft_tokens
        else None,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
