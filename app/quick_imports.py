"""Heavy packages without the parts that the app has no use of: half of a start is imports."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


def import_torch() -> None:
    """Import torch; call it before anything else does.

    The shapes of operators on tensors without data are a third of the import. Whoever makes such tensors
    asks for something in ``torch._meta_registrations`` first.
    """
    sys.modules.setdefault("torch._meta_registrations", _Later("torch._meta_registrations"))
    import torch
    import torch._prims.rng_prims  # noqa: F401  (torch.Generator needs it)


def import_gradio() -> None:
    """Import gradio; call it before anything else does.

    Pandas is imported when a table is shown. And at every import gradio parses the source of each of its 80
    components to write type stubs beside them; it leaves out classes whose file ``inspect`` cannot tell, so
    for the time of the import it cannot.
    """
    getfile = inspect.getfile

    def no_component_file(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stubs are wanted")
        return getfile(thing)

    inspect.getfile = no_component_file  # type: ignore[assignment]
    pandas = _Later("pandas")
    sys.modules.setdefault("pandas", pandas)
    try:
        import gradio  # noqa: F401
    finally:
        inspect.getfile = getfile
        if sys.modules.get("pandas") is pandas:  # who imports it from here on has use for it
            del sys.modules["pandas"]


class _Later(ModuleType):
    """Stands for a module until something in it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
