"""Tokenizers against open_clip's, and a GPT-2-like one built here."""

import json
import pickle
import shutil

import open_clip
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import GPT2TokenizerFast

from convclip.data.tokenizers import build_tokenizer
from convclip.schema import TextTowerConfig, UserError

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """Byte-level vocabulary with two merges and the end token last, as GPT-2's files come."""
    folder = tmp_path_factory.mktemp("gpt2")
    _write_gpt2(folder, [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", END])
    return folder


def _write_gpt2(folder, words):
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")


def _tower(folder, length=6, vocab_size=50257):
    return TextTowerConfig(kind="gpt2", tokenizer=str(folder), context_length=length, vocab_size=vocab_size)


def test_open_clip_tokens():
    texts = ["A man riding a wave.", "", "caf\u00e9 " * 100]
    tokens = build_tokenizer(TextTowerConfig())(texts)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 77)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32")(texts))
    assert build_tokenizer(TextTowerConfig(context_length=32))(texts).shape == (3, 32)


def test_gpt2_rows_end_with_the_end_token(gpt2_folder):
    tokens = build_tokenizer(_tower(gpt2_folder))(["the", "a\n  b", "", "the the the the the the"])
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    end, the, space = vocabulary[END], vocabulary["the"], vocabulary["\u0120"]
    assert tokens.tolist() == [
        [the, end, end, end, end, end],
        [vocabulary["a"], space, vocabulary["b"], end, end, end],
        [end] * 6,
        [the, space, the, space, the, end],
    ]
    # The model pools at the first end token, found by argmax.
    assert tokens.argmax(-1).tolist() == [1, 3, 0, 5]


def test_saved_folder_gives_the_same_tokens(gpt2_folder, tmp_path):
    GPT2TokenizerFast.from_pretrained(str(gpt2_folder)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    texts = ["the cat on the mat", "x"]
    saved = build_tokenizer(_tower(tmp_path))
    assert torch.equal(saved(texts), build_tokenizer(_tower(gpt2_folder))(texts))
    assert torch.equal(pickle.loads(pickle.dumps(saved))(texts), saved(texts))


def test_user_errors(gpt2_folder, tmp_path):
    with pytest.raises(UserError, match=r"'gpt2' is no folder.*give a folder"):
        build_tokenizer(TextTowerConfig(kind="gpt2"))
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        build_tokenizer(_tower(tmp_path))
    for content in (b"", b'{"a": ', b"\xff\xfe", b"{}"):
        shutil.copytree(gpt2_folder, tmp_path / "broken", dirs_exist_ok=True)
        (tmp_path / "broken" / "vocab.json").write_bytes(content)
        with pytest.raises(UserError, match="broken holds no readable tokenizer"):
            build_tokenizer(_tower(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"vocab_size is 100, but .* has 259 ids"):
        build_tokenizer(_tower(gpt2_folder, vocab_size=100))
    with pytest.raises(UserError, match="vocab_size"):
        build_tokenizer(TextTowerConfig(vocab_size=1000))


def test_end_token_must_be_the_highest_id(tmp_path):
    _write_gpt2(tmp_path, [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])
    with pytest.raises(UserError, match=r"end token .* has id 0.*highest id \(258\)"):
        build_tokenizer(_tower(tmp_path))


def test_merges_that_are_cut_are_refused(tmp_path):
    """They would split captions otherwise, and nothing would say so."""
    _write_gpt2(tmp_path, [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", END])
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    with pytest.raises(UserError, match=r"merges.txt of .* lacks 1 of the 2 merges .* the first is 'the': it is cut"):
        build_tokenizer(_tower(tmp_path))
