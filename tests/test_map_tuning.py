"""Router maps of a model that does not fit into memory: what is fitted, stopping and going on, and who uses them."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import OutOfMemoryError
from engine.experts.model import load_with_tiers
from engine.experts.planner import MemoryPlan, plan_memory
from engine.models.checkpoint import open_checkpoint
from engine.progress import Progress
from engine.quantization import get_format
from engine.residuals.expert_files import find_maps, find_stream, read_measured
from engine.residuals.expert_stream import ExpertStreamConfig
from engine.residuals.expert_tuning import tune_stream
from engine.residuals.tuning import TuneRequest
from engine.residuals.tuning_data import DataConfig
from engine.residuals.tuning_store import TuningError, TuningStoppedError
from tests import tiny

STREAM = ExpertStreamConfig(3, 8)
HUGE = 1 << 40
SLOTS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "qwen3_moe"
    return tiny.save_model(folder, "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0])


def plan_for(model: Path, slots: int) -> MemoryPlan:
    config, fmt = open_checkpoint(model).config, get_format("int4")
    whole = plan_memory(config, fmt, HUGE)
    return plan_memory(config, fmt, whole.total - (whole.num_experts - slots) * whole.expert)


@pytest.fixture
def request_(model: Path, slipstream_home: Path, tmp_path: Path) -> TuneRequest:
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl", 20)
    return TuneRequest(
        source=str(model), prompts=prompts, data=DataConfig(num_tokens=600, max_new_tokens=40),
        out=tmp_path / "experts" / "tiny.safetensors", memory=plan_for(model, SLOTS).budget, threads=1,
    )  # fmt: skip


def test_maps_are_fitted_from_what_a_chat_shows(
    request_: TuneRequest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    path = tune_stream(request_, STREAM, tmp_path / "work", lambda progress: stages.append(progress.stage))
    recall = json.loads(path.with_suffix(".json").read_text())["measured"]["recall_by_lookahead"]
    assert recall["ridge_gate 1"] > recall["next_gate 1"] + 0.05 and recall["next_token"] > 0.6
    assert "ridge_gate 1" in read_measured(path)
    assert list(dict.fromkeys(stage for stage in stages if stage in ("generate", "initialise", "evaluate"))) == [
        "generate", "initialise", "evaluate",
    ]  # fmt: skip
    assert not list((tmp_path / "work").glob("maps-*/*.safetensors"))
    monkeypatch.setattr("engine.residuals.expert_files.tuned_dir", lambda: tmp_path)
    decoder, tiers = load_with_tiers(model, "int4", plan_for(model, SLOTS))
    try:
        assert find_stream(decoder) is None and find_maps(decoder) is not None
        assert tiers.prefetcher is not None and tiers.prefetcher.predictor.name == "ridge-gate"
    finally:
        tiers.close()


def test_stopped_in_each_stage_it_goes_on(
    request_: TuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.residuals.stages.REPORT_SECONDS", -1.0)
    undisturbed = tune_stream(replace(request_, out=tmp_path / "a.safetensors"), STREAM, tmp_path / "a")
    for stage in ("generate", "initialise", "evaluate"):
        cancel = threading.Event()

        def watch(progress: Progress, stage: str = stage, cancel: threading.Event = cancel) -> None:
            if progress.stage == stage and progress.done > 0:
                cancel.set()

        with pytest.raises(TuningStoppedError, match="goes on"):
            tune_stream(request_, STREAM, tmp_path / "work", watch, cancel)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/maps-*/states-*")}
    assert len(written) > 2
    path = tune_stream(request_, STREAM, tmp_path / "work")
    assert path.read_bytes() == undisturbed.read_bytes()


def test_the_disk_budget_bounds_what_is_written(request_: TuneRequest, tmp_path: Path) -> None:
    sizes: list[int] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "initialise" and not sizes:
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("work/maps-*/states-*")))

    budget = 200_000
    tune_stream(replace(request_, disk_budget=budget), STREAM, tmp_path / "work", watch)
    assert 0.5 * budget < sizes[0] < 1.5 * budget  # an answer more at most, and the files' own


def test_a_damaged_answer_is_told_and_written_anew(request_: TuneRequest, tmp_path: Path) -> None:
    def damage(progress: Progress) -> None:
        if progress.stage == "initialise" and progress.done == 0:
            file = sorted(tmp_path.glob("work/maps-*/states-*"))[1]
            file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(TuningError, match="states-00001 could not be read back"):
        tune_stream(request_, STREAM, tmp_path / "work", damage)
    assert tune_stream(request_, STREAM, tmp_path / "work").is_file()


def test_too_little_memory_is_told(request_: TuneRequest, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="needs"):
        tune_stream(replace(request_, memory=10_000_000), STREAM, tmp_path / "work")
