"""Captions to token ids: open_clip's byte-pair tokenizer, or a Hugging Face tokenizer for GPT-2.

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
    return EndTokenTokenizer(_load_hugging_face(tower), tower.context_length)


@dataclass
class EndTokenTokenizer:
    """A Hugging Face tokenizer whose rows are caption, one end token, and end tokens as padding.

    GPT-2 has no padding token; the model pools at the first end token, which `argmax` finds because the end token
    has the highest id.
    """

    tokenizer: Any
    context_length: int

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, T]; longer captions are cut so that the end token stays."""
        end = self.tokenizer.eos_token_id
        tokens_BT = torch.full((len(texts), self.context_length), end, dtype=torch.long)
        if not texts:
            return tokens_BT
        cleaned = [" ".join(text.split()) for text in texts]
        # add_special_tokens=False: some tokenizers' own settings would append an end token of their own.
        for row, ids in zip(tokens_BT, self.tokenizer(cleaned, add_special_tokens=False).input_ids, strict=True):
            ids = ids[: self.context_length - 1]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return tokens_BT


def _load_hugging_face(tower: schema.TextTowerConfig) -> Any:
    # Fast tokenizers warn when used after the data workers fork; the workers are the parallelism here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The second is a name that transformers makes up at run time.
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]

    name = tower.tokenizer
    # Only vocab.json and merges.txt, as GPT-2 was released: nothing in such a folder names the tokenizer's class.
    bare = os.path.isdir(name) and {"vocab.json", "merges.txt"} <= set(os.listdir(name))
    loader = GPT2TokenizerFast if bare and "tokenizer.json" not in os.listdir(name) else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(name)
    # The tokenizers package raises a bare Exception for a file that it cannot read.
    except Exception:
        files = "tokenizer.json and tokenizer_config.json, or vocab.json and merges.txt"
        where = f"folder {name} holds no readable tokenizer"
        if not os.path.isdir(name):
            where = f"{name!r} is no folder, is not in the Hugging Face cache and cannot be downloaded"
        raise schema.UserError(f"model.text.tokenizer: {where}: give a folder that holds {files}") from None
    if loader is GPT2TokenizerFast:
        _check_merges(name, tokenizer)
    highest = max(tokenizer.get_vocab().values())
    if tokenizer.eos_token_id != highest:
        raise schema.UserError(
            f"model.text.tokenizer: the end token of {name} has id {tokenizer.eos_token_id}, but pooling at the first "
            f"end token needs it to be the highest id ({highest})"
        )
    _check_vocabulary(tower, highest + 1)
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
