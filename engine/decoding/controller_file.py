"""What a depth controller has learnt, kept per model, weight format and machine, so that the next start knows it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from engine.atomic import replacing
from engine.decoding.controller import DepthController
from engine.hardware import machine
from engine.models.stepper import Stepper
from engine.paths import cache_dir
from engine.residuals.adapter_file import fingerprint

log = logging.getLogger(__name__)


def controller_path(stepper: Stepper, adapter: Path, method: str) -> Path:
    """Where that of a decoding method is kept: a name for everything that its measurements depend on."""
    decoder, here = stepper.decoder, machine()
    facts = (
        fingerprint(decoder), type(decoder.layers[0].qkv).__name__, str(decoder.dtype), stepper.name,
        getattr(stepper, "num_threads", None), here.cpu, decoder.device.type, adapter.stat().st_mtime_ns,
        method,
    )  # fmt: skip
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return cache_dir() / "speculation" / f"{name}.json"


def load_controller(path: Path) -> DepthController:
    """The controller of earlier answers; a new one where there is none, or none that can be read."""
    controller = DepthController()
    try:
        if not controller.restore(json.loads(path.read_text(encoding="utf-8"))):
            log.warning("%s is damaged or of another version; drafting is measured anew.", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        log.warning("%s cannot be read; drafting is measured anew.", path, exc_info=True)
    return controller


def save_controller(path: Path, controller: DepthController) -> None:
    """Keep it, atomically; a disk that is full is logged and no more: it only costs measuring again."""
    try:
        with replacing(path) as file:
            file.write(json.dumps(controller.export()).encode())
    except OSError:
        log.warning("What was learnt about drafting could not be kept.", exc_info=True)
