"""Frames of video files: which ones, which way up, and what becomes of files that are not as they should be."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from convclip.video import decode
from convclip.video.decode import VideoError, evenly, read_clip


def write_video(path, times, width=64, height=48, clock=1000, audio_only=False):
    """A clip whose frame i has grey level 10 * i and is shown from times[i] seconds on; the last for 0.1 seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 10 * i % 250, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * clock), Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(clip):
    """Which frames of `write_video` these are."""
    return [round(float(frame.float().mean()) / 10) for frame in clip.frames]


def test_one_frame_per_second_from_the_first_on(tmp_path):
    path = write_video(tmp_path / "a.mp4", [i / 4 for i in range(18)])
    clip = read_clip(path, size=32)
    assert levels(clip) == [0, 4, 8, 12, 16] and clip.note is None
    assert clip.frames.dtype == torch.uint8 and clip.frames.shape == (5, 3, 32, 32)
    assert levels(read_clip(path, size=32, fps=2.0)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_variable_rate_takes_what_is_on_screen(tmp_path):
    times = [0, 0.4, 0.9, 1.6, 4.2, 4.3, 6.0]
    assert levels(read_clip(write_video(tmp_path / "a.mp4", times), size=32)) == [0, 2, 3, 3, 3, 5, 6]


def test_a_clock_that_starts_late_counts_from_the_first_frame(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mkv", [5 + i / 2 for i in range(6)]), size=32)
    assert levels(clip) == [0, 2, 4]


def test_more_frames_are_thinned_by_truncated_linspace(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mp4", range(20)), size=32)
    assert levels(clip) == [int(x) for x in np.linspace(0, 19, 12)]
    assert evenly(3) == [0, 1, 2] and evenly(12) == list(range(12)) and evenly(0) == []


def test_shorter_than_a_second_is_one_frame(tmp_path):
    assert levels(read_clip(write_video(tmp_path / "a.mp4", [0, 0.1, 0.2]), size=32)) == [0]
    assert levels(read_clip(write_video(tmp_path / "b.mp4", [0]), size=32)) == [0]


def test_odd_sizes_and_portrait_give_squares(tmp_path):
    for number, (width, height) in enumerate([(66, 34), (34, 66), (322, 18)]):
        path = write_video(tmp_path / f"{number}.avi", [0, 1], width, height)
        assert read_clip(path, size=30).frames.shape == (2, 3, 30, 30)


def test_a_rotation_mark_turns_frames_upright(tmp_path):
    """Left half black, right half white; a mark of 90 degrees clockwise brings black to the top."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, 32:] = 255
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    track = data.index(b"tkhd")
    place = data.index(straight, track)
    path.write_bytes(data[:place] + clockwise + data[place + len(straight) :])
    frame = read_clip(path, size=32).frames[0].float().mean(0)
    assert frame[:14].mean() < 30 and frame[18:].mean() > 225


def test_files_that_hold_no_video_say_why(tmp_path, monkeypatch):
    good = write_video(tmp_path / "good.mp4", range(4)).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(os.urandom(5000))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "head.mp4").write_bytes(good[:200])
    # Written with its index at the end, as most files are: cut, nothing of it can be found.
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 2])
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reasons = {}
    for name in ("empty", "noise", "text", "head", "cut", "pipe", "sound", "none"):
        with pytest.raises(VideoError) as error:
            read_clip(tmp_path / f"{name}.mp4")
        reasons[name] = str(error.value)
    assert reasons["empty"] == "the file is empty" and reasons["sound"] == "no video stream in it"
    assert reasons["none"] == reasons["pipe"] == "no such file"
    opening = {name: reasons[name] for name in ("noise", "text", "head")}
    assert all("cannot be opened as a video" in reason for reason in opening.values()), opening
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="64 x 48 pixels"):
        read_clip(tmp_path / "good.mp4")
    monkeypatch.undo()
    monkeypatch.setattr(decode, "MAX_SECONDS", 3)
    with pytest.raises(VideoError, match="longer than 3 seconds"):
        read_clip(tmp_path / "good.mp4")


def test_playlists_are_not_followed(tmp_path):
    """FFmpeg would open what they name, and wait for it: a video file is never a reason to reach elsewhere."""
    write_video(tmp_path / "good.mp4", range(3))
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(VideoError, match="cannot be opened"):
            read_clip(tmp_path / name)


def test_a_damaged_file_gives_the_frames_that_can_be_had(tmp_path):
    """Matroska has no index to lose: cut, it still plays to where it ends; overwritten inside, around the hole."""
    path = write_video(tmp_path / "a.mkv", [i / 4 for i in range(40)])
    data = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: int(len(data) * 0.6)])
    assert 2 <= len(read_clip(cut, size=32).frames) < 10
    hole = tmp_path / "hole.mkv"
    middle = len(data) // 2
    hole.write_bytes(data[:middle] + os.urandom(200) + data[middle + 200 :])
    assert len(read_clip(hole, size=32).frames) >= 4


@pytest.mark.realdata
def test_real_clips_of_many_kinds(realdata):
    expected = {
        "askanything_hitting_baseball.mp4": 10,
        "languagebind_0.mp4": 9,
        "msvd_3qqEKTPxLNs_1_15.avi": 12,
        "msvd_WTf5EgVY5uU_124_128.avi": 5,
        "torchcodec_nasa_13013.mp4": 12,
        "videollava_sample_demo_3.mp4": 7,
    }
    for name, count in expected.items():
        clip = read_clip(realdata / "clips" / name)
        assert clip.frames.shape == (count, 3, 224, 224) and clip.note is None, name
        assert clip.frames.float().std() > 20


@pytest.mark.realdata
def test_real_frames_equal_a_reader_of_every_frame(realdata):
    """25 frames per second: second k shows frame 25 k; torchvision resizes and crops."""
    from torchvision.transforms import functional

    path = realdata / "clips" / "torchcodec_nasa_13013.mp4"
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = [int(x) for x in np.linspace(0, -(-len(pictures) // 25) - 1, 12)]
    clip = read_clip(path)
    for frame, second in zip(clip.frames, wanted, strict=True):
        picture = functional.resize(Image.fromarray(pictures[25 * second]), 224, functional.InterpolationMode.BICUBIC)
        expected = np.asarray(functional.center_crop(picture, 224))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)
