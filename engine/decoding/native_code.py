"""Native code where this machine can have it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

_log = logging.getLogger(__name__)
_Code = TypeVar("_Code")


def native_or_none(load: Callable[[], _Code], instead: str) -> _Code | None:
    """What ``load`` gives; None where there is no compiler, or it fails.

    Args:
        instead: what is done then, for the log.
    """
    if not find_spec("numba"):
        return None
    try:
        return load()
    except Exception:  # an LLVM or cache problem must not keep anyone from chatting
        _log.exception(instead)
        return None
