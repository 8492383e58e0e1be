"""What `python launch.py` does once the packages are there: one instance, a free port, the default model."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from engine import paths
from engine.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.progress import Progress

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 7860
PORTS_TO_TRY = 20
HEALTH = "/slipstream/health"
START_SECONDS = 120.0  # how long a second start waits for the first to answer


def start(argv: list[str]) -> int:
    """Start the app, or open the browser on the one that runs already; returns the exit status."""
    if os.environ.get("SPACE_ID"):
        return _run_app(argv)  # a Space has one process, its own port, and nobody at its console
    parser = argparse.ArgumentParser(prog="python launch.py", add_help=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--model")
    options, others = parser.parse_known_args(argv)

    instance = RunningInstance(paths.data_dir())
    if not instance.claim():
        return _join(instance, open_browser=not options.no_browser)
    port = options.port if options.port is not None else find_port()
    if options.port is not None and not port_is_free(port):
        print(f"Port {port} is taken; choose another, or leave out --port.", file=sys.stderr)
        return 1
    instance.announce(port)
    try:
        _fetch_model(options.model)
        arguments = ["--port", str(port), *others]
        arguments += ["--no-browser"] if options.no_browser else []
        arguments += ["--model", options.model] if options.model else []
        return _run_app(arguments)
    finally:
        instance.release()


class RunningInstance:
    """At most one app for each data folder. The operating system drops the lock however the process ends,
    so what it left behind cannot mislead."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self._lock = FileLock(str(folder / "instance.lock"))
        self._note = folder / "instance.json"  # the port, for others to read

    def claim(self) -> bool:
        """Become the instance; False if there is one."""
        from filelock import Timeout

        self._note.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        self._note.unlink(missing_ok=True)
        return True

    def announce(self, port: int) -> None:
        """Tell other starts where this one will answer."""
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps({"pid": os.getpid(), "port": port}))
        os.replace(partial, self._note)

    def url(self) -> str | None:
        """Where the running one answers or will answer; None if it has not said yet."""
        try:
            return f"http://{ADDRESS}:{int(json.loads(self._note.read_text())['port'])}"
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def release(self) -> None:
        """Stop being the instance."""
        self._note.unlink(missing_ok=True)
        self._lock.release()


def answers(url: str) -> bool:
    """Whether Slipstream answers there: something else might have taken the port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for 127.0.0.1
    try:
        with direct.open(url + HEALTH, timeout=2) as response:
            return json.load(response).get("app") == "slipstream"
    except (OSError, ValueError, AttributeError):
        return False


def find_port() -> int:
    """The usual port, or the next free one, or any."""
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TO_TRY):
        if port_is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    """Whether one can listen there, also where another process listens on all addresses."""
    with socket.socket() as probe:
        if os.name != "nt":  # there it would allow two listeners
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
            probe.listen(1)
        except (OSError, OverflowError):
            return False
    return True


def _join(instance: RunningInstance, open_browser: bool) -> int:
    print("Slipstream is running already.", flush=True)
    until = time.monotonic() + START_SECONDS
    url = instance.url()
    while url is None or not answers(url):
        if instance.claim():  # it has ended meanwhile
            instance.release()
            print("The other one has just ended; start again.", file=sys.stderr)
            return 1
        if time.monotonic() > until:
            print("It does not answer; end that process, then start again.", file=sys.stderr)
            return 1
        time.sleep(0.3)
        url = instance.url()
    print(f"It is at {url}", flush=True)
    if open_browser:
        webbrowser.open(url)
    return 0


def _fetch_model(source: str | None) -> None:
    """Fetch the model before the app starts, with progress here; without it the app still starts and
    says in the page what is wrong."""
    from engine import hub

    if source is not None or hub.is_ready(hub.DEFAULT_MODEL):
        return
    try:
        hub.resolve(hub.DEFAULT_MODEL, console_progress())
    except DownloadError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)


def console_progress() -> Callable[[Progress], None]:
    """A listener that keeps one line up to date on a terminal, and writes few lines elsewhere."""
    terminal = sys.stdout.isatty()
    last_tenth = -1

    def show(progress: Progress) -> None:
        nonlocal last_tenth
        share = progress.done / progress.total if progress.total else 0.0
        if terminal:
            filled = int(24 * share)
            bar = "\u2588" * filled + "\u2591" * (24 - filled)
            end = "\n" if share >= 1 else ""
            print(f"\r{bar} {progress.message}\x1b[K", end=end, flush=True)
        elif int(10 * share) != last_tenth:
            last_tenth = int(10 * share)
            print(progress.message, flush=True)

    return show


def _run_app(argv: list[str]) -> int:
    from app.main import main

    return main(argv) or 0
