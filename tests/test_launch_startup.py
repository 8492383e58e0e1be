"""One instance at a time, a free port, and the menu entry."""

from __future__ import annotations

import configparser
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import serve

from app import shortcut, startup
from engine import hub
from engine.errors import DownloadError
from engine.progress import Progress

ROOT = Path(startup.__file__).parent.parent


@pytest.fixture
def ran(slipstream_home: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every start of the app, which does not really start; the model is there."""
    calls: list[list[str]] = []

    def run(argv: list[str]) -> int:
        calls.append(argv)
        return 0

    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setattr(startup, "_run_app", run)
    monkeypatch.setattr(hub, "is_ready", lambda source: True)
    return calls


def listen() -> socket.socket:
    taken = socket.socket()
    taken.bind((startup.ADDRESS, 0))
    taken.listen()
    return taken


def test_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen() as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(startup, "DEFAULT_PORT", port)
        assert not startup.port_is_free(port)
        found = startup.find_port()
        assert found != port and startup.port_is_free(found)
        monkeypatch.setattr(startup, "PORTS_TO_TRY", 1)
        assert startup.find_port() not in (0, port)


def test_the_app_gets_port_model_and_its_own_options(ran: list[list[str]]) -> None:
    assert startup.start(["--model", "a/b", "--no-browser", "--theme", "dark"]) == 0
    (arguments,) = ran
    assert int(arguments[arguments.index("--port") + 1]) > 0
    assert arguments[2:] == ["--theme", "dark", "--no-browser", "--model", "a/b"]


def test_a_port_asked_for_is_not_replaced(ran: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with listen() as taken:
        assert startup.start(["--port", str(taken.getsockname()[1])]) == 1
    assert "is taken" in capsys.readouterr().err and ran == []


def test_the_second_start_opens_the_first(
    slipstream_home: Path, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(startup.webbrowser, "open", opened.append)
    with serve() as server:
        answer = json.dumps({"app": "slipstream", "version": "0"}).encode()
        server.pages[startup.HEALTH] = ("application/json", answer)
        port = server.url.rpartition(":")[2]
        script = (
            "import sys; from app import startup; from engine import hub\n"
            "hub.is_ready = lambda source: True\n"
            f"startup.port_is_free = lambda port: True\n"
            "startup._run_app = lambda argv: print('up', flush=True) or sys.stdin.read() and 0\n"
            f"startup.start(['--port', '{port}', '--no-browser'])\n"
        )
        command = [sys.executable, "-c", script]
        first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert first.stdout is not None and first.stdout.readline() == b"up\n"
        assert startup.start([]) == 0
        assert opened == [server.url] and ran == []
        assert startup.start(["--no-browser"]) == 0
        assert opened == [server.url]
        first.kill()  # what it leaves behind must not keep anyone from starting
        first.communicate()
        assert startup.start([]) == 0
    assert len(ran) == 1


def test_something_else_on_the_port_is_not_slipstream() -> None:
    with serve() as server:
        assert not startup.answers(server.url)
        server.pages[startup.HEALTH] = ("text/html", b"<html>")
        assert not startup.answers(server.url)
        server.pages[startup.HEALTH] = ("application/json", b"[]")
        assert not startup.answers(server.url)


def test_the_model_is_fetched_first_and_a_failure_does_not_end_it(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(source: str, on_progress: object) -> None:
        assert ran == []
        raise DownloadError("The network is down.")

    monkeypatch.setattr(hub, "is_ready", lambda source: False)
    monkeypatch.setattr(hub, "resolve", fetch)
    assert startup.start([]) == 0
    assert "The network is down." in capsys.readouterr().err
    assert len(ran) == 1


def test_a_space_starts_without_looking_for_others(
    ran: list[list[str]], slipstream_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/slipstream")
    startup.start([])
    assert ran == [[]] and not slipstream_home.exists()


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = startup.console_progress()
    for done in range(1001):
        show(Progress("download", done, 1000, None, False, f"{done} of 1000"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[-1] == "1000 of 1000"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="menu entries of this kind are Linux's")
def test_the_menu_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert shortcut.main([]) == 0
    entry = tmp_path / "applications" / "slipstream.desktop"
    parser = configparser.RawConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(entry)
    fields = parser["Desktop Entry"]
    assert shlex.split(fields["Exec"]) == [sys.executable, str(ROOT / "launch.py")]
    assert Path(fields["Icon"]).is_file() and fields["Type"] == "Application"
    assert "@" not in entry.read_text()
    assert shortcut.main(["--remove"]) == 0 and not entry.exists()


def test_odd_folders_are_quoted() -> None:
    text = shortcut.render(Path("/home/an n/50% $off"), "/usr/bin/python3")
    assert r'Exec="/usr/bin/python3" "/home/an n/50%% \\$off/launch.py"' in text
