"""Whether a model fits and how fast it should run, and the memory setting from the page to the engine."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from fake_engine import FakeSession, ready_host, wait_until
from stand_in import serve
from test_app_page import Elements
from tiny import hf_config, save_model

from app.engine_host import EngineHost, ModelChoice
from app.main import main
from app.model_panel import build_model_choice, fit_lines
from app.preferences import PreferenceFile
from engine import disk_speed, doctor, fit, hardware, memory_speed, paths
from engine.errors import InvalidRequestError
from engine.experts.planner import default_budget, plan_memory
from engine.models.families import config_from_hf
from engine.quantization import get_format

HUGE = 10**15


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "sparse", "qwen3_moe")


@pytest.fixture
def known_speed(slipstream_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda **_: 20e9)
    memory_speed.measure_bandwidth()


def budget_for(sparse: Path, num_slots: int, weight_format: str = "int4") -> int:
    """Bytes with which so many experts stay in memory."""
    config = config_from_hf(json.loads((sparse / "config.json").read_text()))
    plan = plan_memory(config, get_format(weight_format), HUGE)
    return plan.total - (plan.num_experts - num_slots) * plan.expert


# The estimate


def test_the_memorys_speed_is_measured_once(slipstream_home: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[float] = []

    def measure(seconds: float) -> float:
        measured.append(seconds)
        return 20e9

    monkeypatch.setattr(hardware, "copy_bandwidth", measure)
    assert memory_speed.known_bandwidth() is None
    fit.measure_when_idle(slipstream_home)
    fit.measure_when_idle(slipstream_home)
    assert len(measured) == 1 and memory_speed.known_bandwidth() == 20e9
    monkeypatch.setattr(hardware, "usable_threads", lambda: 4096)
    assert memory_speed.known_bandwidth() is None  # another machine, or another share of this one


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"cpu": 1}'])
def test_a_broken_note_of_the_speed_is_as_none(slipstream_home: Path, content: bytes):
    paths.cache_dir().mkdir(parents=True)
    (paths.cache_dir() / "memory-speed.json").write_bytes(content)
    assert memory_speed.known_bandwidth() is None


def test_a_dense_model_has_an_estimate_that_says_so(dense: Path, known_speed: None):
    told = fit.estimate_fit(str(dense), None)
    assert told.fits and told.slowest is not None and told.fastest is not None
    assert 0 < told.slowest < told.fastest
    assert "All of it stays in memory" in str(told) and "Estimated" in str(told) and "20 GB/s" in str(told)


def test_without_the_memorys_speed_none_is_told(dense: Path, slipstream_home: Path):
    told = fit.estimate_fit(str(dense), None)
    assert (
        told.fits
        and told.to_measure == dense / "model.safetensors"
        and told.fastest is None
        and "tokens/s" not in str(told)
    )


def test_a_format_without_measurements_has_a_limit_alone(dense: Path, known_speed: None):
    told = fit.estimate_fit(str(dense), None, "fp32")
    assert told.slowest is None and told.fastest is not None and "At most" in told.speed


def test_a_model_whose_experts_all_fit_has_an_estimate(sparse: Path, known_speed: None):
    told = fit.estimate_fit(str(sparse), HUGE)
    assert "All 24 experts stay in memory" in told.memory and "Estimated" in told.speed
    assert told.slowest is not None and told.fastest is not None and told.to_measure is None


def test_a_model_whose_experts_do_not_all_fit_is_told_what_reading_costs(
    sparse: Path, known_speed: None, monkeypatch: pytest.MonkeyPatch
):
    whole, budget = fit.estimate_fit(str(sparse), HUGE), budget_for(sparse, 6)
    used = [0]
    monkeypatch.setattr(fit, "machine_memory", lambda: hardware.MemoryUse(used[0], HUGE))
    roomy = fit.estimate_fit(str(sparse), budget)
    assert roomy.memory.startswith("6 of 24 experts stay in memory") and roomy.fits
    assert roomy.slowest is not None and whole.slowest is not None and roomy.fastest == whole.fastest
    assert roomy.slowest < whole.slowest and "otherwise free" in roomy.speed
    used[0] = HUGE  # no room for the others
    unknown = fit.estimate_fit(str(sparse), budget)
    assert unknown.slowest is None and "speed of this disk is not known" in unknown.speed
    assert unknown.to_measure == sparse / "model.safetensors"
    rates = []
    for speed in (1e6, 1e9):
        monkeypatch.setattr(fit, "known_disk_speed", lambda file, speed=speed: speed)
        told = fit.estimate_fit(str(sparse), budget)
        assert "about 44 % of the experts" in told.speed and "from the disk" in told.speed
        assert told.slowest is not None and told.fastest is not None and told.slowest <= told.fastest
        rates.append(told.slowest)
    assert rates[0] < rates[1] < whole.slowest


def test_the_disks_speed_is_measured_once_and_kept(tmp_path: Path, slipstream_home: Path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(32 << 20))
    small.write_bytes(b"x")
    assert disk_speed.known_disk_speed(large) is None and disk_speed.measure_disk_speed(small) is None
    speed = disk_speed.measure_disk_speed(large, 0.01)
    if speed is not None:  # this file system can be read past its cache
        assert speed > 1e5 and disk_speed.known_disk_speed(large) == speed
    (paths.cache_dir() / "disk-speed.json").write_text("[")
    assert disk_speed.known_disk_speed(large) is None
    assert disk_speed.measure_disk_speed(tmp_path / "none") is None


def test_too_little_memory_has_no_speed(
    sparse: Path, dense: Path, known_speed: None, monkeypatch: pytest.MonkeyPatch
):
    told = fit.estimate_fit(str(sparse), 10_000_000)
    assert told.fits is False and told.speed == "" and "10 MB" in str(told)
    monkeypatch.setattr("engine.experts.planner.private_memory", lambda: 0)
    monkeypatch.setattr(
        "engine.experts.planner.machine_memory", lambda: hardware.MemoryUse(99_000_000, 100_000_000)
    )
    assert fit.estimate_fit(str(dense), None).fits is False


@pytest.mark.parametrize("source", ["someone/not-here", "nonsense", "", "/no/such/file.gguf"])
def test_of_a_model_that_is_not_here_that_is_said(source: str, slipstream_home: Path):
    told = fit.estimate_fit(source, None)
    assert told.fits is None and str(told).startswith("It is not on this machine") and str(told).endswith(".")


# doctor


def doctor_says(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert doctor.main(["--quick", *arguments]) == 0
    return capsys.readouterr().out


def test_doctor_prints_the_plan_in_one_line(
    sparse: Path, slipstream_home: Path, capsys: pytest.CaptureFixture[str]
):
    said = doctor_says(capsys, "--model", str(sparse), "--memory", f"{budget_for(sparse, 5) / 1e6:.6f}MB")
    (line,) = [line for line in said.splitlines() if line.startswith("  memory     ") and "experts" in line]
    assert "5 of 24 experts stay in memory" in line and line.endswith(".")
    report = json.loads(doctor_says(capsys, "--json", "--model", str(sparse)))["model"]
    assert report["plan"].startswith("All 24 experts") and report["fits"]
    assert report["num_slots"] == report["num_experts"] == 24


def test_doctor_refuses_what_is_no_amount(sparse: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--quick", "--model", str(sparse), "--memory", "much"]) == 1
    assert "'much' is no amount of memory" in capsys.readouterr().err


def test_doctor_plans_a_model_before_it_is_downloaded(
    slipstream_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # The real shapes of a model with 30 billion weights; its tensors are never asked for.
    config = hf_config(
        "qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144, vocab_size=151936,
    ).to_json_string().encode()  # fmt: skip
    with serve() as stand_in:
        stand_in.add_repository("owner/moe", {"config.json": config, "model.safetensors": b"x" * 5000})
        stand_in.add_repository("owner/gguf", {"model.q4_0.gguf": b"GGUF" * 1000})
        stand_in.add_repository(
            "owner/other", {"config.json": b'{"model_type": "mamba"}', "model.safetensors": b""}
        )
        stand_in.add_repository("owner/broken", {"config.json": b"[", "model.safetensors": b""})
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        said = doctor_says(capsys, "--model", "owner/moe", "--memory", "6GB")
        assert "of 6144 experts stay in memory" in said and "to download" in said
        assert "GGUF file" in doctor_says(capsys, "--model", "owner/gguf")
        assert "no architecture of ours" in doctor_says(capsys, "--model", "owner/other")
        assert "does not deliver the description" in doctor_says(capsys, "--model", "owner/broken")
        assert "does not hand out owner/secret" in doctor_says(capsys, "--model", "owner/secret")
        assert not [path for path, *_ in stand_in.requests if path.endswith((".safetensors", ".gguf"))]
    said = doctor_says(capsys, "--model", "owner/moe")  # the stand-in is gone
    assert "not on this machine: 127.0.0.1 cannot be reached" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor_says(capsys, "--model", "owner/moe")


# The memory setting


def test_the_setting_becomes_a_number():
    assert ModelChoice("a").memory_bytes() is None and ModelChoice("a", memory=" ").memory_bytes() is None
    assert ModelChoice("a", memory="1.5 GB").memory_bytes() == 1_500_000_000
    with pytest.raises(InvalidRequestError, match="no amount"):
        ModelChoice("a", memory="lots").memory_bytes()


def test_other_formats_of_a_model_keep_its_memory():
    choices: list[ModelChoice] = []

    def load(choice: ModelChoice, on_progress: object, cancel: object) -> FakeSession:
        choices.append(choice)
        return FakeSession()

    host = EngineHost(load, ModelChoice("a", "int4", "6GB"))
    host.spares.load("int8")
    assert choices == [ModelChoice("a", "int8", "6GB")]


def test_a_bad_amount_ends_the_start_with_a_sentence(
    slipstream_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.main._write_log", lambda: None)
    try:
        assert main(["--memory", "much", "--no-browser"]) == 1
    finally:
        gc.enable()  # off for the length of a start
    assert "'much' is no amount of memory; give one such as 6GB" in capsys.readouterr().err


def test_a_bad_saved_amount_is_told_in_the_page():
    from app.main import _load_session

    host = EngineHost(_load_session, ModelChoice("a", memory="much"))
    host.start()
    wait_until(lambda: host.state.stage == "failed")
    assert "'much' is no amount of memory" in host.state.message


def test_loading_with_a_bad_amount_loses_nothing(slipstream_home: Path):
    import gradio as gr

    preferences = PreferenceFile(paths.data_dir() / "settings.json")
    host = ready_host(FakeSession())
    with gr.Blocks() as blocks:
        build_model_choice(host, preferences)
    (change_model,) = [f.fn for f in blocks.fns.values() if getattr(f.fn, "__name__", "") == "change_model"]
    begun, told = change_model("other", "int8", "much")
    assert begun is False and "no amount of memory" in Elements(told).text
    assert host.choice == ModelChoice("fake") and host.state.stage == "ready"
    assert PreferenceFile(paths.data_dir() / "settings.json").value.memory == ""
    begun, _ = change_model("other", "int8", " 6GB ")
    assert begun is True and host.choice == ModelChoice("other", "int8", "6GB")
    assert PreferenceFile(paths.data_dir() / "settings.json").value.memory == "6GB"


def test_the_line_under_the_fields(sparse: Path, slipstream_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda **_: 20e9)
    first, second = (Elements(line).text for line in fit_lines(str(sparse), "auto", ""))
    assert "24 experts stay in memory" in first and "tokens/s" not in first
    assert second.startswith(first) and "tokens/s" in second
    (line,) = fit_lines(str(sparse), "auto", "1MB")
    assert 'class="fit short"' in line
    (line,) = fit_lines(str(sparse), "auto", "much")
    assert "no amount of memory" in line and "error" in line
    (sparse / "config.json").rename(sparse / "away.json")
    try:
        (line,) = fit_lines(str(sparse), "auto", "")
        assert Elements(line).text.endswith(".") and "Traceback" not in line
    finally:
        (sparse / "away.json").rename(sparse / "config.json")


def test_what_the_process_has_itself_is_its_own_to_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.experts.planner.machine_memory", lambda: hardware.MemoryUse(6 << 30, 8 << 30))
    monkeypatch.setattr("engine.experts.planner.private_memory", lambda: 1 << 30)
    assert default_budget() == int(0.85 * (3 << 30))
