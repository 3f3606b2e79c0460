"""Frames of a film or picture as a viewer shows them: which stream, at which moments, and whether the file is all there.

A clip is sampled by time. It is shown from its first picture to the end of its last, by the pictures' own timestamps; a
frame is what stands on the screen in the middle of one of `count` equal stretches. What FFmpeg decodes without an error is
the clip: packets are no pictures (VP8 and VP9 hide some, AVI drops some, an edit list leaves some out).

Two passes over the file: the first reads packets only, for the evidence and for a guess of which pictures are wanted; the
second decodes and keeps those. Where the guess was wrong, a third. Only `count` small frames are in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recipes.data.containers import missing_part
from recipes.data.errors import VideoError
from recipes.data.heif import draw_still, read_still
from recipes.data.moments import ROUNDING, Clock, Picture, are_even, edges_of, on_screen
from recipes.data.pictures import paint, turn_of
from recipes.data.shards import url_of

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["Shape", "begins", "probe", "read_frames"]

# Formats whose header lists every packet of a stream, and those that state how long the clip is.
LISTED, TIMED = {"mov", "avi"}, {"mov", "matroska", "flv"}
# FFmpeg's own decoders leave out the alpha of WebM.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# What is cut off a clip that has no table, at the least, as a part of its length.
CUT = 0.1


@dataclass(frozen=True)
class Survey:
    """What the packets of a file say: which stream is the film, what it probably shows, in order, its pixels as stored, and the
    seconds of a tick."""

    stream: int
    clock: Clock
    pictures: list[Picture]
    height: int
    width: int
    tick: Fraction


@dataclass(frozen=True)
class Shape:
    """How large a film or picture is shown, in pixels, for how long, how many pictures it has, whether they come at equal
    distances, and by how many seconds the film may be longer, because its timestamps are rounded."""

    height: int
    width: int
    seconds: float
    pictures: int
    even: bool = True
    short: float = 0.0


def read_frames(
    path: str | Path, count: int, height: int, width: int, where: str = "", largest: int | None = None
) -> Tensor:
    """What is on the screen in the middle of `count` equal stretches of a clip, resized: uint8 [count, 3, height, width].

    Args:
        largest: pixels that a picture may have at most.

    Raises:
        VideoError: FFmpeg cannot read it, it holds no picture or too large a one, or it ends before its own headers say.
    """
    with _told(path, where):
        return _read(path, count, height, width, largest)


def probe(path: str | Path, where: str = "", largest: int | None = None) -> Shape:
    """How a film or picture is shown, from its packets and its first picture.

    Raises:
        VideoError: as of `read_frames`; what is broken behind the first picture is not seen.
    """
    with _told(path, where):
        return _probe(path, largest)


def begins(path: str | Path, count: int, where: str = "") -> list[float]:
    """When each of the pictures comes that `read_frames` shows, in seconds from the first, by their packets.

    Raises:
        VideoError: as of `probe`.
    """
    with _told(path, where):
        survey = _survey(path)
        edges = edges_of(survey.pictures, survey.clock)
        return [float(edges[number] * survey.tick) for number in on_screen(survey.pictures, survey.clock, count)]


@contextlib.contextmanager
def _told(path: str | Path, where: str) -> Iterator[None]:
    """Whatever goes wrong is one line with its place."""
    from av.error import FFmpegError

    place = f"{where}: " if where else ""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"{place}{error}") from error
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FFmpegError):
            missing = missing_part(path)
            reason += f" ({missing})" if missing else ""
            reason += "; it must be a video that FFmpeg reads"
        raise VideoError(f"{place}cannot decode {path}: {reason}") from error


def _probe(path: str | Path, largest: int | None) -> Shape:
    from av.video.reformatter import VideoReformatter

    still = read_still(path)
    if still is not None:
        with _open(path) as container:
            height, width, _ = draw_still(container, still, VideoReformatter()).shape
        _check_size(height, width, path, largest)
        return Shape(height, width, 0.0, 1)
    survey = _survey(path)
    _check_size(survey.height, survey.width, path, largest)
    with _open(path) as container:
        stream = container.streams[survey.stream]
        frame = next(_frames(container, stream), None)
        if frame is None:
            raise VideoError(f"{path} holds no picture that can be decoded")
        _check_size(frame.height, frame.width, path, largest)
        shape = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1  # of a pixel
        height, width = frame.height, max(1, round(frame.width * shape))
        if turn_of(frame)[1]:
            height, width = width, height
        edges = edges_of(survey.pictures, survey.clock)
    seconds, short = float(edges[-1] * survey.tick), float(ROUNDING * survey.tick)
    return Shape(height, width, seconds, len(survey.pictures), are_even(edges), short)


def _check_size(height: int, width: int, path: str | Path, largest: int | None) -> None:
    if largest is not None and height * width > largest:
        raise VideoError(
            f"{path} has a picture of {height} x {width} pixels, more than data.video.largest_pixels={largest}: "
            "make it smaller, or raise the limit"
        )


def _read(path: str | Path, count: int, height: int, width: int, largest: int | None) -> Tensor:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()

    def show(frame: VideoFrame, codec: str = "") -> Tensor:
        _check_size(frame.height, frame.width, path, largest)
        return torch.from_numpy(paint(frame, height, width, scaler, codec)).permute(2, 0, 1)

    still = read_still(path)
    if still is not None:
        with _open(path) as container:
            picture = draw_still(container, still, scaler)
        return show(VideoFrame.from_ndarray(picture, format="rgb24")).repeat(count, 1, 1, 1)
    survey = _survey(path)
    _check_size(survey.height, survey.width, path, largest)  # before a decoder makes room for it
    pictures, kept = _decode(path, survey.stream, set(on_screen(survey.pictures, survey.clock, count)), show)
    wanted = on_screen(pictures, survey.clock, count)
    if not kept.keys() >= set(wanted):
        _, kept = _decode(path, survey.stream, set(wanted), show)
    return torch.stack([kept[number] for number in wanted])


def _open(path: str | Path) -> InputContainer:
    """The file of this name, whatever characters are in it: `a%d.png` is no sequence."""
    import av

    return av.open(url_of(path), container_options={"pattern_type": "none"}, metadata_errors="replace")


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
                stays = packet.duration or (clock.frame if packet.stream_index == stream.index else 0)  # FLV says none
                end = max(end, float((at + stays) * packet.time_base))
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
        size = stream.codec_context.height, stream.codec_context.width
        return Survey(stream.index, clock, [shown[key] for key in sorted(shown)], *size, base)


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
