"""Model repositories on the Hugging Face hub: which of their files are needed, and where they lie here.

Downloads go to Slipstream's own models folder, since huggingface_hub starts a broken download over and
we continue it; what the hub's own cache already holds is used where it lies. Only tensors, JSON and
tokenizer files are ever fetched: no pickles, no code.
"""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from engine import paths
from engine.download import RemoteFile, download
from engine.errors import DownloadError, ModelFileError
from engine.progress import Progress, ProgressMeter
from engine.web import cannot_reach, read_url

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "model.safetensors.index.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Of several GGUF files, the first of these kinds: four bits, without requantizing where possible.
GGUF_PREFERENCE = ("q4_1", "q4_0", "q4_k_m", "q4_k_s", "q4_k", "q5", "q6_k", "q8_0", "bf16", "f16", "f32")
READY_FILE = ".ready.json"  # written last: lists the files and sizes of a complete download


@dataclass(frozen=True)
class HubModel:
    """``owner/name``, ``owner/name/file.gguf``, either with ``@revision``."""

    repository: str
    file: str | None = None
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubModel | None:
        """None if ``text`` is not of that form."""
        word = r"[A-Za-z0-9][\w.-]*"
        match = re.fullmatch(rf"({word}/{word})(?:/([\w./-]+\.gguf))?(?:@([\w./-]+))?", text)
        if match is None or (match[2] is None and match[1].lower().endswith(".gguf")) or ".." in text:
            return None
        return cls(match[1], match[2], match[3] or "main")

    @property
    def folder(self) -> Path:
        """Where our own download of it lies."""
        name = self.repository.replace("/", "--")
        if self.revision != "main":
            name += "@" + self.revision.replace("/", "--")
        return paths.models_dir() / "hub" / name

    def __str__(self) -> str:
        name = f"{self.repository}/{self.file}" if self.file else self.repository
        return name if self.revision == "main" else f"{name}@{self.revision}"


def endpoint() -> str:
    """The hub's address; ``HF_ENDPOINT`` names a mirror."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """The hub library's own cache."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"


def find_downloaded(model: HubModel) -> Path | None:
    """The complete local copy (a folder, or the GGUF file), ours or in the hub's cache; None if none."""
    ready = model.folder / READY_FILE
    if ready.is_file():
        listed = json.loads(ready.read_text(encoding="utf-8"))
        path = model.folder / listed["path"]
        wanted = model.file in (None, listed["path"])
        if wanted and all(_has_size(model.folder / name, size) for name, size in listed["files"].items()):
            return path
    return _find_in_hub_cache(model)


def list_downloaded() -> list[HubModel]:
    """Every complete copy, by name."""
    names = {folder.name for folder in (paths.models_dir() / "hub").glob("*--*") if folder.is_dir()}
    names |= {folder.name[len("models--") :] for folder in hub_cache().glob("models--*--*")}
    models = (HubModel.parse(re.sub(r"^([^@]*?)--", r"\1/", name, count=1)) for name in sorted(names))
    return [model for model in models if model is not None and find_downloaded(model) is not None]


def fetch(
    model: HubModel, on_progress: Callable[[Progress], None] | None, cancel: threading.Event | None
) -> Path:
    """Download what is needed to run ``model``; returns its folder or GGUF file.

    Raises:
        ModelFileError: it has no weights that may be loaded.
        DownloadError: see :func:`engine.download.download`.
    """
    if is_offline():
        raise DownloadError(
            f"{model} is not on this machine and HF_HUB_OFFLINE is set; unset it to download."
        )
    commit, files = _list_files(model)
    chosen = [file for file in files if file.name in choose_files((f.name for f in files), model)]
    # A commit's address never changes content, so all files belong together whatever is pushed meanwhile.
    meter = ProgressMeter(str(model), sum(file.size for file in chosen), on_progress)
    for file in sorted(chosen, key=lambda file: file.size):
        path = urllib.parse.quote(f"{model.repository}/resolve/{commit}/{file.name}")
        url = f"{endpoint()}/{path}"
        remote = RemoteFile(url, file.size, file.digest, file.digest_kind, _login())
        target = model.folder / file.name
        if target.exists() and not _has_size(target, file.size):
            target.unlink()  # of an older commit
        download(remote, target, meter, cancel)
    gguf = next((file.name for file in chosen if file.name.endswith(".gguf")), "")
    listed = {"repository": model.repository, "commit": commit, "path": gguf}
    listed_files = {file.name: file.size for file in chosen}
    ready = model.folder / READY_FILE
    partial = ready.with_suffix(".partial")
    partial.write_text(json.dumps({**listed, "files": listed_files}, indent=1), encoding="utf-8")
    os.replace(partial, ready)
    return model.folder / gguf


@dataclass(frozen=True)
class Offer:
    """A model on the hub, before it is downloaded.

    Attributes:
        config: of its config.json; None: it is a GGUF file, which holds its shapes itself.
        size: bytes to download.
    """

    config: dict[str, Any] | None
    size: int


def look_up(model: HubModel) -> Offer:
    """What the hub says of ``model``: the list of its files and config.json, a few kilobytes.

    Raises:
        ModelFileError: it has no weights that may be loaded.
        DownloadError: the hub is out of reach, or does not hand it out.
    """
    if is_offline():
        raise DownloadError("HF_HUB_OFFLINE forbids asking the hub about it; unset it to ask.")
    commit, files = _list_files(model)
    names = choose_files((file.name for file in files), model)
    size = sum(file.size for file in files if file.name in names)
    if "config.json" not in names:
        return Offer(None, size)
    url = f"{endpoint()}/{urllib.parse.quote(f'{model.repository}/resolve/{commit}/config.json')}"
    try:
        config = json.loads(read_url(url, private_headers=_login())[0])
    except (urllib.error.HTTPError, ValueError) as error:
        raise DownloadError(
            f"The hub does not deliver the description of {model} ({error}); try again later."
        ) from error
    if not isinstance(config, dict):
        raise ModelFileError(f"The config.json of {model} is damaged; choose another model.")
    return Offer(config, size)


def choose_files(names: Iterable[str], model: HubModel) -> set[str]:
    """The names that are needed to run ``model``: one set of safetensors with config and tokenizer, else
    one GGUF file.

    Raises:
        ModelFileError: there is nothing to run, or only pickles.
    """
    # Top level only; and a name must not lead out of the folder, whatever the server lists.
    names = [name for name in names if re.fullmatch(r"\w[\w.+-]*", name) or name == model.file]
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if model.file is not None:
        if model.file not in ggufs:
            offered = f"; it offers {', '.join(sorted(ggufs)[:12])}" if ggufs else ""
            raise ModelFileError(f"{model.repository} has no file {model.file}{offered}.")
        return {model.file}
    tensors = [name for name in names if name.endswith(".safetensors")]
    shards = [name for name in tensors if re.search(r"model-\d+-of-\d+\.safetensors$", name)]
    weights = ["model.safetensors"] if "model.safetensors" in tensors else shards
    if weights and "config.json" in names:
        side = {name for name in names if any(fnmatch(name, pattern) for pattern in SIDE_FILES)}
        return {*weights, *side} - ({"model.safetensors.index.json"} if len(weights) == 1 else set())
    for kind in GGUF_PREFERENCE:
        for name in sorted(ggufs):
            if kind in name.lower() and not re.search(r"-\d+-of-\d+\.gguf$", name):
                return {name}
    if any(fnmatch(name, pattern) for name in names for pattern in PICKLES):
        raise ModelFileError(
            f"{model.repository} only has pickled weights, which can run code and are never loaded; "
            "choose a model with .safetensors or .gguf files."
        )
    raise ModelFileError(f"{model.repository} holds no weights in a known form (.safetensors or .gguf).")


def folder_problem(folder: Path) -> str | None:
    """Why a folder is not a complete model, as a sentence; None if it is one (by names, not by content)."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json; choose a folder that holds a model, or a .gguf file."
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return f"{index} cannot be read; download the model again."
        missing = sorted(name for name in needed if not (folder / name).is_file())
        return f"{folder} lacks {', '.join(missing)}; download the model again." if missing else None
    if any(folder.glob("*.safetensors")):
        return None
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} only has pickled weights, which can run code and are never loaded; "
            "choose a model with .safetensors or .gguf files."
        )
    return f"{folder} holds no .safetensors files; download the model again."


@dataclass(frozen=True)
class _ListedFile:
    name: str
    size: int
    digest: str
    digest_kind: str


def _list_files(model: HubModel) -> tuple[str, list[_ListedFile]]:
    """The commit that the revision stands for, and its files."""
    revision = urllib.parse.quote(model.revision, safe="")
    url = f"{endpoint()}/api/models/{model.repository}/revision/{revision}?blobs=true"
    try:
        answer = json.loads(read_url(url, private_headers=_login())[0])
        commit, siblings = answer["sha"], answer["siblings"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise DownloadError(
                f"The hub does not hand out {model}: check the name, or, if it is private or asks to accept "
                "terms, do so on its page and log in with `hf auth login`."
            ) from error
        raise DownloadError(f"The hub answers with an error (HTTP {error.code}); try again later.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise cannot_reach(url, "something else answers in its place") from error
    files = []
    for file in siblings:
        lfs = file.get("lfs")
        digest, kind = (lfs["sha256"], "sha256") if lfs else (file.get("blobId", ""), "git-sha1")
        files.append(
            _ListedFile(file["rfilename"], lfs["size"] if lfs else file.get("size", 0), digest, kind)
        )
    return commit, files


def _login() -> dict[str, str]:
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _find_in_hub_cache(model: HubModel) -> Path | None:
    folder = hub_cache() / f"models--{model.repository.replace('/', '--')}"
    reference = folder / "refs" / model.revision
    commit = reference.read_text().strip() if reference.is_file() else model.revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    if model.file is not None:
        return snapshot / model.file if (snapshot / model.file).is_file() else None
    if folder_problem(snapshot) is None:
        return snapshot
    ggufs = sorted(snapshot.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
