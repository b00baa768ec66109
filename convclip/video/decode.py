"""Frames of a video file: one per second over the clip, at most F of them, as the teacher and student were trained.

Shapes: n frames of one video, F frames kept at most, S side of the square result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from convclip.data.transforms import EvalTransform
from convclip.schema import MAX_PIXELS

FRAMES = 12
MAX_SECONDS = 1800
# Containers that are opened. Playlists (hls, concat, …) are not: they name other addresses, and FFmpeg waits for those.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
# Timestamps are rounded to the container's clock; this much past a second still counts as on it.
CLOCK_SLACK = 1e-3


class VideoError(Exception):
    """A video that cannot be used; the message says why, without the file's name."""


@dataclass(frozen=True)
class VideoClip:
    """uint8 [n, 3, S, S] with n <= F; `note` says what was wrong with a file that could be used all the same."""

    frames: torch.Tensor
    note: str | None = None


def read_clip(path: str | Path, size: int = 224, frames: int = FRAMES, fps: float = 1.0) -> VideoClip:
    """Decode a file and keep what was on screen at 0, 1/fps, 2/fps, … seconds, thinned to `frames`.

    Frames are turned upright, their shorter side resized to `size` (bicubic), centre-cropped. VideoError: missing,
    empty, no video in it, too large or too long, or not one frame can be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError("no such file")
    if path.stat().st_size == 0:
        raise VideoError("the file is empty")
    transform = EvalTransform(size)
    decoder = _Decoder(path)
    sampled: list[torch.Tensor] = []
    on_screen: tuple[av.VideoFrame, torch.Tensor] | None = None
    for frame in _at_times(decoder.frames(), fps):
        # A frame that stays on screen for seconds is converted once.
        if on_screen is None or on_screen[0] is not frame:
            on_screen = frame, transform(upright(frame))
        sampled.append(on_screen[1])
        if len(sampled) > MAX_SECONDS * fps:
            raise VideoError(f"longer than {MAX_SECONDS} seconds")
    if not sampled:
        raise VideoError(decoder.problem or "no frame in it")
    kept = torch.stack([sampled[i] for i in evenly(len(sampled), frames)])
    return VideoClip(kept, decoder.problem)


def evenly(n: int, frames: int = FRAMES) -> list[int]:
    """Places kept of n: all when n <= frames, else linspace(0, n - 1, frames) truncated."""
    if n <= frames:
        return list(range(n))
    return np.linspace(0, n - 1, frames).astype(int).tolist()


def upright(frame: av.VideoFrame) -> Image.Image:
    """The frame as a player shows it: turned by the file's rotation mark (multiples of 90 degrees)."""
    image = frame.to_image()
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[quarter_turns]) if quarter_turns else image


def _at_times(frames: Iterator[tuple[float, float, av.VideoFrame]], fps: float) -> Iterator[av.VideoFrame]:
    """The frame on screen at each multiple of 1/fps seconds; frames come as (start, end, frame) in seconds."""
    shown: av.VideoFrame | None = None
    start, end, due = 0.0, 0.0, 0
    for next_start, next_end, frame in frames:
        while shown is not None and due / fps + CLOCK_SLACK < next_start:
            yield shown
            due += 1
        shown, start, end = frame, next_start, next_end
    while shown is not None and (due / fps <= start + CLOCK_SLACK or due / fps + CLOCK_SLACK < end):
        yield shown
        due += 1


class _Decoder:
    """Decodes one file packet by packet, so that a damaged one costs its frames and not the video."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self.damaged = 0

    def frames(self) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """(start, end, frame), seconds counted from the first frame. VideoError: no readable video stream."""
        try:
            safe = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
            container = av.open(str(self.path), options=safe)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"cannot be opened as a video: {_reason(error)}") from None
        with container:
            if not container.streams.video:
                raise VideoError("no video stream in it")
            stream = container.streams.video[0]
            # Files are decoded in parallel processes; threads inside each would only get in one another's way.
            stream.codec_context.thread_count = 1
            self._check_size(stream.width, stream.height)
            yield from self._timed(container, stream)

    def _timed(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[tuple[float, float, av.VideoFrame]]:
        step = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
        first, now = None, 0.0
        for frame in self._decode(container, stream):
            self._check_size(frame.width, frame.height)
            time = frame.time if frame.time is not None else now
            first = time if first is None else first
            length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else step
            # Clocks that run backwards (spliced files) are held still.
            now = max(now, time - first)
            yield now, now + length, frame
            now += step if frame.time is None else 0.0

    def _decode(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, ValueError) as error:
                self.problem = f"cannot be read to its end: {_reason(error)}"
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError) as error:
                self.damaged += 1
                self.problem = f"{self.damaged} damaged packets, the last: {_reason(error)}"
                continue
            yield from frames

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise VideoError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _reason(error: Exception) -> str:
    """FFmpeg's sentence without its number and file name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
