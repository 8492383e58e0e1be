"""HTTP GET with the standard library: proxies, certificates, credentials, and no waiting on dead hosts."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import queue
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from engine.errors import DownloadError

FIRST_ANSWER_SECONDS = 6.0  # a blocked network is found out within this
USER_AGENT = "slipstream"


def cannot_reach(url: str, reason: object) -> DownloadError:
    """The error for a host that does not answer."""
    host = urllib.parse.urlsplit(url).hostname
    return DownloadError(f"{host} cannot be reached ({reason}); check the network, a proxy or a firewall.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows 308 as well (Python 3.10 does not) and keeps the credentials on the same host only."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, 302 if code == 308 else code, msg, headers, newurl)
        same_host = urllib.parse.urlsplit(newurl).netloc == urllib.parse.urlsplit(req.full_url).netloc
        if request is not None and same_host:
            for name, value in req.unredirected_hdrs.items():
                if name.lower() == "authorization":
                    request.add_unredirected_header(name, value)
        return request


def open_url(
    url: str,
    headers: Mapping[str, str] | None = None,
    private_headers: Mapping[str, str] | None = None,
    timeout: float = FIRST_ANSWER_SECONDS,
) -> Any:
    """GET ``url`` (http or https), honouring the proxy variables and the configured certificates.

    ``private_headers`` and credentials in the address are not passed on to other hosts.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise DownloadError(f"{parts.scheme or 'This'} addresses are not supported.")
    private = dict(private_headers or {})
    if "@" in parts.netloc:
        login, host = parts.netloc.rsplit("@", 1)
        url = parts._replace(netloc=host).geturl()
        private["Authorization"] = "Basic " + base64.b64encode(urllib.parse.unquote(login).encode()).decode()
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT, **(headers or {})})
    for name, value in private.items():
        request.add_unredirected_header(name, value)
    return _opener(_certificate_files()).open(request, timeout=timeout)


@functools.lru_cache(maxsize=4)
def _opener(certificates: tuple[str, ...]) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    for file in certificates:
        context.load_verify_locations(cafile=file)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Redirects)


def _certificate_files() -> tuple[str, ...]:
    """Beside the system's own: certifi's (some Pythons have no others) and those that pip would use."""
    files = [os.environ.get(name) for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")]
    with contextlib.suppress(ImportError):
        import certifi

        files.append(certifi.where())
    return tuple(file for file in files if file and os.path.isfile(file))


def read_url(
    url: str, headers: Mapping[str, str] | None = None, private_headers: Mapping[str, str] | None = None
) -> tuple[bytes, str, str]:
    """Body, content type and final address of a small page, within ``FIRST_ANSWER_SECONDS`` or not at all.

    Raises:
        urllib.error.HTTPError: the server answered with an error.
        DownloadError: it did not answer, or not in time (name look-up and every address included).
    """
    answer: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            with open_url(url, headers, private_headers, timeout=FIRST_ANSWER_SECONDS) as response:
                answer.put((response.read(), response.headers.get_content_type(), response.url))
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=read, name="read-url", daemon=True).start()
    try:
        result = answer.get(timeout=FIRST_ANSWER_SECONDS)
    except queue.Empty:
        raise cannot_reach(url, "no answer") from None
    if isinstance(result, urllib.error.HTTPError):
        raise result
    if isinstance(result, BaseException):
        raise cannot_reach(url, getattr(result, "reason", result)) from result
    return result
