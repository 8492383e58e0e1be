"""A mixture-of-experts model's experts as one small picture: a cell each, layers along the shorter side.

A full square is an expert in memory, a dot one that is not; the stronger, the more often it was chosen. That is
told by shape and strength alone, so it needs no colour, and the page turns black into white where it is dark. One
picture instead of a cell's element each keeps the page quick: 48 layers of 128 experts are 6144 cells.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from engine.experts.report import ExpertReport

_MAX_WIDTH, _MAX_HEIGHT, _MAX_CELL = 768, 192, 12  # pixels
_LEVELS = 15  # of strength, beside nothing: four bits a pixel
_FAINTEST = 4  # still to be seen on white


def layers_across(report: ExpertReport) -> bool:
    """Whether layers go from left to right, experts from top to bottom: the longer side lies."""
    return len(report.layers) > len(report.resident[0])


def cell_size(columns: int, rows: int) -> int:
    """Pixels of a cell's side."""
    return max(3, min(_MAX_CELL, _MAX_WIDTH // columns, _MAX_HEIGHT // rows))


def heat_map(report: ExpertReport) -> tuple[str, int, int]:
    """The picture as a data address, and its width and height in pixels."""
    pixels = _draw(report)
    height, width = pixels.shape
    png = base64.b64encode(_encode(pixels)).decode()
    return f"data:image/png;base64,{png}", width, height


def _draw(report: ExpertReport) -> np.ndarray:
    """Levels of strength, ``[height, width]`` uint8."""
    import numpy as np

    resident, uses = np.array(report.resident, bool), np.array(report.uses, float)
    if layers_across(report):
        resident, uses = resident.T, uses.T
    rows, columns = resident.shape
    side = cell_size(columns, rows)
    full = side - max(1, side // 6)  # the rest is the gap to the next cell
    dot = max(1, full // 3)
    dot += (full - dot) % 2  # in the middle
    dot = min(dot, full - 1)
    # The root lifts what is chosen seldom: a few experts are chosen far more often than the others.
    share = np.sqrt(uses / max(1.0, uses.max()))
    levels = (_FAINTEST + np.rint((_LEVELS - _FAINTEST) * share)).astype(np.uint8)
    cells = np.zeros((rows, side, columns, side), np.uint8)
    inner = slice((full - dot) // 2, (full - dot) // 2 + dot)
    cells[:, inner, :, inner] = levels[:, None, :, None]
    cells[:, :full, :, :full] = np.where(
        resident[:, None, :, None], levels[:, None, :, None], cells[:, :full, :, :full]
    )
    return cells.reshape(rows * side, columns * side)


def _encode(pixels: np.ndarray) -> bytes:
    """As PNG: black, with the level as opacity."""
    import numpy as np

    height, width = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, width % 2)))
    packed = (even[:, ::2] << 4) | even[:, 1::2]
    lines = np.pad(packed, ((0, 0), (1, 0)))  # each line begins with its filter: none
    opacity = bytes(math.floor(255 * level / _LEVELS) for level in range(_LEVELS + 1))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(3 * len(opacity))),
            _chunk(b"tRNS", opacity),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
