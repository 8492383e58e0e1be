"""How the page looks: system fonts, one accent colour, light and dark from the system's setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).parent / "static"
_SHEETS = ("slipstream.css", "compare.css", "experts.css")
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> Any:
    """Neutral surfaces; everything else is in ``static/slipstream.css``."""
    return gr.themes.Base(
        primary_hue="zinc", secondary_hue="zinc", neutral_hue="zinc",  # the accent is not for controls
        font=list(_SANS), font_mono=list(_MONO), text_size="md", radius_size="md",
    ).set(
        body_background_fill="white",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="*neutral_500",
        slider_color_dark="*neutral_300",
        block_border_width="0px",
        block_shadow="none",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_border_color="*border_color_primary",
        button_border_width="1px",
    )  # fmt: skip


def css() -> str:
    """The page's own style sheets."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in _SHEETS)
