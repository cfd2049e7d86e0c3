"""Video and image files in and out, through PyAV and Pillow.

Frames are uint8 RGB, channels last: ``(T, H, W, 3)``. Videos are written as H.264 with the BT.709
matrix and labelled so, because players guess differently when the label is missing.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hunyuan_fast.data.files import atomic_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_PIXELS = 2**30
"""Pixels over all frames that ``read_video`` decodes by default: 3 GiB of RGB."""

# A container is chosen by its bytes, not by its name, and playlists (ffconcat, HLS, DASH) open
# further files: only self-contained formats are let in, and no protocol but local files.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,gif",
}
_BT709 = 1  # H.273 code point, the same for matrix, primaries and transfer curve
_LIMITED_RANGE = 1
_PNG_KEY = "hunyuan-fast"


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header claims; ``frames`` is an estimate where the container stores none."""

    width: int
    height: int
    frames: int
    fps: float


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> "Iterator[tuple[InputContainer, VideoStream]]":
    import av

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with av.open(f"file:{Path(path).absolute()}", options=dict(_OPTIONS)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a readable video: {error.strerror}") from error


def _info(path: str | os.PathLike[str], stream: "VideoStream") -> VideoInfo:
    rate = stream.average_rate or stream.base_rate
    if not rate or stream.width < 1 or stream.height < 1:
        raise ValueError(f"{path} states no frame size or frame rate")
    frames = stream.frames
    if not frames and stream.duration and stream.time_base:
        frames = math.ceil(stream.duration * stream.time_base * rate)
    return VideoInfo(stream.width, stream.height, frames, float(rate))


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Read the header of a video file without decoding it.

    Raises:
        FileNotFoundError: ``path`` is not a file.
        ValueError: the file is not a video that FFmpeg understands.
    """
    with _opened(path) as (_, stream):
        return _info(path, stream)


def read_video(
    path: str | os.PathLike[str], *, max_frames: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[torch.Tensor, float]:
    """Decode the first video stream of a local file.

    Args:
        max_frames: stop after this many frames; None decodes all.
        max_pixels: most pixels (frames x height x width) to decode. The header is checked against
            it before decoding, the frames again while decoding, since a header may lie.

    Returns:
        frames ``(T, H, W, 3)`` uint8 RGB, and the average frame rate in frames per second.
        Rotation flags and uneven frame times are ignored.

    Raises:
        FileNotFoundError: ``path`` is not a file.
        ValueError: not a readable video, no frames, or more than ``max_pixels``.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be positive or None, got {max_frames}")
    with _opened(path) as (container, stream):
        info = _info(path, stream)
        area = info.width * info.height
        claimed = info.frames if max_frames is None else min(info.frames, max_frames)
        _check_budget(path, max(claimed, 1) * area, max_pixels)
        stream.thread_type = "AUTO"
        frames: list[np.ndarray] = []
        for frame in container.decode(stream):
            if (frame.width, frame.height) != (info.width, info.height):
                raise ValueError(f"{path} changes its frame size at frame {len(frames)}")
            _check_budget(path, (len(frames) + 1) * area, max_pixels)
            frames.append(_rgb_array(frame))
            if len(frames) == max_frames:
                break
    if not frames:
        raise ValueError(f"{path} holds no decodable frame")
    return torch.from_numpy(np.stack(frames)), info.fps


# FFmpeg's bicubic, accurate rounding, full chroma; PyAV 17, the last for Python 3.10, names only
# the first of them.
_INTERPOLATION = 0x4 | 0x40000 | 0x2000


def _rgb_array(frame: Any) -> np.ndarray:
    """One frame ``(H, W, 3)`` uint8; chroma is interpolated, as repeating it costs up to 3 dB."""
    return frame.to_ndarray(format="rgb24", interpolation=_INTERPOLATION)


def _check_budget(path: str | os.PathLike[str], pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise ValueError(
            f"{path} decodes to more than {max_pixels} pixels ({pixels} so far): "
            "ask for fewer frames with max_frames, or raise max_pixels"
        )


def write_video(
    path: str | os.PathLike[str],
    frames: torch.Tensor,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    crf: int = 14,
    overwrite: bool = True,
) -> None:
    """Write an H.264 mp4 that appears under its name only when it is complete.

    Args:
        frames: ``(T, H, W, 3)`` uint8 RGB on any device, H and W even (4:2:0 chroma).
        fps: frames per second.
        metadata: JSON values, kept in the ``comment`` tag; ``read_metadata`` returns them.
        crf: x264's constant rate factor, 0 (lossless) to 51.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError: wrong shape, dtype, odd size, or fps out of range.
        FileExistsError: the file exists and ``overwrite`` is false.
        OSError: the place is not writable or full; nothing is left behind.
    """
    import av

    _check_frames(frames)
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames must have even height and width, got {height}x{width}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be in (0, 1000], got {fps}")
    comment = json.dumps(dict(metadata or {}), ensure_ascii=False)
    with (
        atomic_file(path, overwrite=overwrite) as file,
        av.open(file, "w", format="mp4") as container,
    ):
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10**5))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for index in range(count):
            container.mux(stream.encode(_yuv_frame(frames[index])))
        container.mux(stream.encode(None))


def _yuv_frame(frame: torch.Tensor) -> Any:
    import av

    rgb = av.VideoFrame.from_ndarray(frame.contiguous().cpu().numpy(), format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)


def write_image(
    path: str | os.PathLike[str],
    frame: torch.Tensor,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write one frame ``(H, W, 3)`` uint8 RGB as a PNG, with the same promises as `write_video`."""
    from PIL import Image, PngImagePlugin

    _check_frames(frame[None] if frame.ndim == 3 else frame)
    text = PngImagePlugin.PngInfo()
    text.add_itxt(_PNG_KEY, json.dumps(dict(metadata or {}), ensure_ascii=False))
    image = Image.fromarray(frame.contiguous().cpu().numpy())
    with atomic_file(path, overwrite=overwrite) as file:
        image.save(file, format="PNG", pnginfo=text)


def _check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            "frames must be uint8 (T, H, W, 3), "
            f"got {str(frames.dtype).removeprefix('torch.')} {tuple(frames.shape)}"
        )
    if 0 in frames.shape:
        raise ValueError(f"frames must not be empty, got {tuple(frames.shape)}")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``write_video`` or ``write_image`` stored; empty for files from elsewhere.

    Raises:
        FileNotFoundError: ``path`` is not a file.
        ValueError: neither a readable video nor a PNG.
    """
    if Path(path).suffix.lower() == ".png":
        stored = _png_text(path)
    else:
        with _opened(path) as (container, _):
            stored = container.metadata.get("comment", "")
    try:
        values = json.loads(stored)
    except json.JSONDecodeError:
        return {}  # a comment written by some other program
    return values if isinstance(values, dict) else {}


def _png_text(path: str | os.PathLike[str]) -> str:
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return str(getattr(image, "text", {}).get(_PNG_KEY, ""))
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable PNG") from error
