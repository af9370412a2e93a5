"""Which parts of an open_clip model are the two towers that pictures and classes pass through."""

from __future__ import annotations

from typing import Literal

Towers = Literal["both", "image"]


def in_towers(name: str, towers: Towers) -> bool:
    """Whether a parameter or layer belongs to the towers that learn. CoCa's caption decoder is in neither."""
    return name.startswith("visual.") or (towers == "both" and not name.startswith("text_decoder."))
