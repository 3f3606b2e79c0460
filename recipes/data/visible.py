"""Text of a model or of data, to be shown: nothing in it may act on what shows it."""

from __future__ import annotations

__all__ = ["visible"]


def visible(text: str, keep: str = "") -> str:
    """With everything that could move the cursor, or the reader, written out: \\n, \\x1b, marks of direction.

    Args:
        keep: characters that stay as they are, such as line breaks.
    """
    return "".join(
        c
        if c.isprintable() or c in "\u200d\ufe0f" or c in keep
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )
