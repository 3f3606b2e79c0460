"""Shards as webdataset has them: tar files whose members with one name but for its endings are a sample, a row beside its media.

    000001.json  000001.mp4  000002.json  000002.0.jpg  000002.1.jpg

The .json member is the row. A file in a shard goes by a path of its own, `train-0001.tar/000001.mp4`, and is read
where it lies; nothing is unpacked or copied.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from recipes.data.errors import DataError, VideoError
from recipes.data.jsonl import parse_json
from recipes.data.picture_ends import picture_end

__all__ = [
    "PACKED",
    "SUFFIX",
    "ShardRow",
    "find_shard",
    "media_of",
    "member_at",
    "opened",
    "read_samples",
    "sample_blocks",
    "shard_rows",
    "url_of",
]

SUFFIX = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.zst")
SAMPLES = 256  # of a block
KEPT = 1 << 20  # members of shards whose headers are kept in memory
END = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE  # bytes behind the last member are fewer
ROW = "json"
FILMS_OF_JPEG = (".mjpg", ".mjpeg")  # files that begin as a picture does
# What media are by the ends of their names, where the row names none.
KINDS = {
    "images": ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "heic", "heif", "avif"),
    "videos": ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "gif", "ts", "flv", "wmv"),
}


@dataclass(frozen=True)
class Member:
    """A file of a shard: where its bytes are."""

    name: str
    begin: int
    size: int


@dataclass(frozen=True)
class ShardRow:
    """A row of a shard as it stands.

    Attributes:
        key: what its members' names have in common.
        row: bytes of its .json member.
        media: names of its other members, in their order.
    """

    key: str
    row: bytes
    media: tuple[str, ...]

    def parsed(self, shard: str) -> dict[str, Any]:
        """The row as its member has it.

        Raises:
            DataError: the member is no JSON object.
        """
        where = f"{shard}, {self.key}"
        try:
            row = parse_json(self.row.decode("utf-8-sig"))
        except ValueError as error:  # of JSON or of UTF-8
            raise DataError(f"{where}: {self.key}.{ROW} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: {self.key}.{ROW} must be a JSON object")
        return row


def media_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The images and videos among the members of a sample, under the keys by which a row names them."""
    kinds = {key: [name for name in names if name.lower().rpartition(".")[2] in ends] for key, ends in KINDS.items()}
    return {key: found for key, found in kinds.items() if found}


class Shard:
    """What the headers of a shard say.

    Attributes:
        path: of it.
        members: its files, in their order.
    """

    def __init__(self, path: str, members: Sequence[Member]):
        self.path, self.members = path, members

    @classmethod
    def read(cls, path: str, size: int) -> Shard:
        """
        Args:
            size: of the file, in bytes.

        Raises:
            DataError: it is no tar file, damaged or cut off, or has a member that is not stored as it is.
        """
        members: list[Member] = []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.issparse():
                        raise DataError(f"{path}: {member.name} is stored without its holes: make the shard without -S")
                    if member.isfile():
                        members.append(Member(member.name.removeprefix("./"), member.offset_data, member.size))
                # Whatever is no header ends the list: only zeros are the end of a shard, and not more than fill its last record,
                # lest it is room that a download has set aside.
                tar.fileobj.seek(tar.offset)
                behind = tar.fileobj.read(END)
        except tarfile.TarError as error:
            last = f" behind {members[-1].name}" if members else ""
            raise DataError(
                f"cannot read {path}{last}: {error}; it must be a tar file that is not packed, and whole: fetch it again"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        for member in members:
            if member.begin + member.size > size:
                raise DataError(f"{path} is cut off within {member.name}: fetch it again")
        if not tarfile.BLOCKSIZE <= len(behind) < END or behind.strip(b"\0"):
            last = f"behind {members[-1].name}" if members else "at its begin"
            raise DataError(
                f"{path} is cut off or damaged {last}, or two archives in one, or of larger records (tar -b): fetch it again, or "
                "make it anew"
            )
        return cls(path, members)

    @cached_property
    def by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    @cached_property
    def samples(self) -> list[tuple[str, list[Member]]]:
        """By key, as members follow each other: what precedes the first dot of the last part of a name.

        Raises:
            DataError: a sample has no row or stands in two places.
        """
        found: dict[str, list[Member]] = {}
        last = None
        for member in self.members:
            folder, slash, name = member.name.rpartition("/")
            if name.startswith((".", "_")) or "." not in name:  # hidden, webdataset's own, or a README
                continue
            key = folder + slash + name.partition(".")[0]
            if key in found and key != last:
                raise DataError(f"{self.path}, {key}: its members do not follow each other; make the shard anew")
            found.setdefault(key, []).append(member)
            last = key
        for key, members in found.items():
            if (count := sum(member.name == f"{key}.{ROW}" for member in members)) != 1:
                raise DataError(f"{self.path}, {key}: it has {count} members {key}.{ROW}, and a row is one")
        return [*found.items()]


_kept: OrderedDict[tuple[str, int, int], Shard] = OrderedDict()  # read last, up to `KEPT` members


def find_shard(path: str) -> Shard:
    """The shard at this path; its headers are read once, unless it changes or many others are read between.

    Raises:
        DataError: as of `Shard.read`, or there is none.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    key = path, status.st_size, status.st_mtime_ns
    if key not in _kept:
        _kept[key] = Shard.read(path, status.st_size)
        while len(_kept) > 1 and sum(len(shard.members) for shard in _kept.values()) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def sample_blocks(shard: str) -> list[tuple[int, int, int, int]]:
    """(number of the block in it, 0, number of its first sample, from 1, samples) of stretches of samples.

    Raises:
        DataError: as of `find_shard` and `Shard.samples`, or there are none.
    """
    count = len(find_shard(shard).samples)
    if not count:
        raise DataError(f"{shard} is empty: it needs samples, each with a .{ROW} member")
    return [(i // SAMPLES, 0, i + 1, min(SAMPLES, count - i)) for i in range(0, count, SAMPLES)]


def read_samples(shard: str, first: int, count: int) -> list[ShardRow]:
    """Rows of a block, without the bytes of their media.

    Args:
        first: number of the first sample, from 1.

    Raises:
        DataError: the shard has been changed since its samples were counted.
    """
    chosen = find_shard(shard).samples[first - 1 :][:count]
    if len(chosen) != count:
        raise DataError(f"{shard} has been changed since the run began: samples {first} and behind are not there")
    made = []
    with open(shard, "rb") as file:
        for key, members in chosen:
            row = next(member for member in members if member.name == f"{key}.{ROW}")
            file.seek(row.begin)
            media = tuple(member.name for member in members if member is not row)
            made.append(ShardRow(key, file.read(row.size), media))
    return made


def shard_rows(shard: str) -> Iterator[ShardRow]:
    """All rows of a shard.

    Raises:
        DataError: as of `sample_blocks` and `read_samples`.
    """
    for _, _, first, count in sample_blocks(shard):
        yield from read_samples(shard, first, count)


def member_at(path: Path) -> tuple[str, Member] | None:
    """The shard and the member that a path leads to; None: it leads into no shard, or to nothing in it."""
    for shard in path.parents:
        if shard.name.endswith(SUFFIX) and shard.is_file():
            found = find_shard(str(shard)).by_name.get(path.relative_to(shard).as_posix())
            return None if found is None else (str(shard), found)
    return None


class _Window(io.RawIOBase):
    """A stretch of a file."""

    def __init__(self, path: str, begin: int, size: int):
        self._file, self._begin, self._size, self._at = open(path, "rb", buffering=0), begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def opened(path: str | Path) -> BinaryIO:
    """A file to read from, also one that lies in a shard."""
    found = _within(path)
    if found is None:
        return open(path, "rb")
    shard, member = found
    return io.BufferedReader(_Window(shard, member.begin, member.size))


def url_of(path: str | Path) -> str:
    """What FFmpeg calls a file, whatever characters are in its name (`10:30.mp4` is no protocol), or a stretch of one: of a
    shard, or of what begins with a still picture, up to its end.

    Raises:
        VideoError: nothing is in it.
    """
    found = _within(path)
    file, begin, size = (str(path), 0, None) if found is None else (found[0], found[1].begin, found[1].size)
    if size == 0:
        raise VideoError(f"{path} is empty: make it anew")
    status = Path(file).stat()
    end = _picture_end(str(path), (status.st_size, status.st_mtime_ns)) or size
    return f"file:{file}" if end is None else f"subfile,,start,{begin},end,{begin + end},,:file:{file}"


@lru_cache(1 << 16)
def _picture_end(path: str, stamp: tuple[int, int]) -> int | None:
    """Of one that is asked about again and again; a file that has changed has another stamp."""
    if path.lower().endswith(FILMS_OF_JPEG):
        return None
    with opened(path) as file:
        return picture_end(file)


def _within(path: str | Path) -> tuple[str, Member] | None:
    path = Path(path)
    return None if path.exists() else member_at(path)
