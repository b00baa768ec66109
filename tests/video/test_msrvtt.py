"""MSR-VTT's annotation files: order, captions, and what is wrong with them named."""

import gzip
import json

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from convclip.schema import UserError
from convclip.video.msrvtt import find_videos, read_split, tokenize_captions


def write_annotations(folder, sentences, name="data.json"):
    rows = [{"sen_id": i, "video_id": video, "caption": text} for i, (video, text) in enumerate(sentences)]
    text = json.dumps({"info": {}, "videos": [], "sentences": rows})
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def write_csv(folder, text):
    path = folder / "split.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.json.gz"])
def test_training_split_takes_all_captions_of_its_videos_in_the_csvs_order(tmp_path, name):
    annotations = write_annotations(tmp_path, [("a", "a0"), ("b", "b0"), ("c", "c0"), ("b", "b1"), ("a", "a1")], name)
    split = read_split(write_csv(tmp_path, "video_id\nb\na\n"), annotations)
    assert split.video_ids == ("b", "a")
    assert split.captions == ("b0", "b1", "a0", "a1")
    assert split.caption_ids == ("1", "3", "0", "4")
    assert split.video_of_caption.tolist() == [0, 0, 1, 1] and split.counts.tolist() == [2, 2]
    rest = split.without(["b"])
    assert rest.video_ids == ("a",) and rest.captions == ("a0", "a1") and rest.video_of_caption.tolist() == [0, 0]


def test_test_split_keeps_its_own_sentences_and_order(tmp_path):
    rows = 'key,vid_key,video_id,sentence\nret1,m2,v2,"two, with comma"\nret0,m1,v1,one\nret5,m2,v2,again\n'
    split = read_split(write_csv(tmp_path, rows))
    assert split.video_ids == ("v2", "v1")
    assert split.captions == ("two, with comma", "one", "again") and split.caption_ids == ("ret1", "ret0", "ret5")
    assert split.video_of_caption.tolist() == [0, 1, 0] and split.counts.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("name\na\n", "no rows with a column video_id"),
        ("video_id\n", "no rows with a column video_id"),
        ("video_id\na\na\n", "lists 1 videos twice, the first is a"),
        ("video_id\na\nz\n", "no caption for 1 videos of .*the first is z"),
        ("video_id,sentence\na\n", "line 2 is incomplete"),
    ],
)
def test_bad_splits_are_named(tmp_path, csv, message):
    annotations = write_annotations(tmp_path, [("a", "text")])
    with pytest.raises(UserError, match=message):
        read_split(write_csv(tmp_path, csv), annotations)


def test_bad_files_are_named(tmp_path):
    split = write_csv(tmp_path, "video_id\na\n")
    with pytest.raises(UserError, match="name the annotation JSON too"):
        read_split(split)
    with pytest.raises(UserError, match="cannot be read"):
        read_split(tmp_path / "none.csv")
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"sentences": [{"sen_id": 1}]}', '{"sentences": [3]}'):
        bad.write_text(text)
        with pytest.raises(UserError, match="are not MSR-VTT's JSON"):
            read_split(split, bad)


def test_videos_are_found_whatever_their_suffix(tmp_path):
    for name in ("a.mp4", "b.avi", "c.webm", "c.mp4", "d.txt"):
        (tmp_path / name).touch()
    found = find_videos(tmp_path, ["c", "b", "a", "d"])
    assert [path.name for path in found.values()] == ["c.mp4", "b.avi", "a.mp4", "d.mp4"]
    with pytest.raises(UserError, match="no folder"):
        find_videos(tmp_path / "none", ["a"])


def test_captions_are_padded_with_zero_and_keep_their_end():
    tokenizer = SimpleTokenizer()
    tokens = tokenize_captions(["a dog", "word " * 60, ""])
    assert tokens.shape == (3, 32) and tokens.dtype == torch.int64
    assert (tokens.argmax(-1) == torch.tensor([3, 31, 1])).all()
    assert (tokens.max(-1).values == tokenizer.eot_token_id).all()
    assert (tokens[0, 4:] == 0).all() and (tokens[:, 0] == tokenizer.sot_token_id).all()


@pytest.mark.realdata
def test_the_real_splits(realdata):
    full = realdata / "full_annotations"
    sizes = {"MSRVTT_train.9k.csv": (9000, 180_000), "MSRVTT_train.7k.csv": (7010, 140_200)}
    for name, (videos, captions) in sizes.items():
        split = read_split(full / name, full / "MSRVTT_data.json.gz")
        assert (len(split.video_ids), len(split.captions)) == (videos, captions)
        assert (split.counts == 20).all()
    test = read_split(full / "MSRVTT_JSFUSION_test.csv")
    assert test.video_ids[:2] == ("video9770", "video9771") and len(test.captions) == 1000
    assert np.array_equal(test.video_of_caption, np.arange(1000))
