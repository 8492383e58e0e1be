"""The same chat as a Hugging Face Space: its environment variables, its port, visitors who share nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import ROOT, app_process, free_port

pytestmark = pytest.mark.real_model

# Places of the first inputs of an answer: what was typed, the open chat, system prompt, temperature, ...
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, default_model_path: Path) -> Iterator[tuple[str, Path]]:
    """The address, and the home folder."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "SPACE_ID": "someone/slipstream", "SYSTEM": "spaces", "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SERVER_PORT": str(free_port()),
    }  # fmt: skip
    with app_process(home, environment=environment) as url:
        yield url, home


def get(url: str, host: str | None = None) -> Any:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    return _open(request)


def post(url: str, content: Any) -> Any:
    body = json.dumps(content).encode()
    return _open(urllib.request.Request(url, body, {"Content-Type": "application/json"}))


def _open(request: urllib.request.Request) -> Any:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return json.load(answer)


class Visitor:
    """A browser session, without a browser: the page's own requests."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.config = get(f"{url}/config")
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    def function(self, elem_id: str, event: str) -> dict[str, Any]:
        wanted = [self.ids[elem_id], event]
        (found,) = [f for f in self.config["dependencies"] if wanted in [list(t) for t in f["targets"]]]
        return found

    def titles(self) -> list[str]:
        """What the list of chats shows when the page is opened."""
        place = self.ids["chat-list"]
        (load,) = [
            f for f in self.config["dependencies"] if f["targets"][0][1] == "load" and place in f["outputs"]
        ]
        sent = {"data": [], "fn_index": load["id"], "session_hash": self.name}
        answer = post(f"{self.url}/gradio_api/run/predict", sent)
        return [label for label, _ in answer["data"][load["outputs"].index(place)]["choices"]]

    def ask(self, text: str) -> str:
        """The whole answer, read from the event stream as a page does."""
        submit = self.function("composer", "submit")
        values = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        data = [values.get(number) for number in submit["inputs"]]
        data[0], data[1] = text, None
        (limit,) = [i for i, number in enumerate(submit["inputs"]) if number == self.ids["max-tokens"]]
        data[limit] = 16
        join = {"data": data, "fn_index": submit["id"], "session_hash": self.name}
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        post(f"{self.url}/gradio_api/queue/join", join)
        stream = f"{self.url}/gradio_api/queue/data?session_hash={self.name}"
        told: list[str] = []
        with direct.open(stream, timeout=120) as events:
            for line in events:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                told.append(json.dumps(event))
                if event["msg"] == "process_completed":
                    assert event["success"], event
                    return "\n".join(told)
        raise AssertionError("the stream ended before the answer")


def test_it_serves_on_all_addresses_at_the_spaces_port(space: tuple[str, Path]):
    url, _ = space
    port = int(url.rpartition(":")[2])
    with socket.socket() as probe:  # 127.0.0.2 is another address of this machine
        probe.connect(("127.0.0.2", port))
    assert get(f"{url}/slipstream/health", host="someone-slipstream.hf.space")["app"] == "slipstream"


def test_it_makes_no_environment_and_keeps_no_settings(space: tuple[str, Path]):
    _, home = space
    assert not (home / "cache" / "environments").exists()
    assert not (home / "data").exists()


def test_visitors_cannot_choose_the_model(space: tuple[str, Path]):
    visitor = Visitor(space[0], "looker")
    assert "composer" in visitor.ids
    assert "model" not in visitor.ids and "load-model" not in visitor.ids


def test_it_answers_and_visitors_see_only_their_own_chats(space: tuple[str, Path]):
    url, home = space
    first, second = Visitor(url, "firstvisitor"), Visitor(url, "secondvisitor")
    told: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda visitor=visitor: told.update({visitor.name: visitor.ask(f"{QUESTION} {visitor.name}")}))
        for visitor in (first, second)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert set(told) == {"firstvisitor", "secondvisitor"}
    assert '"role": "assistant"' in told["firstvisitor"] and "secondvisitor" not in told["firstvisitor"]
    assert first.titles() == [f"{QUESTION} firstvisitor"]
    assert second.titles() == [f"{QUESTION} secondvisitor"]
    assert Visitor(url, "third").titles() == []
    assert not (home / "data").exists()


def test_it_ends_when_it_is_told_to(tmp_path: Path, default_model_path: Path):
    """A Space is stopped with SIGTERM, perhaps while it loads."""
    port = free_port()
    environment = {
        **os.environ, "SPACE_ID": "someone/slipstream", "GRADIO_SERVER_PORT": str(port),
        "SLIPSTREAM_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(default_model_path.parent, target_is_directory=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "launch.py")], cwd=ROOT, env=environment)
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                assert get(f"http://127.0.0.1:{port}/slipstream/health")["app"] == "slipstream"
                break
            except OSError:
                time.sleep(0.2)
        process.terminate()
        assert process.wait(30) in (0, -15, 143)
    finally:
        process.kill()
        process.wait()
