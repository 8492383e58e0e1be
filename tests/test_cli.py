"""The commands' errors, and a benchmark of a tiny model from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.cli import main
from tests import tiny


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", " "], "prompt is empty"),
        (["generate", "Hi", "--temperature", "-1"], "temperature"),
        (["bench", "--limit", "0"], "--limit"),
        (["bench", "--suite", "none"], "Unknown suite"),
        (["bench", "--peers", "none"], "Unknown peer"),
        (["bench", "--resume"], "--json"),
    ],
)
def test_errors_are_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_bench_on_a_tiny_model(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "tiny")
    report = tmp_path / "report.json"
    argv = ["bench", "--model", str(model), "--limit", "2", "--max-tokens", "6", "--formats", "fp32",
            "--threads", "1", "--peers", "transformers", "--json", str(report)]  # fmt: skip
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": 1, "turns": ["Hello"]}\n{"id": 2, "turns": ["stop"]}\n')
    assert main([*argv, "--prompts", str(prompts)]) == 0
    ours, peer = json.loads(report.read_text())["rows"]
    assert ours["identical_share"] == 1.0 and peer["ratio"] == 1.0 and ours["num_prompts"] == 2
    assert peer["peer"] == "transformers" and ours["peak_memory_mb"] > 0
