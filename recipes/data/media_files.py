"""Files that rows name, for images, videos and features, in folders or in shards: whether they are there, and how their pictures
are shown."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from recipes.data.errors import VideoError
from recipes.data.frames import Shape, probe
from recipes.data.shards import member_at

__all__ = ["existing_file", "shape_of"]


def existing_file(name: str, folder: Path, key: str, where: str) -> Path:
    """
    Args:
        folder: that names are relative to.
        key, where: of the row that names it, for messages.

    Raises:
        VideoError: there is none.
    """
    shown = name if len(name) <= 80 else name[:77] + "..."
    try:
        path = folder / Path(name).expanduser()
        exists = path.is_file() or member_at(path) is not None
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long; ~ of an unknown user; a zero byte
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{where}: {key} {shown} is no usable file name: {reason}") from error
    if not exists:
        said = "is no file here: download it" if "://" in name or name.startswith("data:") else "does not exist"
        raise VideoError(
            f"{where}: {key} {path if len(name) <= 80 else shown} {said} (names are relative to the file of the row)"
        )
    return path


def shape_of(path: Path, where: str, largest: int) -> Shape:
    """How a film or picture is shown; rows that ask about one look at it once.

    Args:
        largest: pixels that a picture may have at most.

    Raises:
        VideoError: as of `frames.probe`.
    """
    found = None if path.exists() else member_at(path)
    status = (path if found is None else Path(found[0])).stat()
    try:
        return _probed(str(path), (status.st_size, status.st_mtime_ns), largest)
    except VideoError as error:
        raise VideoError(f"{where}: {error}") from error


@lru_cache(1 << 16)
def _probed(path: str, stamp: tuple[int, int], largest: int) -> Shape:
    return probe(path, "", largest)
