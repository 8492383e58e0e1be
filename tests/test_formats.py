"""Which weight formats a person is offered: those that run here, told before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import FakeSession, ready_host

from app.compare_page import ComparePage
from app.engine_host import EngineHost, LoadState, ModelChoice
from app.model_panel import build_model_choice, format_choice
from app.preferences import PreferenceFile
from app.spare_sessions import memory_sentence
from engine import cli, doctor
from engine.formats import choosable_formats
from engine.quantization import WEIGHT_FORMATS

FOR_TESTS = "fp64"
VISITOR: Any = SimpleNamespace(session_hash="a visitor")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[True, False], ids=["with bitsandbytes", "without"])
def has_bitsandbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found: Any = object() if request.param else None
    for module in ("engine.formats", "engine.quantization.nf4"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: found)
    return bool(request.param)


def unloaded_host(weight_format: str = "auto") -> EngineHost:
    def load(*arguments: Any) -> Any:
        raise AssertionError("nothing is loaded here")

    return EngineHost(load, ModelChoice("fake", weight_format))


def test_what_is_offered_is_what_runs(has_bitsandbytes: bool):
    """Without a loaded model as with one, and as ``doctor`` says it."""
    running = {option.name for option in doctor.formats("cpu") if option.reason is None}
    assert set(choosable_formats()) == set(choosable_formats("cpu")) == running - {FOR_TESTS}
    assert ("nf4" in running) == ("bnb_int8" in running) == has_bitsandbytes
    if has_bitsandbytes:
        assert set(choosable_formats()) == set(WEIGHT_FORMATS) - {FOR_TESTS}


def test_a_loaded_models_device_decides(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.device] = []

    def unavailable(device: torch.device) -> str:
        asked.append(device)
        return "this GPU is too old."

    monkeypatch.setattr(WEIGHT_FORMATS["int4"], "unavailable", unavailable)
    assert "int4" in choosable_formats() and not asked
    assert "int4" not in choosable_formats("cuda:1") and asked == [torch.device("cuda:1")]


def test_the_panel_offers_them(has_bitsandbytes: bool):
    import gradio as gr

    with gr.Blocks():
        panel = build_model_choice(unloaded_host(), PreferenceFile(None))
    labels, names = zip(*panel.weights.choices, strict=True)
    assert names == ("auto", *choosable_formats()) and len(set(labels)) == len(labels)
    assert FOR_TESTS not in names and ("nf4" in names) == has_bitsandbytes


def test_a_format_that_is_not_offered_is_not_preset(monkeypatch: pytest.MonkeyPatch):
    """Saved with bitsandbytes and opened without, or given on the command line: gradio would refuse the value."""
    assert format_choice(unloaded_host("int8"))["value"] == "int8"
    monkeypatch.setattr("engine.formats.find_spec", lambda name: None)
    for name in ("nf4", FOR_TESTS):
        assert format_choice(unloaded_host(name))["value"] == "auto"


def test_pages_offer_what_the_loaded_models_device_runs(
    tmp_path: Path, slipstream_home: Path, monkeypatch: pytest.MonkeyPatch
):
    import gradio as gr

    from app.chat_page import ChatPage
    from app.chats import ChatStore
    from app.page import OneStore

    monkeypatch.setattr(WEIGHT_FORMATS["int4"], "unavailable", lambda device: "this GPU is too old.")
    session = FakeSession()
    host, preferences = ready_host(session), PreferenceFile(tmp_path / "settings.json")
    with gr.Blocks():
        store = OneStore(ChatStore(None))
        private, public = (ChatPage(host, store, preferences, mine) for mine in (True, False))
        compare = ComparePage(host, preferences, private=True)
    wanted = list(choosable_formats("cpu"))
    assert "int4" not in wanted and "int8" in wanted
    outputs = private._loading_state(VISITOR)
    assert [name for _, name in outputs[8].choices] == ["auto", *wanted]
    assert len(public._loading_state(VISITOR)) == len(outputs) - 6 == 13  # no weights, no training
    seen, _, first, _, second, *_ = compare._on_tick(None, "plain", "plain")
    for dropdown in (first, second):
        assert [name for _, name in dropdown.choices] == ["", *wanted]
        assert "value" not in dropdown.constructor_args  # what a person picked stays
    assert len(compare._on_tick(seen, "plain", "plain")) == 7
    for stage in ("loading", "failed"):
        monkeypatch.setattr(host, "_state", LoadState(stage, "A sentence."))
        assert len(private._loading_state(VISITOR)) == len(outputs)


def test_what_each_costs_is_told():
    told = {name: memory_sentence(1_000_000_000, name) for name in choosable_formats()}
    for name, sentence in told.items():
        size = float(sentence.split("about ")[1].split()[0]) * (1 if " GB" in sentence else 1e-3)
        assert size == pytest.approx(WEIGHT_FORMATS[name].bytes_per_weight(), rel=0.05), name


def test_the_commands_name_them(has_bitsandbytes: bool, capsys: pytest.CaptureFixture[str]):
    from app.main import main

    for show in (main, lambda argv: cli.main(["generate", *argv]), lambda argv: cli.main(["bench", *argv])):
        with pytest.raises(SystemExit):
            show(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert ", ".join(choosable_formats()) in said and ("nf4" in said) == has_bitsandbytes


def test_the_page_is_built_without_torch(tmp_path: Path):
    """It comes up while torch is imported in another thread; asking for the formats must not wait for that."""
    code = (
        "import sys\n"
        "import app.main, app.server\n"
        "from app.engine_host import EngineHost, ModelChoice\n"
        "from app.page import build_blocks\n"
        "from app.preferences import PreferenceFile\n"
        "host = EngineHost(None, ModelChoice('fake'))\n"
        "build_blocks(host, PreferenceFile(None), private=True)\n"
        "heavy = ('torch', 'transformers', 'bitsandbytes', 'numba', 'engine.quantization')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    environment = {"SLIPSTREAM_HOME": str(tmp_path), "PATH": "", "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
