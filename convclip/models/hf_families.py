"""The Hugging Face text encoders that can be towers: where each has its parts. Data alone; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What an encoder's attention needs besides the hidden states:
# padding: a mask of padding. causal: nothing. t5, mpnet: a position bias that all blocks share, with the mask.
# rotary: a mask for each block's window, and rotations.
Attention = Literal["padding", "causal", "t5", "mpnet", "rotary"]


@dataclass(frozen=True)
class Family:
    """Where an encoder of transformers has its parts, by the names of its submodules."""

    # transformers' class.
    model: str
    blocks: str
    attention: Attention = "padding"
    # The first turns token ids into hidden states. With them, what belongs to no block but is used by them.
    embeddings: tuple[str, ...] = ("embeddings",)
    # A table of positions that is added outside of `embeddings`' first module.
    positions: str | None = None
    # What follows the last block.
    norm: str | None = None
    # Fields of its configuration: dropout of the embeddings and behind the norm, where no module in them does it.
    embeddings_dropout: str | None = None
    norm_dropout: str | None = None
    # Whether transformers adds a pooler above it, which is left out here.
    has_pooler: bool = False
    # Whether positions are counted from pad_token_id + 1 on, in a table of max_position_embeddings.
    offset: bool = False
    # How released files begin the encoder's names, and those of heads, which are left out.
    prefix: str = ""
    heads: tuple[str, ...] = ()


_BERT_HEADS = ("cls.", "lm_head.", "pooler.", "classifier.", "qa_outputs.")


def _roberta(model: str) -> Family:
    return Family(model, "encoder.layer", has_pooler=True, offset=True, prefix="roberta.", heads=_BERT_HEADS)


# model_type of a config.json -> its structure.
FAMILIES = {
    "bert": Family("BertModel", "encoder.layer", has_pooler=True, prefix="bert.", heads=_BERT_HEADS),
    "roberta": _roberta("RobertaModel"),
    "xlm-roberta": _roberta("XLMRobertaModel"),
    "distilbert": Family(
        "DistilBertModel",
        "transformer.layer",
        prefix="distilbert.",
        heads=("vocab_", "pre_classifier.", "classifier.", "qa_outputs."),
    ),
    "mpnet": Family(
        "MPNetModel",
        "encoder.layer",
        "mpnet",
        embeddings=("embeddings", "encoder.relative_attention_bias"),
        has_pooler=True,
        offset=True,
        prefix="mpnet.",
        heads=_BERT_HEADS,
    ),
    "modernbert": Family(
        "ModernBertModel",
        "layers",
        "rotary",
        norm="final_norm",
        prefix="model.",
        heads=("head.", "decoder.", "classifier."),
    ),
    "t5": Family(
        "T5EncoderModel",
        "block",
        "t5",
        embeddings=("embed_tokens",),
        norm="final_layer_norm",
        embeddings_dropout="dropout_rate",
        norm_dropout="dropout_rate",
        prefix="encoder.",
        heads=("decoder.", "lm_head."),
    ),
    "gpt2": Family(
        "GPT2Model",
        "h",
        "causal",
        embeddings=("wte", "wpe"),
        positions="wpe",
        norm="ln_f",
        embeddings_dropout="embd_pdrop",
        prefix="transformer.",
        heads=("lm_head.", "score."),
    ),
}
# Ends of names that are constants, not weights.
CONSTANTS = (".position_ids", ".token_type_ids", ".inv_freq", ".attn.bias", ".attn.masked_bias")
# Names of old files and today's.
RENAMED = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    "shared.weight": "embed_tokens.weight",
}
