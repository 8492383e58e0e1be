"""The web server around the page: who may talk to it, and what it may load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from app import __version__
from app.startup import HEALTH

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
# The page needs nothing but itself. A model's answer might name an image on the network: never fetched.
_CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
_ICON = Path(__file__).resolve().parents[1] / "assets" / "icons" / "slipstream.png"


class LocalOnly:
    """Answers this machine's own page alone.

    Any web page can make a browser send requests to 127.0.0.1, and a name on the network can be made to
    point there; so the Host must be local, and the Origin, where there is one, the page's own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if scope["type"] != "http" or not allowed(headers.get("host", ""), headers.get("origin")):
            refusal = PlainTextResponse("Slipstream answers its own page on this machine only.", 403)
            await refusal(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def allowed(host: str, origin: str | None) -> bool:
    """Whether a request with these headers comes from this machine's own page (or from no page)."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() not in _LOCAL_NAMES:
        return False
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def build_app(blocks: Any, local_only: bool) -> FastAPI:
    """The page and the health check as one ASGI application.

    Args:
        local_only: off in a Space, whose visitors come from elsewhere.
    """
    import gradio as gr

    from app.provenance import script
    from app.theme import css, theme

    app = FastAPI(title="Slipstream", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(HEALTH)
    def health() -> dict[str, str]:
        return {"app": "slipstream", "version": __version__}

    if local_only:
        app.add_middleware(LocalOnly)
    mounted = gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, theme=theme(), css=css(), head=script(),
        show_error=False, favicon_path=str(_ICON), max_file_size=0, ssr_mode=False, enable_monitoring=False,
        pwa=False, mcp_server=False,
    )  # fmt: skip
    _calm(blocks._queue)
    return mounted


def _calm(queue: Any) -> None:
    """Let gradio look into its queue as often as it does on Windows: elsewhere a thousand times a second,
    which takes 5 % of a core from an idle machine and from the engine."""
    queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.03, 0.1
