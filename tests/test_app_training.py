"""Training from the app: a process of its own that says how far it is, can be stopped, and ends with the app."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest

from app.engine_host import ModelChoice
from app.training import Training, TrainingState
from app.training_panel import TrainingPanel
from engine.session import Session
from tests import tiny
from tests.fake_engine import FakeSession, ready_host, wait_until

ROOT = Path(__file__).resolve().parents[1]


def scripted(body: str) -> Training:
    """Training whose process runs ``body``, which may use ``say(**fields)`` and ``wait_for_end()``."""
    script = f"""
import json, sys
def say(**fields): print(json.dumps(fields), flush=True)
def wait_for_end(): sys.stdin.buffer.read()
{textwrap.dedent(body)}
"""
    return Training((sys.executable, "-c", script))


def ended(training: Training, seconds: float = 30.0) -> TrainingState:
    wait_until(lambda: not training.state.is_under_way, seconds)
    return training.state


def test_it_says_how_far_it_is_and_what_came_of_it():
    training = scripted("""
    print("something else", flush=True)
    say(message="Writing text (1 of 6): 50 of 200 tokens.", share=0.25)
    wait_for_end()
    say(result="52% of first drafts are right.")
    """)
    assert training.state == TrainingState() and not training.state.is_under_way
    training.start("a/model", "drafts")
    assert training.state.is_under_way
    wait_until(lambda: training.state.share == 0.25)
    assert training.state.message == "Writing text (1 of 6): 50 of 200 tokens."
    training.start("another", "drafts")  # one at a time
    assert training.state.source == "a/model"
    training.stop()
    assert training.state.stage == "stopping"
    # It was done by then.
    assert ended(training) == TrainingState("done", "a/model", "52% of first drafts are right.", 1.0)


def test_it_stops_and_goes_on():
    training = scripted("""
    say(message="Training (4 of 6): 1 of 9 steps.", share=0.1)
    wait_for_end()
    sys.exit(130)
    """)
    for _ in range(2):
        training.start("a", "drafts")
        wait_until(lambda: training.state.share == 0.1)
        training.stop()
        training.stop()  # twice is harmless
        state = ended(training)
        assert (state.stage, state.source) == ("stopped", "a") and "goes on" in state.message


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "say(error='The disk is full; free some space.'); sys.exit(1)",
            "The disk is full; free some space.",
        ),
        ("raise ZeroDivisionError('secret')", "Training ended before its time; details are in the log."),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "What is done is kept."),
        ("print('{', flush=True); sys.exit(3)", "Training ended before its time"),
    ],
)
def test_what_goes_wrong_is_a_sentence(body: str, sentence: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    training = scripted(body)
    training.start("a", "drafts")
    state = ended(training)
    assert state.stage == "failed" and sentence in state.message and "secret" not in state.message
    if "secret" in body:
        wait_until(lambda: "secret" in caplog.text)


def test_a_program_that_cannot_be_started_is_a_sentence():
    training = Training(("/nowhere/python",))
    training.start("a", "drafts")
    assert training.state.stage == "failed" and "could not be started" in training.state.message


@pytest.mark.parametrize(
    ("what", "memory", "expected"),
    [
        ("drafts", "6GB", ["--model", "a b"]),
        ("experts", "", ["--model", "a b", "--experts", "--maps"]),
        ("experts", "6GB", ["--model", "a b", "--experts", "--maps", "--memory", "6GB"]),
    ],
)
def test_it_is_told_what_to_train(what: Any, memory: str, expected: list[str]):
    training = scripted("say(result=json.dumps(sys.argv[1:]))")
    training.start("a b", what, memory)
    assert ended(training).message == str(expected).replace("'", '"')


def test_it_ends_with_the_app():
    """However that ends."""
    body = "import os\nsay(message=str(os.getpid()))\nwait_for_end()"
    app = f"""
import os, time
from tests.test_app_training import scripted
training = scripted({body!r})
training.start("a", "drafts")
while not training.state.message.isdigit():
    time.sleep(0.01)
print(training.state.message, flush=True)
os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", app], cwd=ROOT, capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


# The command that it runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=5)


def test_the_real_command_trains_and_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    options = ["--prompts", str(prompts), "--depth", "2", "--rank", "4", "--draft-vocab", "64", "--max-tokens", "16",
               "--max-prompt", "32", "--held-out", "4", "--threads", "1"]  # fmt: skip
    command = (sys.executable, "-m", "engine.cli", "tune", "--background", *options)
    long = Training((*command, "--tokens", "400", "--steps", "100000"))
    long.start(str(model), "drafts")
    wait_until(lambda: "Training" in long.state.message, 120)
    assert long._process is not None and psutil.Process(long._process.pid).nice() == max(
        10, psutil.Process().nice()
    )
    long.stop()
    assert ended(long, 60).stage == "stopped"
    short = Training((*command, "--tokens", "400", "--steps", "5"))
    short.start(str(model), "drafts")
    state = ended(short, 120)
    assert state.stage == "done" and state.message.endswith("of first drafts are right.")
    session = Session.load(str(model), "int4")
    assert "m2r2" in session.methods() and session.trainable() is None
    session.close()
    broken = Training((*command, "--tokens", "400", "--steps", "0"))
    broken.start(str(model), "drafts")
    state = ended(broken, 120)
    assert state.stage == "failed" and state.message == "The number of steps must be at least 1, not 0."


def test_what_a_model_lacks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    session = Session.load(str(model), "int4")
    assert session.trainable() == "drafts"
    session.close()


# The panel


def panel(session: FakeSession, training: Training) -> TrainingPanel:
    with gr.Blocks():
        return TrainingPanel(ready_host(session), training)


def shown(panel: TrainingPanel) -> tuple[bool, str, str | None, bool]:
    """Is it there, its text, the button, and does it look again?"""
    frame, text, button, timer = panel.shown()
    return frame.visible, text, getattr(button, "value", None), timer.active


def test_a_model_that_lacks_nothing_has_no_panel():
    visible, text, _, active = shown(panel(FakeSession(), Training()))
    assert not visible and not text and not active


@pytest.mark.parametrize(("what", "words"), [("drafts", "draft for itself"), ("experts", "experts")])
def test_the_panel_says_what_it_brings_and_how_long_it_takes(what: Any, words: str):
    visible, text, button, active = shown(panel(FakeSession(trainable=what), Training()))
    assert visible and words in text and "stopped at any time" in text and button == "Train" and not active


def test_the_panel_from_start_to_use():
    session = FakeSession(trainable="drafts")
    training = scripted("say(message='On the way.', share=0.5)\nwait_for_end()\nsay(result='60% are right.')")
    made = panel(session, training)
    begun, *_ = made._on_click()
    assert not begun and training.state.source == "fake"
    wait_until(lambda: training.state.share == 0.5)
    visible, text, button, active = shown(made)
    assert visible and "On the way." in text and "50%" in text and button == "Stop training" and active
    made._on_click()
    ended(training)
    visible, text, button, active = shown(made)
    assert visible and "60% are right." in text and button == "Use it now" and not active
    begun, *_ = made._on_click()
    assert begun
    wait_until(lambda: made._host.state.stage == "ready" and session.closed)  # loaded anew


def test_what_went_wrong_is_told_and_can_be_tried_again():
    made = panel(FakeSession(trainable="drafts"), scripted("say(error='The disk is <full>.')"))
    made._on_click()
    ended(made._training)
    _, text, button, _ = shown(made)
    assert "The disk is &lt;full&gt;." in text and button == "Train"


def test_another_model_has_nothing_to_do_with_it():
    made = panel(FakeSession(trainable="drafts"), scripted("say(result='60% are right.')"))
    made._on_click()
    ended(made._training)
    made._host.choice = ModelChoice("another")
    _, text, button, _ = shown(made)
    assert "60%" not in text and button == "Train"
