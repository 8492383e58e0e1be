"""Gradio's import, without the half of it that is for people who write components.

At every import gradio parses the source of each of its 80 components to write type stubs beside them. It
leaves out classes whose file ``inspect`` cannot tell, so for the time of the import it cannot.
"""

from __future__ import annotations

import inspect
from typing import Any


def import_gradio() -> None:
    """Import gradio; call it before anything else does."""
    getfile = inspect.getfile

    def no_component_file(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stubs are wanted")
        return getfile(thing)

    inspect.getfile = no_component_file  # type: ignore[assignment]
    try:
        import gradio  # noqa: F401
    finally:
        inspect.getfile = getfile
