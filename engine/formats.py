"""Weight formats that a person may choose on this machine, told without torch while no model is loaded."""

from __future__ import annotations

from importlib.util import find_spec

# All of WEIGHT_FORMATS but fp64, which is for tests.
_OURS = ("int4", "int8", "bf16", "fp32")
_BITSANDBYTES = ("nf4", "bnb_int8")


def choosable_formats(device: str | None = None) -> tuple[str, ...]:
    """Names of ``WEIGHT_FORMATS`` that can be used here, ours first.

    Args:
        device: of the loaded model; each format is asked about it. None while there is none: then only
            the packages are looked for, which imports nothing.
    """
    if device is None:
        return (*_OURS, *(_BITSANDBYTES if find_spec("bitsandbytes") else ()))
    import torch

    from engine.quantization import WEIGHT_FORMATS

    target = torch.device(device)
    return tuple(
        name for name in (*_OURS, *_BITSANDBYTES) if WEIGHT_FORMATS[name].unavailable(target) is None
    )
