"""Pack pictures and captions in COCO's layout into WebDataset shards with a wids index, or videos into a frame store.

    python tools/make_shards.py --annotations captions_train2017.json --images train2017 --output_dir coco --split train
        [--samples_per_shard 1000] [--resize 256] [--workers N] [--seed 0] [--skip_missing]

    python tools/make_shards.py --kind video --videos VideoData --split_csv MSRVTT_train.9k.csv MSRVTT_JSFUSION_test.csv
        --output_dir frames [--resize 224] [--frames 12] [--fps 1] [--workers N]

Annotations are COCO's, or Karpathy's (dataset_coco.json, dataset_flickr30k.json, whose --images is the folder above
train2014): of these --split names the images taken, and `train` takes those of `restval` too.

A stopped run goes on where it was when the same command is given again. Pictures that cannot be used are listed in
<split>.skipped.jsonl; which they are: convclip/data/jpeg.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from convclip.command_line import run
from convclip.data.coco import missing_files, read_coco
from convclip.data.jpeg import QUALITY
from convclip.data.shard_writer import image_members, reasons, skipped_entry, write_shards
from convclip.schema import UserError

# Beyond these nothing sensible is meant, and memory runs out.
LARGEST = {"workers": 1024, "frames": 1000, "fps": 240, "resize": 4096}


def make_shards(args: argparse.Namespace) -> None:
    for name in ("samples_per_shard", "workers", "resize"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    images = read_coco(args.annotations, args.split)
    remedy = None if args.skip_missing else "check --images, or pass --skip_missing to go on without them"
    missing = set(missing_files(images, args.images, remedy))
    skipped = [skipped_entry(image, "missing file") for image in images if image.file_name in missing]
    present = [image for image in images if image.file_name not in missing]
    skipped += [skipped_entry(image, "no captions") for image in present if not image.captions]
    written = write_shards(
        [image for image in present if image.captions],
        partial(image_members, folder=args.images, shorter_side=args.resize),
        args.output_dir,
        args.split,
        {"kind": "image", "resize": args.resize, "quality": QUALITY},
        skipped=skipped,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        workers=args.workers,
    )
    print(
        f"{args.output_dir}: {written.shards} {args.split} shards ({written.reused} were there), {written.samples}"
        f" samples, {written.captions} captions, {written.size / 1e6:.1f} MB"
    )
    if written.skipped:
        print(f"{reasons(written.skipped)}, see {args.output_dir / args.split}.skipped.jsonl")


def make_frame_store(args: argparse.Namespace) -> None:
    """Decode the videos of the split CSVs once, into a frame store."""
    # They import torch, which would take each process that packs pictures some seconds.
    from convclip.video.frame_store import FrameSettings, write_frame_store
    from convclip.video.msrvtt import find_videos, read_video_ids

    for name in ("workers", "frames", "fps", "resize"):
        value = getattr(args, name)
        # Written so that it is true of NaN too.
        if value is not None and not 0 < value <= LARGEST[name]:
            raise UserError(f"--{name} {value}: must be more than 0 and at most {LARGEST[name]}")
    names = dict.fromkeys(name for path in args.split_csv for name in read_video_ids(path))
    wanted = {"size": args.resize, "frames": args.frames, "fps": args.fps}
    settings = FrameSettings(**{name: value for name, value in wanted.items() if value is not None})
    report = write_frame_store(find_videos(args.videos, list(names)), args.output_dir, settings, args.workers)
    print(
        f"{args.output_dir}: frames of {report.decoded + report.reused} videos ({report.reused} were there), "
        f"{len(report.skipped)} skipped, {len(report.notes)} damaged but used"
    )
    for name, reason in {**report.skipped, **report.notes}.items():
        print(f"{name}: {reason}")


def make(args: argparse.Namespace) -> None:
    """Write what --kind says; UserError where a flag that the kind needs is not there."""
    for name in {"image": ("annotations", "images", "split"), "video": ("videos", "split_csv")}[args.kind]:
        if getattr(args, name) is None:
            raise UserError(f"--{name} is needed with --kind {args.kind}")
    (make_shards if args.kind == "image" else make_frame_store)(args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["image", "video"], default="image")
    parser.add_argument("--annotations", type=Path, help="image: COCO's or Karpathy's captions (.json or .json.gz)")
    parser.add_argument("--images", type=Path, help="image: folder of the image files")
    parser.add_argument(
        "--split", help="image: name of the shards, <split>-000000.tar; of Karpathy's splits, the one to take"
    )
    parser.add_argument("--videos", type=Path, help="video: folder of the video files")
    parser.add_argument("--split_csv", type=Path, nargs="+", help="video: CSVs with a column video_id")
    parser.add_argument("--frames", type=int, help="video: frames kept of each; default: 12")
    parser.add_argument("--fps", type=float, help="video: frames looked at per second; default: 1")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--samples_per_shard", type=int, default=1000)
    parser.add_argument("--resize", type=int, help="shorter side in pixels; default: keep; video: 224")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of the samples")
    parser.add_argument("--skip_missing", action="store_true", help="go on without image files that are missing")
    interrupted = "; the same command goes on with the shards that are still missing"
    return run("make_shards", make, parser.parse_args(), interrupted)


if __name__ == "__main__":
    sys.exit(main())
