"""Tokenizers of Hugging Face encoders (kind hf) against transformers' own padding and truncation."""

import json
import logging
import pickle

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer

from convclip import schema
from convclip.data.tokenizers import build_tokenizer
from convclip.models.hf_folder import with_encoder
from convclip.models.towers import build_text_tower
from convclip.schema import UserError
from tests.models.hf_folders import change_config, configuration, special, text_section, write_tokenizer

TEXTS = ["w5 w6\n  w7", "", " ".join(f"w{n}" for n in range(5, 30)), "nobody knows w9"]


@pytest.fixture(autouse=True)
def quiet():
    """transformers says where it saves."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def folder_of(folder, kind):
    """config.json and a tokenizer; no weights."""
    configuration(kind).save_pretrained(folder)
    write_tokenizer(folder, kind)
    return folder


def filled(folder, **options):
    return with_encoder(schema.Model(text=text_section(folder, **{"context_length": 8, **options}))).text


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "t5", "modernbert"])
def test_rows_are_transformers_own(tmp_path, kind):
    text = filled(folder_of(tmp_path, kind))
    tokenizer = build_tokenizer(text)
    found = tokenizer(TEXTS)
    cleaned = [" ".join(t.split()) for t in TEXTS]
    own = AutoTokenizer.from_pretrained(tmp_path)
    expected = own(cleaned, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    assert found.dtype == torch.int64 and torch.equal(found, expected.input_ids)
    # Cut, its end token stays; and the tower finds the ends where the tokenizer's mask has them.
    assert found[2, -1] == special(kind)[2]
    assert build_text_tower(text, 16).ends(found).tolist() == (expected.attention_mask.sum(1) - 1).tolist()
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS), found)
    assert tokenizer([]).shape == (0, 8)


@pytest.mark.parametrize("padding", [None, 0])
def test_gpt2_gets_an_end_token_behind_each_caption(tmp_path, padding):
    folder_of(tmp_path, "gpt2")
    change_config(tmp_path, pad_token_id=padding)
    text = filled(tmp_path)
    found = build_tokenizer(text)(TEXTS)
    fill = 49 if padding is None else padding
    assert found[0].tolist() == [5, 6, 7, 49, fill, fill, fill, fill]
    assert found[1].tolist() == [49] + [fill] * 7 and found[2].tolist() == [5, 6, 7, 8, 9, 10, 11, 49]
    assert build_text_tower(text, 16).ends(found).tolist() == [3, 0, 7, 3]


def test_berts_own_vocabulary_file(tmp_path):
    """As bert-base is released: vocab.txt and no tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "##dish", "square", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    configuration("bert", vocab_size=10).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": BertTokenizer.__name__}))
    assert build_tokenizer(filled(tmp_path))(["A reddish square."]).tolist() == [[2, 5, 6, 7, 8, 9, 3, 0]]


def test_folders_without_a_tokenizer_or_with_anothers_are_refused(tmp_path):
    configuration("bert").save_pretrained(tmp_path)

    def refusal(text):
        with pytest.raises(UserError) as caught:
            build_tokenizer(text)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # Without this, transformers makes up a tokenizer for which every word is unknown.
    assert f"model.text.model: the folder {tmp_path} holds no tokenizer (none of" in refusal(filled(tmp_path))
    write_tokenizer(tmp_path, "bert", words=20)
    assert "has 21 tokens up to id 20, the encoder 50; they are of two models" in refusal(filled(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    assert "holds no readable tokenizer" in refusal(filled(tmp_path))
    write_tokenizer(tmp_path, "roberta")
    assert "has pad_token_id 1, the encoder's config.json 0; they are of two models" in refusal(filled(tmp_path))
    write_tokenizer(tmp_path, "bert")
    change_config(tmp_path, vocab_size=40)
    assert "has 50 tokens up to id 49, the encoder 40" in refusal(filled(tmp_path))
    # Another folder's, by its own key.
    change_config(tmp_path, vocab_size=50)
    text = filled(tmp_path, tokenizer=str(tmp_path / "elsewhere"))
    assert "model.text.tokenizer: " in refusal(text) and "elsewhere" in refusal(text)
    change_config(folder_of(tmp_path / "gpt2", "gpt2"), eos_token_id=7)
    assert "has eos_token_id 49, the encoder's config.json 7" in refusal(filled(tmp_path / "gpt2"))


def test_code_in_a_tokenizers_folder_is_not_run(tmp_path, monkeypatch):
    """Nor does transformers ask at the terminal whether to run it."""
    own = tmp_path / "own"
    write_tokenizer(own, "bert")
    (own / "own.py").write_text("raise SystemExit('ran')")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    text = filled(folder_of(tmp_path / "encoder", "bert"), tokenizer=str(own))
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        build_tokenizer(text)
