"""tools/make_shards.py from outside: results, kill and resume, and one line with exit code 2 for each mistake."""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from convclip.schema import UserError
from convclip.video.frame_store import FrameStore
from tests.processes import run_script

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 12


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with images/ (12 pictures) and captions.json."""
    (tmp_path / "images").mkdir()
    table = {"images": [], "annotations": []}
    for number in range(COUNT):
        Image.new("RGB", (40 + number, 60), (20 * number, 90, 10)).save(tmp_path / "images" / f"{number}.jpg")
        table["images"].append({"id": number, "file_name": f"{number}.jpg"})
        table["annotations"] += [{"id": number * 2 + k, "image_id": number, "caption": f"c{k}"} for k in range(2)]
    (tmp_path / "captions.json").write_text(json.dumps(table))
    return tmp_path


def command(source: Path, *more: object) -> list[str]:
    fixed = ["--annotations", source / "captions.json", "--images", source / "images", "--split", "train"]
    fixed += ["--output_dir", source / "out", "--samples_per_shard", 3]
    return [sys.executable, str(REPOSITORY / "tools" / "make_shards.py"), *map(str, [*fixed, *more])]


def run(source: Path, *more: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(source, *more), capture_output=True, text=True, cwd=REPOSITORY, check=False, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line besides what a progress bar has drawn."""
    lines = [line for line in done.stderr.splitlines() if line and "sample/s" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("make_shards: ") and all(word in lines[0] for word in words), done.stderr


def test_a_run_a_second_run_and_its_summary(source):
    (source / "images" / "4.jpg").write_bytes(b"")
    done = run(source, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "4 train shards (0 were there), 11 samples, 22 captions" in done.stdout
    assert "1 skipped (1 empty file), see " in done.stdout and "train.skipped.jsonl" in done.stdout
    before = contents(source / "out")
    again = run(source, "--workers", 2)
    assert again.returncode == 0 and "(4 were there)" in again.stdout and contents(source / "out") == before
    assert_one_line(run(source, "--resize", 32), "resize None", "32")


def test_resize_scales_down(source):
    assert run(source, "--resize", 30, "--workers", 1).returncode == 0
    index = json.loads((source / "out" / "train.index.json").read_text())
    assert index["parameters"]["resize"] == 30 and sum(entry["nsamples"] for entry in index["shardlist"]) == COUNT


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# Python runs a file of this name at its start, in worker processes too.
BLOCKING = """
import builtins, os, time
opened = builtins.open
def open_or_block(path, *arguments, **options):
    if str(path).endswith("images/5.jpg"):
        while not os.path.exists(str(path)[: -len("images/5.jpg")] + "go_on"):
            time.sleep(0.05)
    return opened(path, *arguments, **options)
builtins.open = open_or_block
"""


def start_blocked(source: Path, workers: int) -> subprocess.Popen:
    """A run that cannot open one picture until there is a file source/go_on."""
    (source / "blocking").mkdir()
    (source / "blocking" / "sitecustomize.py").write_text(BLOCKING)
    path = os.pathsep.join(filter(None, [str(source / "blocking"), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command(source, "--workers", workers),
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        # A test run in the background inherits an ignored Ctrl-C; at a terminal it is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_midway(source: Path, workers: int, stop: signal.Signals) -> tuple[subprocess.Popen, str, list[int]]:
    """Start a run that blocks at one picture; stop it when all it can write is written."""
    process = start_blocked(source, workers)
    journal = source / "out" / "train.index.json.part"
    # With one worker the blocked shard also holds up those after it.
    enough = 1 if workers == 1 else 1 + 3
    parts = source / "out"

    def blocked() -> bool:
        written = journal.read_text().count("\n") if journal.exists() else 0
        return written >= enough and any(parts.glob("*.tar.*.part"))

    wait_until(blocked, "the run did not get to the blocked picture")
    children = children_of(process.pid)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)
    else:
        process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    return process, errors, children


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_gone_on_with_and_leaves_no_process(source, workers):
    process, _, children = stop_midway(source, workers, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (len(children) >= 2) == (workers == 2)
    wait_until(lambda: not any(map(alive, children)), "workers outlive the process that started them")
    kept = {name: data for name, data in contents(source / "out").items() if name.endswith(".tar")}
    assert "train.index.json" not in contents(source / "out")
    assert len(kept) == 3 if workers == 2 else len(kept) < 4
    done = run(source, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert f"4 train shards ({len(kept)} were there)" in done.stdout
    whole = run(source, "--output_dir", source / "whole", "--workers", 1)
    assert whole.returncode == 0 and contents(source / "out") == contents(source / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_in_one_line_and_leaves_whole_shards_only(source, workers):
    process, errors, children = stop_midway(source, workers, signal.SIGINT)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.splitlines()[-1].startswith("make_shards: interrupted")
    wait_until(lambda: not any(map(alive, children)), "workers outlive the process that started them")
    assert run(source, "--workers", 1).returncode == 0
    assert run(source, "--output_dir", source / "whole", "--workers", 1).returncode == 0
    assert contents(source / "out") == contents(source / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_run_at_once_is_refused_and_harms_nothing(source, workers):
    """The first waits at a picture; the second says who is writing, and the first then ends as if alone."""
    first = start_blocked(source, workers)
    try:
        wait_until(lambda: any((source / "out").glob("*.tar.*.part")), "the first run writes no shard")
        assert_one_line(
            run(source, "--workers", 1),
            f"split train of {source / 'out'}: another process is writing it (make_shards, host ",
            f", pid {first.pid}, since ",
            "wait for it or stop it",
        )
        # Another split of the same folder is another work.
        other = ("--split", "val", "--images", source / "more", "--annotations", source / "more.json")
        (source / "more").mkdir()
        (source / "more" / "a.jpg").write_bytes((source / "images" / "5.jpg").read_bytes())
        table = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
        (source / "more.json").write_text(json.dumps(table))
        assert run(source, *other, "--workers", 1).returncode == 0
        (source / "go_on").touch()
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 0, errors
    assert run(source, "--output_dir", source / "alone", "--workers", 1).returncode == 0
    written = {name: data for name, data in contents(source / "out").items() if not name.startswith("val")}
    assert written == contents(source / "alone")


def test_missing_images_are_named_or_skipped(source):
    for number in (0, 1, 2, 7):
        (source / "images" / f"{number}.jpg").unlink()
    assert_one_line(run(source), "lacks 4 of 12", "'0.jpg', '1.jpg', '2.jpg', …", "--skip_missing")
    assert not (source / "out").exists()
    done = run(source, "--skip_missing", "--workers", 1)
    assert done.returncode == 0 and "8 samples" in done.stdout and "4 missing file" in done.stdout


def test_images_without_captions_are_skipped(source):
    table = json.loads((source / "captions.json").read_text())
    table["annotations"] = [row for row in table["annotations"] if row["image_id"] not in (3, 8)]
    (source / "captions.json").write_text(json.dumps(table))
    done = run(source, "--workers", 1)
    assert done.returncode == 0 and "10 samples" in done.stdout and "2 no captions" in done.stdout
    lines = [json.loads(line) for line in (source / "out" / "train.skipped.jsonl").read_text().splitlines()]
    assert lines == [{"image_id": n, "file_name": f"{n}.jpg", "reason": "no captions"} for n in (3, 8)]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--workers", 0], "--workers 0"),
        (["--samples_per_shard", -1], "--samples_per_shard -1"),
        (["--resize", 0], "--resize 0"),
        (["--split", "a/b"], "split 'a/b'"),
        (["--annotations", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--annotations", __file__], "not JSON"),
        (["--images", "/nowhere"], "images folder /nowhere"),
        (["--output_dir", f"{__file__}/out"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(source, arguments, word):
    assert_one_line(run(source, *arguments), word)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_output_is_one_line_and_leaves_no_broken_shard(source, workers):
    """No file may grow beyond 8 KiB, as on a full disk; the same command goes on when there is room."""
    limit = (8192, resource.RLIM_INFINITY)
    done = run(source, "--workers", workers, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert_one_line(done, "cannot be written", "File too large")
    assert not [name for name in contents(source / "out") if "tar" in name]
    assert run(source, "--workers", 1).returncode == 0


@pytest.mark.realdata
def test_flickr8k_with_several_workers(realdata, source):
    done = run(
        source,
        *("--annotations", realdata / "flickr8k" / "annotations" / "captions_train.json"),
        *("--images", realdata / "flickr8k" / "train", "--samples_per_shard", 700, "--workers", 2),
    )
    assert done.returncode == 0 and "3 train shards (0 were there), 2000 samples, 10000 captions" in done.stdout
    assert "skipped" not in done.stdout


def test_videos_become_a_frame_store(tmp_path):
    """Defaults: 12 frames of 224 px, one a second; a second call decodes nothing."""
    from tests.video.test_decode import write_video  # needs PyAV

    (tmp_path / "videos").mkdir()
    for name, seconds in (("video1", 3), ("video2", 15)):
        write_video(tmp_path / "videos" / f"{name}.mp4", range(seconds))
    (tmp_path / "split.csv").write_text("key,video_id\nret0,video1\nret1,video2\nret2,video1\n")
    options = ["--kind", "video", "--workers", 1, "--videos", tmp_path / "videos", "--output_dir", tmp_path / "out"]
    options += ["--split_csv", tmp_path / "split.csv"]

    def call(*more: object) -> subprocess.CompletedProcess:
        return run_script("tools/make_shards.py", *map(str, [*options, *more]))

    first, second = call(), call()
    assert "frames of 2 videos (0 were there), 0 skipped" in first.stdout, first.stderr
    assert "frames of 2 videos (2 were there), 0 skipped" in second.stdout, second.stderr
    for flag in ("--frames", "--resize"):
        assert_one_line(call(flag, 0), f"{flag} 0", "more than 0")
    store = FrameStore(tmp_path / "out", size=224, frames=12, fps=1.0)
    assert [(store[name][0].shape, store[name][1]) for name in ("video1", "video2")] == [
        ((12, 3, 224, 224), 3),
        ((12, 3, 224, 224), 12),
    ]


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    from tools.make_shards import make_frame_store

    right = {"workers": 1, "frames": None, "fps": None, "resize": None, "split_csv": [], "videos": tmp_path}
    for name, value in (
        ("fps", math.inf),
        ("fps", math.nan),
        ("fps", 0.0),
        ("fps", 1e9),
        ("frames", 10**9),
        ("resize", -1),
    ):
        with pytest.raises(UserError, match=f"^--{name} {value}: must be more than 0 and at most"):
            make_frame_store(argparse.Namespace(**{**right, name: value}))
