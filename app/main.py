"""The app's process: the model loads in the background while the page comes up."""

from __future__ import annotations

import argparse
import gc
import logging
import logging.handlers
import os
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING, Any

from app.startup import ADDRESS, DEFAULT_PORT
from engine import paths
from engine.errors import InvalidRequestError
from engine.formats import choosable_formats

if TYPE_CHECKING:
    from app.engine_host import ModelChoice

_log = logging.getLogger(__name__)
_LOG_BYTES = 2_000_000


def main(argv: list[str]) -> int:
    """Serve the app until it is interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python launch.py")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", DEFAULT_PORT)))
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--model", help="a hub repository, a folder or a .gguf file")
    parser.add_argument("--format", help=f"weight format: {', '.join(('auto', *choosable_formats()))}")
    parser.add_argument("--memory", help="what a mixture-of-experts model may take, such as 6GB")
    options = parser.parse_args(argv)
    in_space = bool(os.environ.get("SPACE_ID"))
    _write_log()
    gc.disable()  # until the model is loaded: imports make many objects and no garbage

    # Before gradio is imported: it looks at these then.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    from app.engine_host import EngineHost, ModelChoice
    from app.preferences import PreferenceFile
    from app.quick_imports import import_gradio, import_torch
    from engine.hub import DEFAULT_MODEL

    preferences = PreferenceFile(None if in_space else paths.data_dir() / "settings.json")
    saved = preferences.value
    import_torch()  # before the loading, not beside it: two imports at once take longer than one after the other
    choice = ModelChoice(
        options.model or saved.model or DEFAULT_MODEL,
        options.format or saved.weight_format,
        saved.memory if options.memory is None else options.memory,
    )
    try:
        if options.memory is not None:
            choice.memory_bytes()
    except InvalidRequestError as error:
        print(error, file=sys.stderr)
        return 1
    host = EngineHost(_load_session, choice)
    host.start()
    import_gradio()

    import uvicorn

    from app.page import build_blocks
    from app.server import build_app

    app = build_app(build_blocks(host, preferences, private=not in_space), local_only=not in_space)
    address = "0.0.0.0" if in_space else ADDRESS
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=address,
            port=options.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )
    url = f"http://{ADDRESS}:{options.port}"
    announced = threading.Thread(
        target=_announce, args=(server, url, not (in_space or options.no_browser)), daemon=True
    )
    announced.start()
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        host.close()
    return 0 if server.started else 1


def _load_session(choice: ModelChoice, on_progress: Any, cancel: threading.Event) -> Any:
    try:
        from engine.session import Session

        return Session.load(
            choice.source, choice.weight_format, on_progress=on_progress, cancel=cancel,
            memory=choice.memory_bytes(),
        )  # fmt: skip
    finally:
        gc.enable()


def _announce(server: Any, url: str, open_browser: bool) -> None:
    """Say where the page is once it answers."""
    pause = threading.Event()
    while not server.started:
        if server.should_exit:
            return
        pause.wait(0.05)
    print(f"Slipstream is at {url} (Ctrl+C ends it).", flush=True)
    if open_browser:
        webbrowser.open(url)


def _write_log() -> None:
    """Full detail goes to a file; the console stays for people."""
    handlers: list[logging.Handler] = []
    try:
        paths.log_dir().mkdir(parents=True, exist_ok=True)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                paths.log_dir() / "slipstream.log", maxBytes=_LOG_BYTES, backupCount=2, encoding="utf-8"
            )
        )
    except OSError:
        handlers.append(logging.StreamHandler())  # nowhere to write: rather on the console than nowhere
    logging.basicConfig(
        level=logging.INFO, handlers=handlers, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.captureWarnings(True)
