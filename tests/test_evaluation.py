"""Prompt files, statistics, and turns of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import InvalidRequestError
from engine.evaluation import busy_cores, row_costs
from engine.evaluation.core_distance import CoreDistance
from engine.evaluation.peers import SlipstreamLane, TransformersLane
from engine.evaluation.runner import BenchSettings, load_samples, run_turns, save_report
from engine.evaluation.statistics import Sample, balanced_order, quantile, summarise
from engine.evaluation.suites import Prompt, load_prompts, suite_path
from engine.hardware import usable_threads
from engine.requests import SamplingParams
from tests import tiny

GREEDY = SamplingParams(seed=0)
SETTINGS = BenchSettings("model", "suite", 4, 1, 0.0)


def sample(rate: float, ids: tuple[int, ...] = (1, 2), **counts: int) -> Sample:
    return Sample(ids, 0.1, 10 / rate, 10, **counts)


def test_order_is_balanced() -> None:
    names = ["a", "b", "c"]
    orders = [balanced_order(names, turn) for turn in range(6)]
    for one in names:
        assert sum(order[0] == one for order in orders) == 2
        for other in set(names) - {one}:
            assert sum(order.index(one) < order.index(other) for order in orders) == 3


def test_ratio_is_paired() -> None:
    mine = {"1": sample(20), "2": sample(200), "3": sample(30)}
    other = {"1": sample(10), "2": sample(100), "3": sample(10)}
    summary = summarise(mine, other, None)
    assert summary.ratio == pytest.approx(2.0)
    assert summary.tokens_per_second == pytest.approx(30)
    assert summary.identical_share is None


def test_identical_share_and_acceptance() -> None:
    mine = {
        "1": sample(1, (1, 2), num_rounds=4, num_draft_tokens=8, num_accepted_tokens=6),
        "2": sample(1, (3,)),
    }
    summary = summarise(mine, None, {"1": sample(1, (1, 2)), "2": sample(1, (4,))})
    assert summary.identical_share == 0.5
    assert summary.acceptance_rate == 0.75
    assert summary.mean_acceptance_length == 2.5


def test_quantile_interpolates() -> None:
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.25) == pytest.approx(1.75)


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"turns": [""]}', '{"id": 1}'])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "turns": ["Hi"]}\n' + line + "\n")
    with pytest.raises(InvalidRequestError, match="Line 2"):
        load_prompts(path)


def test_shipped_suites_load_and_others_are_refused() -> None:
    assert len(load_prompts(suite_path("mt_bench"))) == 60
    assert len({prompt.id for prompt in load_prompts(suite_path("koala"), 7)}) == 7
    with pytest.raises(InvalidRequestError, match="--prompts"):
        suite_path("wizardlm")


class FakeWorker:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def answer(self, ids: list[int], settings: BenchSettings, seed: int) -> Sample:
        self.log.append(self.name)
        return sample(10)


def test_stopped_run_resumes_without_repeating(tmp_path: Path) -> None:
    log: list[str] = []
    workers = {name: FakeWorker(name, log) for name in ("a", "b")}
    prompts = [Prompt(str(i), "s", ("x",)) for i in range(3)]
    samples: dict[str, dict[str, Sample]] = {}
    turns = run_turns(workers, prompts, lambda _: [1], SETTINGS, samples, pause=0)
    assert next(turns) == (1, 3)
    turns.close()
    log.clear()
    assert list(run_turns(workers, prompts, lambda _: [1], SETTINGS, samples, pause=0)) == [(2, 3), (3, 3)]
    assert log[2:] == ["a", "b", "b", "a"]  # after the warm-up


def test_report_round_trip_and_other_settings(tmp_path: Path) -> None:
    from dataclasses import asdict

    path = tmp_path / "r.json"
    stored = {"a": {"1": sample(10)}}
    report = {"settings": asdict(SETTINGS), "samples": {"a": {"1": asdict(sample(10))}}}
    save_report(path, report)
    assert load_samples(path, SETTINGS) == stored
    older = {
        name: value for name, value in asdict(SETTINGS).items() if name not in ("top_p", "repetition_penalty")
    }
    save_report(path, {**report, "settings": older})
    assert load_samples(path, SETTINGS) == stored
    path.write_text(json.dumps({**report, "settings": {}}))
    with pytest.raises(InvalidRequestError, match="other settings"):
        load_samples(path, SETTINGS)


def test_steps_beside_busy_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny.save_model(tmp_path / "tiny", max_position_embeddings=512))
    target = tmp_path / "busy.json"
    options = ["--busy", "0,1", "--turns", "2", "--seconds", "0.05", "--json", str(target)]
    assert busy_cores.main(["--model", model, "--format", "fp32", *options]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["busy processes"] for row in rows] == [0, 1]
    for row in rows:
        assert row["all threads"]["ratio"] == [1, 1, 1] and row["one thread"]["steps_per_second"] > 0
    assert busy_cores.main(["--model", str(tmp_path / "none.gguf"), *options]) == 1
    assert "Error" in capsys.readouterr().err


def test_row_costs_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save_model(tmp_path / "tiny", max_position_embeddings=512)
    target = tmp_path / "costs.json"
    assert (
        row_costs.main(
            ["--model", str(model), "--formats", "fp32,bf16", "--passes", "4", "--json", str(target)]
        )
        == 0
    )
    rows = json.loads(target.read_text())["rows"]
    assert [row["format"] for row in rows] == ["fp32", "bf16"]
    assert all(low <= middle <= high for row in rows for middle, low, high in [row["1 rows"], row["5 rows"]])
    assert row_costs.main(["--model", str(tmp_path / "none.gguf")]) == 1
    assert "Error" in capsys.readouterr().err


def test_lanes_end_where_the_model_ends_its_answer(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "tiny")
    whole = SlipstreamLane(str(folder), "fp32", "plain", 1).generate([5, 9, 11], 12, GREEDY, True)
    tokens = whole["token_ids"]
    assert len(tokens) == 12
    end = tokens[4]
    for file in (folder / "config.json", folder / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": end}))
    lane, peer = SlipstreamLane(str(folder), "fp32", "plain", 1), TransformersLane(str(folder), 1)
    for each in (lane, peer):
        answer = each.generate([5, 9, 11], 12, GREEDY, False)["token_ids"]
        assert answer[-1] == end and end not in answer[:-1]
        assert len(each.generate([5, 9, 11], 12, GREEDY, True)["token_ids"]) == 12
    assert lane.generate([5, 9, 11], 12, GREEDY, False)["token_ids"] == tokens[: tokens.index(end) + 1]


def test_the_distance_of_cores_is_measured_where_there_are_two() -> None:
    alone = CoreDistance(1)
    alone.measure()
    assert alone.summary() is None
    both = CoreDistance(2)
    assert both.summary() is None  # nothing was measured yet
    for _ in range(3):
        both.measure()
    found = both.summary()
    if usable_threads() > 1:
        assert found is not None and 1 < found["lowest"] <= found["median"] <= found["highest"]
