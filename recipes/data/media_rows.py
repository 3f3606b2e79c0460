"""The images and videos of a row, in the order in which its text names them.

A row names files under `image`, `images`, `video`, `videos` (or `features`), or in content parts of its messages. In its text,
"<image>" or "<video>" says where one stands, and so does the placeholder itself; a content part stands where it is. A video may
be a list of files, its frames.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes.data.errors import VideoError
from recipes.data.jsonl import kind as kind_of
from recipes.data.video_settings import VideoSettings

__all__ = ["MARKERS", "MEDIA_KEYS", "File", "expand", "has_media", "names_files", "with_folder", "write_media"]

MARKERS = {"image": "<image>", "video": "<video>"}
MEDIA_KEYS = ("image", "images", "video", "videos", "features")
# Content parts by their type, as OpenAI, transformers and Qwen have them.
PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
PART_KEYS = ("url", "path")  # beside its type, by which a part names its file

LATEST = 1e12  # seconds


@dataclass(frozen=True)
class File:
    """
    Attributes:
        kind: image, video, or features, which stand for a video.
        name: as the row has it; the files of a video's frames.
        key: where it says so.
        alone: it is the row's only image.
        times: when each of a video's frames is shown, in seconds; None: the row does not say.
    """

    kind: str
    name: str | tuple[str, ...]
    key: str
    alone: bool = False
    times: tuple[float, ...] | None = None


def has_media(row: Mapping[str, Any]) -> str | None:
    """The first key that names a medium."""
    return next((key for key in MEDIA_KEYS if row.get(key) not in (None, [])), None)


def names_files(row: Mapping[str, Any]) -> bool:
    """Whether it names a medium, under a key of its own or in a content part."""
    messages = row.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    named = [part.get(key) for part in parts if (kind := part.get("type")) in PARTS for key in (kind, *PART_KEYS)]
    return has_media(row) is not None or any(name is not None for name in named)


def write_media(
    row: Mapping[str, Any], settings: VideoSettings, show: Callable[[File], str], where: str
) -> dict[str, Any]:
    """The row with its media written as the tokenizer will read them.

    Args:
        show: what is written for one; called in the order of the text.

    Raises:
        VideoError: not as many places in the text as media, or a key or part that names no file.
    """
    named = {kind: list(_named(row, kind, where)) for kind in MARKERS}
    if isinstance(messages := row.get("messages"), list):
        changed = {"messages": [_with_markers(m, i, named, where) for i, m in enumerate(messages)]}
        texts = [m["content"] for m in changed["messages"] if isinstance(m, dict) and isinstance(m.get("content"), str)]
    else:
        changed = {}
        texts = [row["prompt"]] if isinstance(row.get("prompt"), str) else []
    pattern = _pattern(settings)
    found = [_kind_of(match[0], settings) for text in texts for match in pattern.finditer(text)]
    files = {kind: _in_order(named[kind], found.count(kind), kind, where) for kind in MARKERS}

    def written(match: re.Match) -> str:
        kind = _kind_of(match[0], settings)
        text = show(next(files[kind]))
        if match[0] == settings.token(kind) != settings.text(kind) and match[0] != MARKERS[kind]:
            if settings.timestamps is not None and kind == "video":
                raise VideoError(
                    f"{where}: the text has the placeholder {match[0]} itself, and data.video.timestamps writes each frame: "
                    f"write {MARKERS[kind]}"
                )
            return match[0]  # the row has written what belongs around it
        return text

    def rewritten(text: Any) -> Any:
        return pattern.sub(written, text) if isinstance(text, str) else text

    if changed:
        changed["messages"] = [
            m | {"content": rewritten(m["content"])} if isinstance(m, dict) and "content" in m else m
            for m in changed["messages"]
        ]
    elif "prompt" in row:
        changed["prompt"] = rewritten(row["prompt"])
    return {key: value for key, value in row.items() if key not in MEDIA_KEYS} | changed


def with_folder(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row with the names of its files as they are called from anywhere.

    Args:
        folder: that they are relative to.
    """

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder.absolute() / Path(value.removeprefix("file://")).expanduser())
        if isinstance(value, list):
            return [named(each) for each in value]
        if isinstance(value, dict):
            return {k: named(v) if k in ("path", "url", "frames") else v for k, v in value.items()}
        return value

    def part(value: Any) -> Any:
        if not isinstance(value, dict) or (kind := value.get("type")) not in PARTS:
            return value
        return {k: named(v) if k != "type" and k in (kind, *PART_KEYS) else v for k, v in value.items()}

    found = {key: named(value) if key in MEDIA_KEYS else value for key, value in row.items()}
    if isinstance(messages := row.get("messages"), list):
        contents = [m.get("content") if isinstance(m, dict) else None for m in messages]
        pairs = zip(messages, contents, strict=True)
        found["messages"] = [m | {"content": [*map(part, c)]} if isinstance(c, list) else m for m, c in pairs]
    return found


def _pattern(settings: VideoSettings) -> re.Pattern[str]:
    """What stands for a medium in a text: the longest first."""
    known = {*MARKERS.values(), *(f(kind) for f in (settings.text, settings.token) for kind in MARKERS)}
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))


def _kind_of(text: str, settings: VideoSettings) -> str:
    if text in MARKERS.values():
        return next(kind for kind, marker in MARKERS.items() if marker == text)
    return "video" if text in (settings.text("video"), settings.token("video")) else "image"


def _in_order(named: list[File], places: int, kind: str, where: str) -> Iterator[File]:
    if places != len(named):
        raise VideoError(f"{where}: the text has {places} {kind} placeholders, the row has {len(named)} {kind}s")
    return iter([replace(named[0], alone=True)] if kind == "image" and places == 1 else named)


def _named(row: Mapping[str, Any], kind: str, where: str) -> Iterator[File]:
    """Under the keys of the row."""
    keys = (kind, f"{kind}s", *(["features"] if kind == "video" else []))
    given = [key for key in keys if row.get(key) not in (None, [])]
    if len(given) > 1:
        raise VideoError(f"{where}: both {given[0]} and {given[1]}; a row carries one of them")
    for key in given:
        values = row[key]
        if key != f"{kind}s":
            yield _file("features" if key == "features" else kind, values, key, where)
        elif not isinstance(values, list):
            raise VideoError(f"{where}: {key} must be a list of files, got {kind_of(values)}")
        else:
            for i, value in enumerate(values):
                yield _file(kind, value, f"{key}[{i}]", where)


def _file(kind: str, value: Any, key: str, where: str) -> File:
    """Tables store pictures as objects with a path; frames may be an object that says when they are shown."""
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        value = value["path"]
    if kind == "video" and isinstance(value, dict) and "frames" in value:
        return _timed_frames(value, key, where)
    if kind == "video" and isinstance(value, list):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise VideoError(
                f"{where}: {key} must be the name of a file, or a list of its frames' files, got {value!r:.80}"
            )
        return File(kind, tuple(value), key)
    if not isinstance(value, str) or not value:
        raise VideoError(f"{where}: {key} must be the name of a file, got {value!r:.80}")
    return File(kind, value.removeprefix("file://"), key)


def _timed_frames(value: dict[str, Any], key: str, where: str) -> File:
    """{"frames": files, "fps": frames of a second} or {..., "times": seconds of each}."""
    said = {k: v for k, v in value.items() if v is not None}
    file = _file("video", said.pop("frames", None), key, where)
    if isinstance(file.name, str) or len(said) > 1 or not said.keys() <= {"fps", "times"}:
        raise VideoError(
            f"{where}: {key} must have frames, a list of files, and fps or times beside them, got {value!r:.80}"
        )
    times: list[Any] = said.get("times")
    if "fps" in said:
        rate = _number(said["fps"])
        if rate is None or rate <= 0:
            raise VideoError(f"{where}: fps of {key} must be a number above 0, got {said['fps']!r:.40}")
        times = [number / rate for number in range(len(file.name))]
    if times is None:
        return file
    found = [_number(time) for time in times] if isinstance(times, list) else []
    if (
        len(found) != len(file.name)
        or None in found
        or any(b <= a for a, b in pairwise([-1.0, *found]))
        or found[0] < 0
        or found[-1] > LATEST
    ):
        raise VideoError(
            f"{where}: times of {key} must be ascending seconds, one of each of its {len(file.name)} frames, up to "
            f"{LATEST:.0e}, got {times!r:.80}"
        )
    return replace(file, times=tuple(found))


def _number(value: Any) -> float | None:
    """Of a finite number, or a text that is one, as Qwen's rows have it."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (OverflowError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _with_markers(message: Any, number: int, named: dict[str, list[File]], where: str) -> Any:
    """A message whose content is a text: parts that are media become markers, and the files that they name are put among those of
    the row, in the order of the text."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for i, part in enumerate(message["content"]):
        kind = PARTS.get(part.get("type")) if isinstance(part, dict) else None
        if kind is None:
            parts.append(part)
            continue
        key = f"messages[{number}].content[{i}]"
        given = {k: v for k, v in part.items() if v is not None and k not in ("type", "text")}
        if kind == "video" and isinstance(files := given.get(part["type"]), list):
            # Qwen's name for it is sample_fps.
            said = {name: given.pop(name, None) for name in ("fps", "sample_fps", "times")}
            if said["fps"] is not None and said["sample_fps"] is not None:
                raise VideoError(f"{where}: {key} has both fps and sample_fps: leave one out")
            rate = said["sample_fps"] if said["fps"] is None else said["fps"]
            if (rate, said["times"]) != (None, None):
                given[part["type"]] = {"frames": files, "fps": rate, "times": said["times"]}
        if unknown := sorted(given.keys() - {part["type"], *PART_KEYS}):
            raise VideoError(
                f"{where}: nothing reads {unknown[0]} of {key}: say it in data.video, for all, or remove it"
            )
        if len(given) > 1:
            raise VideoError(f"{where}: {key} names two files, under {' and '.join(sorted(given))}")
        if given and (own := [file.key for file in named[kind] if not file.key.startswith("messages[")]):
            raise VideoError(f"{where}: both {own[0]} and {key} name a file; a row names its {kind}s in one way")
        for value in given.values():  # none: a place for one of the row's own
            if isinstance(value, dict) and set(value) <= {"url", "detail"}:
                value = value.get("url")
            named[kind].append(_file(kind, value, key, where))
        parts.append({"type": "text", "text": MARKERS[kind]})
    return message | {"content": _joined(parts)}


def _joined(parts: list[Any]) -> Any:
    """One text, where all are texts and nothing more; else as they are, for `read_conversation` to refuse."""

    def is_text(part: Any) -> bool:
        given = {k for k, v in part.items() if v is not None} if isinstance(part, dict) else None
        return given == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)

    return "".join(part["text"] for part in parts) if all(map(is_text, parts)) else parts


def expand(tokens: Sequence[int], placeholders: Collection[int], lengths: Sequence[int], where: str) -> list[int]:
    """One placeholder for each medium -> one for each of its tokens.

    Raises:
        VideoError: not as many placeholders as media: the tokenizer or the chat template has changed them.
    """
    found = sum(token in placeholders for token in tokens)
    if found != len(lengths):
        raise VideoError(
            f"{where}: the tokens have {found} placeholders, and the row's images and videos need {len(lengths)}: the chat "
            "template leaves some out, or writes its own"
        )
    expanded: list[int] = []
    waiting = iter(lengths)
    for token in tokens:
        expanded += [token] * (next(waiting) if token in placeholders else 1)
    return expanded
