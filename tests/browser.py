"""The real app in a process of its own, and a headless Chromium to look at it: what browser tests share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "tests" / "screenshots"  # git ignores them
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 380, "height": 780}


@contextmanager
def app_process(home: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run the app as a user does, with ``home`` for settings and chats; yields its address. Models and
    compiled kernels of this machine are shared, so that neither is fetched or built again.

    Args:
        arguments: options of ``python launch.py run``, such as ``--model`` and ``--format``.
        environment: more environment variables. With GRADIO_SERVER_PORT among them (a Space has it), no
            port is named on the command line.
    """
    share_caches(home)
    variables = {**os.environ, **(environment or {}), "SLIPSTREAM_HOME": str(home)}
    command = [sys.executable, str(ROOT / "launch.py")]
    if "GRADIO_SERVER_PORT" in variables:
        port = int(variables["GRADIO_SERVER_PORT"])
    else:
        port = free_port()
        command += ["run", "--port", str(port), "--no-browser"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips the test where there is none."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Any, url: str, viewport: dict[str, int] = DESKTOP, dark: bool = False
) -> Iterator[Any]:
    """A page of a fresh visitor, with the app in it.

    Attributes:
        errors: is set on the page: messages of its console's errors and uncaught exceptions.
    """
    context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda entry: page.errors.append(entry.text) if entry.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#composer textarea")
    try:
        yield page
    finally:
        context.close()


def share_caches(home: Path) -> None:
    """Let an app with this home use the models and compiled kernels of this machine."""
    from engine import paths

    cache = home / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for folder in ("models", "kernels"):
        real = paths.cache_dir() / folder
        real.mkdir(parents=True, exist_ok=True)
        if not (cache / folder).exists():
            (cache / folder).symlink_to(real, target_is_directory=True)


def screenshot(page: Any, name: str) -> Path:
    """Keep what the page shows as ``tests/screenshots/NAME.png``."""
    SCREENSHOTS.mkdir(exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=str(path))
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 90.0) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"The app ended with status {process.returncode} before it answered.")
        try:
            with direct.open(url + "/slipstream/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("The app did not answer in time.")
