"""Memory that Python and native code share."""

from __future__ import annotations

from typing import Any

import numpy as np


def address(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """Where an array begins; sooner than by ``ctypes``."""
    found: int = array.__array_interface__["data"][0]
    return found


def numbers(array: np.ndarray[Any, np.dtype[Any]]) -> Any:
    """An array to read and write a number at a time: for a few of them numpy takes longer."""
    return array.data
