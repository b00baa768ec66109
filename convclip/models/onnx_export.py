"""Export to ONNX: image.onnx and text.onnx, one graph for each tower, checked with onnxruntime against torch.

Shapes: B batch, S image side, T tokens, D embed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from convclip import schema
from convclip.files import whole_folder
from convclip.models.dual_tower import DualTower
from convclip.models.export import refuse_in_use
from convclip.models.hf_folder import tokenizer_files, with_encoder
from convclip.models.hf_text import HfText
from convclip.models.model_card import CARD, how_images_enter, model_card, quoted
from convclip.schema import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Of the largest value of an embedding.
TOLERANCE = 1e-4
# Batch sizes that the export is checked with, neither of them the one it is traced with.
CHECKED = (1, 3)
_TRACED = 2
# A protobuf file ends at 2 GiB: beyond this, weights go to a file beside it.
_MAX_INSIDE = 1_900_000_000


class ImageGraph(nn.Module):
    """Images float32 [B, 3, S, S], normalised -> embeddings float32 [B, D] of unit length."""

    def __init__(self, model: DualTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """As `DualTower.encode_image`."""
        return self.model.encode_image(pixels, normalize=True)


class TextGraph(nn.Module):
    """Token ids int64 [B, T] -> embeddings float32 [B, D] of unit length.

    All columns run: cutting them to the longest caption reads values, which no graph can. Nothing behind a caption's
    end reaches its embedding, so it is the same.
    """

    def __init__(self, model: DualTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """As `DualTower.encode_text`."""
        text = self.model.text
        embeddings = text((text.embed(tokens), text.ends(tokens)), 1)
        return F.normalize(embeddings.float(), dim=-1)


@dataclass(frozen=True)
class _Graph:
    """A tower to export: its file, the names of what goes in and comes out, and of the dimensions that may vary."""

    file: str
    module: nn.Module
    takes: str
    gives: str
    varies: dict[int, str]
    traced: Tensor
    checked: list[Tensor]


def export_onnx(model: DualTower, config: schema.Model, folder: str | Path, about: str = "") -> list[str]:
    """Write image.onnx and text.onnx of `model` in float32 to a new `folder`, whole or not at all; lines that say what
    was checked. The files of a Hugging Face tokenizer come along, and a model card with `about`.

    Errors: UserError when a package is missing, the folder cannot be written, or onnxruntime gives other embeddings.
    """
    refuse_without_packages()
    folder, config = Path(folder), with_encoder(config)
    refuse_in_use(folder)
    tokenizer = tokenizer_files(config.text) if config.text.config is not None else []
    if config.text.config is not None and not tokenizer:
        raise UserError(
            f"the tokenizer of {config.text.model} is gone from its place, and text.onnx is of no use without: "
            "say where it is with --set model.text.tokenizer=FOLDER"
        )
    said = []
    with whole_folder(folder) as part:
        for graph in tqdm(_graphs(model.eval().float(), config), desc="exporting to ONNX", unit="tower"):
            with torch.no_grad(), _attention_for_export(model), _quiet():
                _write(graph, part / graph.file)
                difference = _difference(graph, part / graph.file)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{graph.file} would give other embeddings than torch (relative difference {difference:.1e}): this "
                    "tower cannot be exported to ONNX, use --format open_clip"
                )
            sizes = " and ".join(str(size) for size in CHECKED)
            said.append(f"{graph.file} equals torch within {difference:.1e} for batches of {sizes}")
        for path in tokenizer:
            shutil.copyfile(path, part / path.name)
        (part / CARD).write_text(_card(model, config, folder, about), encoding="utf-8")
    return said


def refuse_without_packages() -> None:
    """UserError where the optional packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)} (convclip's extra `export`)"
        )


def _graphs(model: DualTower, config: schema.Model) -> list[_Graph]:
    generator = torch.Generator().manual_seed(0)
    side, length = config.image.image_size, config.text.context_length
    traced, *checked = [torch.randn(size, 3, side, side, generator=generator) for size in (_TRACED, *CHECKED)]
    image = _Graph("image.onnx", ImageGraph(model), "pixels", "image_embedding", {0: "batch"}, traced, checked)
    # The last check has fewer columns, where these may vary.
    lengths = (length, length, length if model.text.reads_padding else max(2, length // 2))
    sizes = zip((_TRACED, *CHECKED), lengths, strict=True)
    traced, *checked = [_captions(config.text, size, columns, generator) for size, columns in sizes]
    varies = {0: "batch"} if model.text.reads_padding else {0: "batch", 1: "tokens"}
    return [image, _Graph("text.onnx", TextGraph(model), "tokens", "text_embedding", varies, traced, checked)]


def _captions(text: schema.TextTowerConfig, size: int, length: int, generator: torch.Generator) -> Tensor:
    """Token ids [size, length]: random captions of other lengths each, the highest id at their end, then padding."""
    padding = 0 if text.config is None else text.config["pad_token_id"]
    tokens = torch.randint(0, text.vocab_size - 1, (size, length), generator=generator)
    # Padding stands on the right alone.
    tokens[tokens == padding] = 1 if padding == 0 else 0
    for number, row in enumerate(tokens):
        end = max(1, length - 1 - number * length // (2 * size))
        row[end] = text.vocab_size - 1
        row[end + 1 :] = padding
    return tokens


def _write(graph: _Graph, path: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in graph.module.state_dict().values())
    try:
        torch.onnx.export(
            graph.module.eval(),
            (graph.traced,),
            path,
            input_names=[graph.takes],
            output_names=[graph.gives],
            dynamic_shapes=(graph.varies,),
            dynamo=True,
            external_data=size > _MAX_INSIDE,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"torch cannot export this tower as {graph.file} ({reason}): use --format open_clip") from None


def _difference(graph: _Graph, path: Path) -> float:
    """The largest difference between onnxruntime's embeddings and torch's, relative to the largest value."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"onnxruntime cannot load {graph.file} ({reason}): use --format open_clip") from None
    found = 0.0
    for batch in graph.checked:
        expected = graph.module(batch)
        theirs = torch.from_numpy(session.run(None, {graph.takes: batch.numpy()})[0])
        if theirs.shape != expected.shape or not theirs.isfinite().all():
            return float("inf")
        found = max(found, float((theirs - expected).abs().max() / expected.abs().max()))
    return found


@contextlib.contextmanager
def _attention_for_export(model: DualTower) -> Iterator[None]:
    """T5's fused attention has no decomposition for ONNX; its plain one computes the same."""
    if not isinstance(model.text, HfText) or model.text.family.attention != "t5":
        yield
        return
    encoder: Any = model.text.transformer
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own passes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _card(model: DualTower, config: schema.Model, folder: Path, about: str) -> str:
    text = config.text
    loading = (
        "import onnxruntime",
        f"image, text = (onnxruntime.InferenceSession(f) for f in ({quoted(folder, 'image.onnx')}, "
        f"{quoted(folder, 'text.onnx')}))",
        'images, texts = image.run(None, {"pixels": pixels})[0], text.run(None, {"tokens": tokens})[0]',
    )
    if text.tokenizer == "open_clip":
        ids = f"`open_clip.tokenizer.SimpleTokenizer(context_length={text.context_length})` gives them"
    elif text.config is not None:
        ids = (
            f"as `AutoTokenizer.from_pretrained` of this folder gives them with `padding` and `truncation` to at most "
            f"{text.context_length}"
        )
    else:
        ids = "those of the caption by its tokenizer, then one end token, then end tokens as padding"
    columns = f"always {text.context_length}" if model.text.reads_padding else f"up to {text.context_length}"
    bias = "" if model.logit_bias is None else f", plus {model.logit_bias.item():.6g}"
    use = (
        f"`pixels` are float32 [B, 3, {config.image.image_size}, {config.image.image_size}], `tokens` int64 [B, T], "
        f"{columns} columns; the embeddings are float32 [B, {config.embed_dim}] of unit length. Logits are their "
        f"products times {model.logit_scale.exp().item():.6g}{bias}.\n\n{how_images_enter(config)} Token ids: {ids}."
    )
    return model_card(model, config, "onnx", loading, about, use)
