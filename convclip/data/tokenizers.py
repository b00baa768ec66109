"""Captions to token ids: open_clip's byte-pair tokenizer, or a Hugging Face tokenizer of the text tower's kind.

Shapes: B captions, T tokens (the tower's context length).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from convclip import schema

Tokenizer = Callable[[list[str]], torch.Tensor]

# Files of which a tokenizer's folder holds one.
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
# An encoder's table is at most rounded up: a tokenizer with fewer of its ids is cut, or another's.
SMALLEST_SHARE = 0.9


def build_tokenizer(tower: schema.TextTowerConfig) -> Tokenizer:
    """A callable `list[str] -> int64 [B, T]` for the text tower; it can be sent to data workers.

    Raises:
        UserError: the tokenizer cannot be found, or its ids do not fit the tower.
    """
    if tower.tokenizer == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=tower.context_length)
        _check_vocabulary(tower, tokenizer.vocab_size)
        return tokenizer
    if tower.kind == "hf":
        return _of_encoder(tower)
    return EndTokenTokenizer(_load_hugging_face(tower), tower.context_length)


@dataclass
class EndTokenTokenizer:
    """A Hugging Face tokenizer whose rows are caption, one end token, and end tokens as padding.

    GPT-2 has no padding token; the model pools at the first end token, which `argmax` finds because the end token
    has the highest id. `padding` is another id for what follows the end token.
    """

    tokenizer: Any
    context_length: int
    padding: int | None = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, T]; longer captions are cut so that the end token stays."""
        end = self.tokenizer.eos_token_id
        padding = end if self.padding is None else self.padding
        tokens_BT = torch.full((len(texts), self.context_length), padding, dtype=torch.long)
        if not texts:
            return tokens_BT
        cleaned = [" ".join(text.split()) for text in texts]
        # add_special_tokens=False: some tokenizers' own settings would append an end token of their own.
        for row, ids in zip(tokens_BT, self.tokenizer(cleaned, add_special_tokens=False).input_ids, strict=True):
            ids = ids[: self.context_length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, end], dtype=torch.long)
        return tokens_BT


@dataclass
class SpecialTokenTokenizer:
    """A Hugging Face tokenizer with its own special tokens around a caption, and `padding` on the right."""

    tokenizer: Any
    context_length: int
    padding: int

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, T]; longer captions are cut so that the special tokens at the end stay."""
        tokens_BT = torch.full((len(texts), self.context_length), self.padding, dtype=torch.long)
        if not texts:
            return tokens_BT
        cleaned = [" ".join(text.split()) for text in texts]
        encoded = self.tokenizer(cleaned, truncation=True, max_length=self.context_length)
        for row, ids in zip(tokens_BT, encoded.input_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return tokens_BT


def _of_encoder(tower: schema.TextTowerConfig) -> Tokenizer:
    """The tokenizer of a Hugging Face encoder (kind hf), checked against the encoder's configuration."""
    if tower.config is None:
        raise ValueError("the encoder's config.json is not read yet: `with_encoder` does that")
    key, name = ("model", tower.model or "") if tower.tokenizer == "model" else ("tokenizer", tower.tokenizer)
    if os.path.isdir(name) and not any(os.path.isfile(os.path.join(name, file)) for file in TOKENIZER_FILES):
        # Without them transformers makes up a tokenizer that knows the special tokens alone.
        raise schema.UserError(
            f"model.text.{key}: the folder {name} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy it "
            "there, or name its folder in model.text.tokenizer"
        )
    tokenizer, padding = _from_folder(name, key), tower.config["pad_token_id"]
    # GPT-2 has neither padding nor special tokens of its own: an end token is put behind each caption.
    ends = tower.config["model_type"] == "gpt2"
    _check_encoder(tower, tokenizer, ends, f"model.text.{key}: the tokenizer {name}")
    kind = EndTokenTokenizer if ends else SpecialTokenTokenizer
    return kind(tokenizer, tower.context_length, padding)


def _check_encoder(tower: schema.TextTowerConfig, tokenizer: Any, ends: bool, what: str) -> None:
    """UserError where `what` is no tokenizer of the encoder: its ids, padding or, where it needs them, end tokens."""
    assert tower.config is not None
    vocabulary = tokenizer.get_vocab()
    size, known = max(vocabulary.values(), default=-1) + 1, tower.vocab_size
    remedy = "they are of two models, or a file is cut: copy the encoder's own"
    if size > known or len(vocabulary) < SMALLEST_SHARE * known:
        raise schema.UserError(
            f"{what} has {len(vocabulary)} tokens up to id {size - 1}, the encoder {known}; {remedy}"
        )
    name = "eos_token_id" if ends else "pad_token_id"
    own, wanted = getattr(tokenizer, name), tower.config[name]
    if own != wanted and (ends or own is not None):
        raise schema.UserError(f"{what} has {name} {own}, the encoder's config.json {wanted}; {remedy}")


def _load_hugging_face(tower: schema.TextTowerConfig) -> Any:
    """A tokenizer for kind gpt2."""
    name = tower.tokenizer
    tokenizer = _from_folder(name, "tokenizer")
    highest = max(tokenizer.get_vocab().values())
    if tokenizer.eos_token_id != highest:
        raise schema.UserError(
            f"model.text.tokenizer: the end token of {name} has id {tokenizer.eos_token_id}, but pooling at the first "
            f"end token needs it to be the highest id ({highest})"
        )
    _check_vocabulary(tower, highest + 1)
    return tokenizer


def _from_folder(name: str, key: str) -> Any:
    """The tokenizer of a folder or name; `key` is where the recipe names it. Errors: UserError."""
    # Fast tokenizers warn when used after the data workers fork; the workers are the parallelism here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The second is a name that transformers makes up at run time.
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]

    # Only vocab.json and merges.txt, as GPT-2 was released: nothing in such a folder names the tokenizer's class.
    bare = os.path.isdir(name) and {"vocab.json", "merges.txt"} <= set(os.listdir(name))
    loader = GPT2TokenizerFast if bare and "tokenizer.json" not in os.listdir(name) else AutoTokenizer
    try:
        tokenizer = (
            # Unsaid, a folder that names code of its own has transformers ask at the terminal whether to run it.
            AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if loader is AutoTokenizer
            else loader.from_pretrained(name)
        )
    # The tokenizers package raises a bare Exception for a file that it cannot read.
    except Exception:
        files = "tokenizer.json and tokenizer_config.json, or vocab.json and merges.txt"
        where = f"folder {name} holds no readable tokenizer"
        if not os.path.isdir(name):
            where = f"{name!r} is no folder, is not in the Hugging Face cache and cannot be downloaded"
        raise schema.UserError(
            f"model.text.{key}: {where}: give a folder that holds {files}, as in --set model.text.tokenizer=FOLDER"
        ) from None
    if loader is GPT2TokenizerFast:
        _check_merges(name, tokenizer)
    # Cutting to the context length is ours; without this, transformers warns about every long caption.
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def _check_merges(folder: str, tokenizer: Any) -> None:
    """UserError where merges.txt does not make all tokens of vocab.json: cut, it would split captions otherwise."""
    with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as file:
        made = {line.rstrip("\n").replace(" ", "") for line in file if not line.startswith("#version")}
    words = [word for word in tokenizer.get_vocab() if len(word) > 1 and not word.startswith("<")]
    lost = [word for word in words if word not in made]
    if lost:
        raise schema.UserError(
            f"model.text.tokenizer: merges.txt of {folder} lacks {len(lost):,} of the {len(words):,} merges that its "
            f"vocab.json is of, the first is {lost[0][:40]!r}: it is cut or of another tokenizer, copy both again"
        )


def _check_vocabulary(tower: schema.TextTowerConfig, size: int) -> None:
    if size > tower.vocab_size:
        raise schema.UserError(
            f"model.text.vocab_size is {tower.vocab_size}, but tokenizer {tower.tokenizer} has {size} ids: "
            f"set model.text.vocab_size to at least {size}"
        )
