"""Frames of a film or picture as a viewer shows them: which stream, at which moments, and whether the file is all there.

A clip is sampled by time. It is shown from its first picture to the end of its last, by the pictures' own timestamps; a
frame is what stands on the screen in the middle of one of `count` equal stretches. What FFmpeg decodes without an error is
the clip: packets are no pictures (VP8 and VP9 hide some, AVI drops some, an edit list leaves some out).

Two passes over the file: the first reads packets only, for the evidence and for a guess of which pictures are wanted; the
second decodes and keeps those. Where the guess was wrong, a third. Only `count` small frames are in memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.data.containers import missing_part
from recipes.data.errors import VideoError
from recipes.data.heif import draw_still, read_still
from recipes.data.pictures import paint

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["read_frames", "sample_frames"]

# Formats whose header lists every packet of a stream, and those that state how long the clip is.
LISTED, TIMED = {"mov", "avi"}, {"mov", "matroska", "flv"}
# FFmpeg's own decoders leave out the alpha of WebM.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# What is cut off a clip that has no table, at the least, as a part of its length.
CUT = 0.1


@dataclass(frozen=True)
class Picture:
    """When a picture is shown, in ticks of its stream: what its packet said (None: nothing) and for how long (0: unknown)."""

    pts: int | None
    dts: int | None
    duration: int


@dataclass(frozen=True)
class Clock:
    """How to read the timestamps of a stream.

    Attributes:
        frame: ticks of a frame at the stream's rate.
        longest: ticks; a picture is shown no longer.
        has_pts: AVI stores when a picture is decoded, not when it is shown; FFmpeg's guess is late where some were dropped.
    """

    frame: Fraction
    longest: Fraction
    has_pts: bool


@dataclass(frozen=True)
class Survey:
    """What the packets of a file say: which stream is the film, and what it probably shows, in order."""

    stream: int
    clock: Clock
    pictures: list[Picture]


def sample_frames(total: int, count: int) -> list[int]:
    """Numbers of `count` frames out of `total`, from the middle of equal stretches."""
    return [int((i + 0.5) * total / count) for i in range(count)]


def read_frames(path: str | Path, count: int, height: int, width: int, where: str = "") -> Tensor:
    """What is on the screen in the middle of `count` equal stretches of a clip, resized: uint8 [count, 3, height, width].

    Raises:
        VideoError: FFmpeg cannot read it, it holds no picture, or it ends before its own headers say.
    """
    from av.error import FFmpegError

    place = f"{where}: " if where else ""
    try:
        return _read(path, count, height, width)
    except VideoError as error:
        raise VideoError(f"{place}{error}") from error
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FFmpegError):
            missing = missing_part(path)
            reason += f" ({missing})" if missing else ""
            reason += "; it must be a video that FFmpeg reads"
        raise VideoError(f"{place}cannot decode {path}: {reason}") from error


def _read(path: str | Path, count: int, height: int, width: int) -> Tensor:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()

    def show(frame: VideoFrame, codec: str = "") -> Tensor:
        return torch.from_numpy(paint(frame, height, width, scaler, codec)).permute(2, 0, 1)

    still = read_still(path)
    if still is not None:
        with _open(path) as container:
            picture = draw_still(container, still, scaler)
        return show(VideoFrame.from_ndarray(picture, format="rgb24")).repeat(count, 1, 1, 1)
    survey = _survey(path)
    pictures, kept = _decode(path, survey.stream, set(_shown(survey.pictures, survey.clock, count)), show)
    wanted = _shown(pictures, survey.clock, count)
    if not kept.keys() >= set(wanted):
        _, kept = _decode(path, survey.stream, set(wanted), show)
    return torch.stack([kept[number] for number in wanted])


def _open(path: str | Path) -> InputContainer:
    """The file of this name, whatever characters are in it: `a%d.png` is no sequence, `10:30.mp4` no protocol."""
    import av

    return av.open(f"file:{path}", container_options={"pattern_type": "none"}, metadata_errors="replace")


def _film(container: InputContainer, path: str | Path) -> VideoStream:
    """The stream that FFmpeg's players choose, but never a cover, thumbnails, or a layer of another stream."""
    from av.stream import Disposition

    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
    films = {stream.index: stream for stream in container.streams.video if not stream.disposition & aside}
    if not films and (missing := missing_part(path)):
        raise VideoError(f"{path} is cut short: {missing}; encode or download it again")
    if not films:
        raise VideoError(f"{path} has no video stream{', only a cover' if container.streams.video else ''}")
    best = films.get(container.streams.best("video").index, next(iter(films.values())))
    if best.codec_context is None:
        raise VideoError(f"{path}: FFmpeg has no decoder for its pictures; encode it with a common one")
    return best


def _packets(container: InputContainer, *streams: VideoStream) -> Iterator[Packet]:
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV, when all is read: a stream appeared on the way that was not there at first
        return


def _survey(path: str | Path) -> Survey:
    """Reads all packets of a file.

    Raises:
        VideoError: no film in it, or it is cut short.
    """
    from av.format import Flags

    with _open(path) as container:
        stream = _film(container, path)
        base, rate = stream.time_base, stream.guessed_rate
        longest = 10 if container.format.flags & Flags.ts_discont.value else 3600
        names = set(container.format.name.split(","))
        clock = Clock(1 / (rate * base) if rate else Fraction(1), longest / base, "avi" not in names)
        listed, found, broken, begin, end = len(stream.index_entries), 0, False, 0.0, 0.0
        shown: dict[int | None, Picture] = {}  # a hidden picture has the timestamp of the next
        for packet in _packets(container):
            at = packet.dts if packet.pts is None or not clock.has_pts else packet.pts
            if at is not None:
                begin = min(begin, float(at * packet.time_base))
                end = max(end, float((at + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and (packet.size or at is not None):
                found, broken = found + 1, packet.is_corrupt
                if packet.size and not packet.is_discard:
                    shown[len(shown) if at is None else at] = Picture(at, at, packet.duration or 0)
        missing, seconds = missing_part(path), (container.duration or 0) / 1e6
        if names & LISTED and found < listed:
            missing = f"its index lists {listed} packets, {found} are there"
        elif broken:
            missing = missing or "its last packet is incomplete"
        elif missing is None and names & TIMED and not stream.frames and end - begin < (1 - CUT) * seconds:
            missing = f"it ends after {end - begin:.2f} of {seconds:.2f} seconds"
        if missing:
            promised = stream.frames or round(len(shown) * seconds / max(end - begin, 1e-9))
            if promised > len(shown):
                missing = f"{len(shown)} of {promised} frames can be decoded ({missing})"
            raise VideoError(f"{path} is cut short: {missing}; encode or download it again")
        return Survey(stream.index, clock, [shown[key] for key in sorted(shown)])


def _decode(
    path: str | Path, stream: int, wanted: set[int], show: Callable[[VideoFrame, str], Tensor]
) -> tuple[list[Picture], dict[int, Tensor]]:
    """All pictures that are shown, in their order, and those of `wanted` numbers themselves.

    Raises:
        VideoError: there is none, or the last is incomplete.
    """
    pictures, kept, frame = [], {}, None
    with _open(path) as container:
        codec = container.streams[stream].codec_context
        for frame in _frames(container, container.streams[stream]):
            if len(pictures) in wanted:
                kept[len(pictures)] = show(frame, codec.name)
            pictures.append(Picture(frame.pts, frame.dts, frame.duration))
    if frame is None:
        raise VideoError(f"{path} holds no picture that can be decoded")
    if frame.is_corrupt:
        raise VideoError(f"{path} is cut short: its last picture is incomplete; encode or download it again")
    return pictures, kept


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """What the decoder shows."""
    from av import CodecContext
    from av.error import InvalidDataError
    from av.format import Flags

    stream.thread_type = "AUTO"
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in WITH_ALPHA:
        decoder = CodecContext.create(WITH_ALPHA[decoder.name], "r")
    # A recording of a broadcast begins between key frames: nothing is shown before the first.
    joins = container.format.flags & (Flags.ts_discont | Flags.no_timestamps).value
    for packet in _packets(container, stream):
        if not packet.size:  # a dropped picture: the one before it stays on the screen
            continue
        try:
            found = decoder.decode(packet)
        except InvalidDataError:
            if not joins:
                raise
            continue
        joins = joins and not found
        yield from found
    yield from decoder.decode(None)


def _shown(pictures: Sequence[Picture], clock: Clock, count: int) -> list[int]:
    """Numbers of the pictures on the screen in the middle of `count` equal stretches.

    Pictures at equal distances are counted instead, lest the rounding of timestamps (to milliseconds in Matroska) decide
    which of two is shown when a moment falls on the change from one to the other.
    """
    edges, total = _edges(pictures, clock), len(pictures)
    step = float(edges[-1]) / total if total else 0.0
    slack = min(1.5, step / 4)
    if all(abs(edge - number * step) <= slack for number, edge in enumerate(edges)):
        return sample_frames(total, count)
    return [bisect_right(edges, Fraction(2 * i + 1, 2 * count) * edges[-1]) - 1 for i in range(count)]


def _edges(pictures: Sequence[Picture], clock: Clock) -> list[Fraction | int]:
    """When each picture comes, from the first, and at last when the last goes; in ticks.

    A step back, or one that is too long, is a break in the timestamps and not in what is shown, as in ffplay.
    """
    stamps, edges = _stamps(pictures, clock), [0]
    for number, picture in enumerate(pictures):
        now, after = stamps[number], stamps[number + 1] if number + 1 < len(stamps) else None
        stays = after - now if None not in (now, after) else 0
        if not 0 < stays <= clock.longest:
            stays = picture.duration or clock.frame
        edges.append(edges[-1] + stays)
    return edges


def _stamps(pictures: Sequence[Picture], clock: Clock) -> list[int | None]:
    """The timestamp of each picture: its pts where the file stores them, unless the dts go back less often."""

    def steps_back(stamps: list[int | None]) -> float:
        known = [stamp for stamp in stamps if stamp is not None]
        return sum(after <= before for before, after in pairwise(known)) if known else math.inf

    kinds = [[picture.pts for picture in pictures], [picture.dts for picture in pictures]]
    return min(kinds if clock.has_pts else reversed(kinds), key=steps_back)
