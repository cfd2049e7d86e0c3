"""Video files: what goes in comes out, nothing half-written stays, nothing hostile is opened."""

import errno
import math
import os
import resource
import shutil
from pathlib import Path

import av
import pytest
import torch

from hunyuan_fast.data.files import atomic_file
from hunyuan_fast.data.metrics import psnr
from hunyuan_fast.data.video import (
    probe_video,
    read_metadata,
    read_video,
    write_image,
    write_video,
)


def smooth_clip(frames: int = 5, height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    """A clip an encoder can keep well: low frequencies with random phases, moving."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(3, generator=generator) * 6
    t = torch.arange(frames).view(-1, 1, 1, 1)
    y = torch.linspace(0, 3, height).view(1, -1, 1, 1)
    x = torch.linspace(0, 3, width).view(1, 1, -1, 1)
    return (127.5 + 120 * torch.sin(x + y + 0.2 * t + phase)).round().to(torch.uint8)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, smooth_clip(9), 24, {"prompt": 'é 红 "x"\n', "seed": 7})
    return path


def test_video_round_trip(written: Path) -> None:
    frames, fps = read_video(written)
    assert frames.shape == (9, 48, 64, 3) and frames.dtype == torch.uint8
    assert fps == 24
    assert psnr(frames, smooth_clip(9)) > 38
    info = probe_video(written)
    assert (info.width, info.height, info.frames, info.fps) == (64, 48, 9, 24)


def test_flat_colours_keep_their_value(tmp_path: Path) -> None:
    """A wrong matrix or range on one side would move saturated colours by tens of levels."""
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 255, 255], [0, 0, 0]]
    )
    frames = colours.to(torch.uint8).view(-1, 1, 1, 3).expand(-1, 32, 32, 3)
    write_video(tmp_path / "flat.mp4", frames, 8, crf=1)
    read, _ = read_video(tmp_path / "flat.mp4")
    assert (read.int() - frames.int()).abs().max() <= 4
    with av.open(str(tmp_path / "flat.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and context.pix_fmt == "yuv420p"
        assert (context.colorspace, context.color_range) == (1, 1)


def test_metadata_survives(written: Path, tmp_path: Path) -> None:
    assert read_metadata(written) == {"prompt": 'é 红 "x"\n', "seed": 7}
    write_image(tmp_path / "frame.png", smooth_clip()[0], {"prompt": "红", "seed": 1})
    assert read_metadata(tmp_path / "frame.png") == {"prompt": "红", "seed": 1}


def test_image_is_lossless(tmp_path: Path) -> None:
    from PIL import Image

    frame = smooth_clip()[0]
    write_image(tmp_path / "frame.png", frame)
    with Image.open(tmp_path / "frame.png") as image:
        assert image.mode == "RGB"
        assert torch.equal(torch.tensor(list(image.tobytes())), frame.flatten().long())


def test_fractional_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "ntsc.mp4", smooth_clip(), 30000 / 1001)
    assert math.isclose(probe_video(tmp_path / "ntsc.mp4").fps, 30000 / 1001, rel_tol=1e-6)


def test_max_frames(written: Path) -> None:
    frames, _ = read_video(written, max_frames=5)
    assert frames.shape[0] == 5
    with pytest.raises(ValueError, match="max_frames must be positive"):
        read_video(written, max_frames=0)


def test_budget_is_checked_before_decoding(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "numpy.stack", lambda *_: pytest.fail("decoded although the header is over the budget")
    )
    with pytest.raises(ValueError, match="more than 1000 pixels"):
        read_video(written, max_pixels=1000)


def test_budget_is_checked_again_while_decoding(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header may lie about the number of frames."""
    from hunyuan_fast.data import video

    honest = video._info

    def lying(path: Path, stream: object) -> video.VideoInfo:
        info = honest(path, stream)
        return video.VideoInfo(info.width, info.height, 1, info.fps)

    monkeypatch.setattr(video, "_info", lying)
    with pytest.raises(ValueError, match=rf"more than {3 * 48 * 64} pixels"):
        read_video(written, max_pixels=3 * 48 * 64)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "got float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"got uint8 \(8, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\(2, 3, 8, 8\)"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), "must not be empty"),
        (torch.zeros(1, 7, 8, 3, dtype=torch.uint8), "even height and width, got 7x8"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "x.mp4", frames, 24)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -1, 1e6, math.nan])
def test_wrong_rate_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps must be in"):
        write_video(tmp_path / "x.mp4", smooth_clip(), fps)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a video at all", b"\x00\x00\x00\x18ftypmp42" + bytes(64)],
    ids=["empty", "text", "header only"],
)
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    for read in (read_video, probe_video, read_metadata):
        with pytest.raises(ValueError, match=r"bad\.mp4"):
            read(path)
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png is not a readable PNG"):
        read_metadata(path)


def test_truncated_file(written: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    data = written.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        read_video(cut)


def test_no_video_stream(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "tone.wav"), "wb") as tone:
        tone.setnchannels(1)
        tone.setsampwidth(2)
        tone.setframerate(8000)
        tone.writeframes(bytes(1600))
    with pytest.raises(ValueError, match=r"tone\.wav"):
        read_video(tmp_path / "tone.wav")


@pytest.mark.parametrize(
    "place", ["concat:clip.mp4|clip.mp4", "subfile,,start,0,end,0,,:clip.mp4", "http://localhost/x"]
)
def test_protocols_are_file_names_only(
    written: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(written.parent)
    with pytest.raises(FileNotFoundError):
        read_video(place)


def test_playlists_are_refused(written: Path, tmp_path: Path) -> None:
    """A playlist opens further files of its choice; FFmpeg recognises it by content."""
    shutil.copy(written, tmp_path / "clip.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with av.open(str(playlist), format="concat") as container:
        assert container.streams.video, "the playlist itself is well-formed"
    with pytest.raises(ValueError, match=r"list\.mp4"):
        read_video(playlist)


@pytest.mark.parametrize("name", ["-x.mp4", "a b'\".mp4", "concat:x.mp4", "é红.mp4", "%03d.mp4"])
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, smooth_clip(2), 24)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert read_video(name)[0].shape[0] == 2


def test_overwrite_policy(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        write_video(path, smooth_clip(), 24, overwrite=False)
    assert path.read_text() == "precious"
    write_video(path, smooth_clip(), 24)
    assert read_video(path)[0].shape[0] == 5


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The file size limit stands for a full disk: the write fails in the middle."""
    path = tmp_path / "x.mp4"
    noise = torch.randint(
        0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for write in (
            lambda: write_video(path, noise, 24),
            lambda: write_image(path, noise[0]),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_obeys_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
