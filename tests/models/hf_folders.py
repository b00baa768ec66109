"""Tiny Hugging Face text encoders as folders: config.json, random weights by transformers, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from convclip import schema

WIDTH, WORDS = 32, 50
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 34,
}
# (class of the released file, its sizes): with heads as they are released, so that names have the encoder's prefix.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForPreTraining", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT),
    "distilbert": ("DistilBertForMaskedLM", {"dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "mpnet": ("MPNetForMaskedLM", BERT),
    # A window of 9 in captions of up to 30 tokens; every other block sees all of them.
    "modernbert": (
        "ModernBertForMaskedLM",
        {
            **BERT,
            **{"local_attention": 8, "global_attn_every_n_layers": 2},
            **{"embedding_dropout": 0.1, "mlp_dropout": 0.1, "attention_dropout": 0.1},
        },
    ),
    # Heads whose widths do not add up to the encoder's, as Flan-T5's.
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": WIDTH, "d_kv": 6, "num_heads": 3, "num_layers": 3, "num_decoder_layers": 1, "d_ff": 48},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 34}),
}
# Ids of padding, start and end; GPT-2 has an end token alone, which it is padded with.
SPECIAL = {"t5": (0, None, 1), "roberta": (1, 0, 2), "xlm-roberta": (1, 0, 2), "mpnet": (1, 0, 2)}
GPT2_END = WORDS - 1


def special(kind: str) -> tuple[int, int | None, int]:
    """Ids of padding, start and end tokens."""
    return (GPT2_END, None, GPT2_END) if kind == "gpt2" else SPECIAL.get(kind, (0, 2, 3))


def configuration(kind: str, **options: Any) -> Any:
    """transformers' configuration of a tiny encoder."""
    padding, start, end = special(kind)
    ids: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end}
    if kind == "modernbert":
        ids |= {"cls_token_id": start, "sep_token_id": end}
    if kind != "gpt2":
        ids["pad_token_id"] = padding
    sizes = {**KINDS[kind][1], "vocab_size": WORDS, **ids, **options}
    return transformers.AutoConfig.for_model(kind, **sizes)


def write_encoder(folder: Path, kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A folder as they are released, with random weights large enough to tell one token from another; its model."""
    torch.manual_seed(seed)
    model = getattr(transformers, KINDS[kind][0])(configuration(kind, **options))
    for parameter in model.parameters():
        size = 0.3 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0, size)
    model.save_pretrained(folder)
    write_tokenizer(folder, kind)
    return model.eval()


def write_tokenizer(folder: Path, kind: str, words: int = WORDS) -> None:
    """Its tokenizer: `w5` is id 5, with the special tokens of the kind around a caption."""
    padding, start, end = special(kind)
    names = {padding: "<pad>", start: "<s>", end: "</s>", WORDS - 2: "<unk>"}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(words)}
    if kind == "gpt2":
        vocabulary = {"<unk>" if n == WORDS - 2 else "</s>" if n == end else f"w{n}": n for n in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given = {"eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    if kind != "gpt2":
        pieces = [("</s>", end)] if start is None else [("<s>", start), ("</s>", end)]
        single = "$A </s>" if start is None else "<s> $A </s>"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
        given |= {"pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given).save_pretrained(folder)


def text_section(folder: Path | str, **options: Any) -> schema.TextTowerConfig:
    """A recipe's `model.text`."""
    return schema.TextTowerConfig(**{"kind": "hf", "model": str(folder), "context_length": 30, **options})


def captions(kind: str, lengths: tuple[int, ...] = (5, 23, 2, 30), total: int = 30) -> tuple[Tensor, Tensor]:
    """(token ids [B, total], mask [B, total]): random words between the special tokens, then padding."""
    padding, start, end = special(kind)
    tokens = torch.full((len(lengths), total), padding)
    for row, length in zip(tokens, lengths, strict=True):
        generator = torch.Generator().manual_seed(length)
        row[:length] = torch.randint(5, WORDS - 2, (length,), generator=generator)
        if start is not None:
            row[0] = start
        row[length - 1] = end
    return tokens, (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def change_config(folder: Path, **values: Any) -> None:
    """Set fields of a folder's config.json; None removes one."""
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
