"""Tensors in a file that is mapped, not copied.

As safetensors (8 bytes of length, a JSON header, the data), but every tensor starts at a multiple of 64 bytes,
which the kernels' loads like, and the header carries checksums.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.atomic import replacing
from engine.mapped_files import map_file

_MAGIC = b"SLIPPACK"
_ALIGNMENT = 64


def write_packed(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``file`` whole or not at all. ``about`` is what JSON can hold.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        data = _bytes(tensor)
        entries[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
            "offset": offset, "crc32": zlib.crc32(data),
        }  # fmt: skip
        offset += -(-len(data) // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"about": dict(about), "tensors": entries, "size": offset}).encode()
    header += b" " * (-(len(header) + 16) % _ALIGNMENT)
    with replacing(file) as handle:
        handle.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            data = _bytes(tensor)
            handle.write(data)
            handle.write(bytes(-len(data) % _ALIGNMENT))


def map_packed(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``file``, mapped and compared with their checksums, and what was said about them.

    A write to one of them stays in this process.

    Raises:
        OSError: there is no such file.
        ValueError: it is not such a file, or damaged.
    """
    mapped = map_file(file, writable=True)
    if len(mapped) < 16 or mapped[:8].tobytes() != _MAGIC:
        raise ValueError(f"{file.name} holds no packed tensors")
    start = 16 + int.from_bytes(mapped[8:16].tobytes(), "little")
    try:
        header = json.loads(mapped[16:start].tobytes())
        if len(mapped) != start + header["size"]:
            raise ValueError("cut off")
        tensors = {}
        for name, entry in header["tensors"].items():
            dtype = getattr(torch, entry["dtype"])
            begin = start + entry["offset"]
            count = int(np.prod(entry["shape"])) * dtype.itemsize
            data = mapped[begin : begin + count]
            if zlib.crc32(data.data) != entry["crc32"]:
                raise ValueError(f"{name} is damaged")
            tensors[name] = torch.from_numpy(data).view(dtype).view(entry["shape"])
        return tensors, header["about"]
    except (KeyError, TypeError, AttributeError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is damaged") from error


def _bytes(tensor: Tensor) -> memoryview:
    array: np.ndarray = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return array.data
