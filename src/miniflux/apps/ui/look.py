"""Colours, letters and corners, for Gradio's controls; `page.css` has the rest, with the same names of colours."""

from __future__ import annotations

import inspect
from typing import Any

from gradio import themes

LETTERS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
NUMBERS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
"""Fonts that people have; none is fetched."""


def theme() -> themes.Base:
    """Gradio's plainest theme, in the colours of `page.css`."""
    both: dict[str, Any] = {
        "body_background_fill": "var(--mf-paper)",
        "body_text_color": "var(--mf-ink)",
        "body_text_color_subdued": "var(--mf-soft)",
        "background_fill_primary": "var(--mf-card)",
        "background_fill_secondary": "var(--mf-paper)",
        "border_color_primary": "var(--mf-line)",
        "border_color_accent": "var(--mf-accent)",
        "block_background_fill": "transparent",
        "block_border_color": "transparent",
        "block_info_text_color": "var(--mf-soft)",
        "block_label_background_fill": "transparent",
        "block_label_border_color": "transparent",
        "block_label_text_color": "var(--mf-soft)",
        "block_title_text_color": "var(--mf-ink)",
        "panel_background_fill": "transparent",
        "panel_border_color": "transparent",
        "color_accent": "var(--mf-accent)",
        "color_accent_soft": "var(--mf-accent-soft)",
        "link_text_color": "var(--mf-accent)",
        "input_background_fill": "var(--mf-field)",
        "input_background_fill_focus": "var(--mf-field)",
        "input_border_color": "var(--mf-edge)",
        "input_border_color_focus": "var(--mf-accent)",
        "input_border_color_hover": "var(--mf-soft)",
        "input_placeholder_color": "var(--mf-soft)",
        "slider_color": "var(--mf-accent)",
        "checkbox_background_color": "var(--mf-field)",
        "checkbox_background_color_selected": "var(--mf-accent)",
        "checkbox_border_color": "var(--mf-edge)",
        "checkbox_border_color_selected": "var(--mf-accent)",
        "checkbox_border_color_focus": "var(--mf-accent)",
        "checkbox_label_background_fill": "transparent",
        "checkbox_label_background_fill_hover": "transparent",
        "checkbox_label_background_fill_selected": "transparent",
        "checkbox_label_text_color": "var(--mf-ink)",
        "checkbox_label_border_color": "transparent",
        "button_primary_background_fill": "var(--mf-accent)",
        "button_primary_background_fill_hover": "var(--mf-accent-deep)",
        "button_primary_text_color": "var(--mf-on-accent)",
        "button_primary_border_color": "transparent",
        "button_secondary_background_fill": "var(--mf-field)",
        "button_secondary_background_fill_hover": "var(--mf-accent-soft)",
        "button_secondary_text_color": "var(--mf-ink)",
        "button_secondary_border_color": "var(--mf-edge)",
        "table_text_color": "var(--mf-ink)",
        "loader_color": "var(--mf-accent)",
    }
    known = inspect.signature(themes.Base.set).parameters  # a few colours are the same in the dark
    dark = {f"{name}_dark": value for name, value in both.items() if f"{name}_dark" in known}
    sizes = themes.sizes
    base = themes.Base(
        font=LETTERS,
        font_mono=NUMBERS,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
    )
    return base.set(
        **both, **dark, block_shadow="none", input_shadow="none", block_border_width="0px", input_border_width="1px"
    )
