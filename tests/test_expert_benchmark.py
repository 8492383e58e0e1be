"""The expert benchmark: all lanes write the same, and its figures are what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import paths
from engine.experts import benchmark
from engine.experts.benchmark import LINKS, rows, run_setting
from engine.experts.lanes import Lane, lanes, record_trace
from engine.experts.model import prepare_store
from engine.experts.tables import experts_table
from engine.models.loader import load_decoder
from tests import tiny
from tests.test_expert_tiers import random_stream
from tests.test_m2r2 import accelerator

PROMPTS = [list(range(40, 60)), list(range(70, 80))]
NUM_TOKENS = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(paths.HOME_VARIABLE, str(tmp_path / "home"))
    return tiny.save_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0])


@pytest.mark.parametrize("weight_format", ["int4", "fp32"])
def test_all_lanes_write_the_same_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weight_format: str
) -> None:
    decoder, store = load_decoder(folder, weight_format), prepare_store(folder, weight_format)
    monkeypatch.setattr(benchmark, "find_stream", random_stream)
    monkeypatch.setattr(benchmark, "find_adapter", lambda decoder: Path("any"))
    monkeypatch.setattr(benchmark, "load_accelerator", lambda path, decoder: accelerator(decoder, depth=1))
    traces = [record_trace(decoder, store, ids, NUM_TOKENS) for ids in PROMPTS]
    samples = run_setting(lanes(0.4), decoder, store, 1e9, PROMPTS, traces, NUM_TOKENS)
    found = {row["lane"]: row for row in rows(samples)}
    assert found.keys() == {lane.name for lane in lanes(0.4)}
    assert all(row["identical_share"] == 1.0 for row in found.values())
    assert found["resident"]["bytes_per_token"] == 0
    assert found["on-demand"]["hit_rate"] < found["lru"]["hit_rate"] < 1
    assert found["oracle bound"]["prefetch_precision"] == 1.0
    assert found["oracle bound"]["bytes_per_token"] <= found["lru"]["bytes_per_token"]
    assert found["draft union, lfu"]["mean_acceptance_length"] >= 1


def test_lanes_that_need_training_are_left_out_without_it(folder: Path) -> None:
    decoder, store = load_decoder(folder, "fp32"), prepare_store(folder, "fp32")
    traces = [record_trace(decoder, store, PROMPTS[0], 2)]
    chosen = (Lane("lru", 0.5), Lane("accelerated", 0.5, "lru", "accelerated"))
    assert run_setting(chosen, decoder, store, 1e9, PROMPTS[:1], traces, 2).keys() == {"lru"}


def test_ratios_are_prompt_by_prompt() -> None:
    def sample(seconds: float) -> dict[str, object]:
        experts = dict.fromkeys(
            ("expert_hits", "expert_late", "expert_misses", "prefetch_issued", "prefetch_used", "bytes_loaded",
             "stall_seconds"), 1,
        )  # fmt: skip
        speculation = {"num_rounds": 10, "num_accepted_tokens": 5}
        return {
            "seconds": seconds, "num_tokens": 10, "experts": experts, "speculation": speculation, "identical": True,
        }  # fmt: skip

    slow, fast = [sample(1.0), sample(4.0), sample(2.0)], [sample(0.5), sample(1.0), sample(2.0)]
    found = rows({"on-demand": slow, "lru": fast})
    assert found[1]["to_on_demand"] == [2.0, 1.5, 3.0] and found[0]["to_lru"][0] == 0.5
    assert found[0]["tokens_per_second"] == 5.0 and found[0]["to_oracle"] is None
    assert found[0]["hit_rate"] == pytest.approx(1 / 3) and found[0]["mean_acceptance_length"] == 1.5
    report = {
        "format": "int4",
        "expert_bytes": 37000,
        "settings": [{"link": "x", "weight": 2.0, "bandwidth": 1e6, "cache_percent": 25, "rows": found}],
    }
    assert "| lru | 10.0 | 2.00 (1.50 to 3.00) |" in experts_table(report)


def test_a_links_weight_is_its_load_time_over_the_layers_time() -> None:
    pcie = LINKS["pcie3x8"]
    layer = 1 / (48 * pcie.tokens_per_second)
    assert pcie.weight * layer * pcie.bandwidth == pytest.approx(8 * 3 * 768 * 2048 * 5 / 8)
    assert LINKS["nvme"].weight > 1 and LINKS["pcie4x16"].weight < pcie.weight


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.json"
    arguments = ["--model", str(folder), "--format", "fp32", "--json", str(target), "--limit", "1"]
    assert benchmark.main([*arguments, "--max-tokens", "2", "--cache", "50", "--links", "pcie4x16"]) == 0
    report = json.loads(target.read_text())
    assert report["settings"][0]["rows"][0]["lane"] == "on-demand" and report["num_experts"] == 24
    assert "**pcie4x16**" in capsys.readouterr().out
    assert benchmark.main([*arguments, "--suite", "none"]) == 1
