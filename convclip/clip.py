"""A trained dual tower to use: images and captions to embeddings, without DeepSpeed. `convclip.load` gives one.

Shapes: N images, T captions, D embed, S image side, H.W an image as stored.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from convclip import schema
from convclip.config import first_problem, load_recipe
from convclip.data.pixels import plain_picture
from convclip.data.samples import BrokenSample, decode_image
from convclip.data.tokenizers import TOKENIZER_FILES, Tokenizer, build_tokenizer
from convclip.data.transforms import EvalTransform, normalize, stack_images
from convclip.devices import PRECISIONS, pick_device
from convclip.models import DualTower, build_model
from convclip.models.batch_norm import to_precision
from convclip.models.checkpoint_weights import checkpoint_path, load_from, recipe_of
from convclip.models.export import OUR_CONFIG, load_export
from convclip.models.hf_folder import with_encoder
from convclip.models.weights import HUB, load_exact
from convclip.schema import Recipe, UserError

# In place of a file or folder: a model by its name.
OPEN_CLIP = "open_clip:"
# Decoding releases Python's lock; more threads than this do not feed a tower faster.
THREADS = min(8, os.cpu_count() or 1)

# Pillow decodes an image when it is first used, and one image may stand in a list twice.
_DECODING = threading.Lock()

# A path, an image, or uint8 pixels [3, H, W].
Picture: TypeAlias = str | Path | Image.Image | Tensor
Row = TypeVar("Row")


@dataclass(frozen=True, eq=False)
class Clip:
    """A dual tower in eval mode on `device`, whose parameters take no gradients, with what feeds it.

    `transform` turns a PIL image into uint8 [3, S, S], as in evaluation; `tokenizer` turns captions into token ids
    int64 [T, context length], cut as in training. `recipe` is that of the run; None for an export, which holds the
    model's part of it alone. `config` is that part. `logit_scale` is exponentiated; `logit_bias` is the sigmoid loss's.
    """

    model: DualTower = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    transform: EvalTransform
    config: schema.Model
    recipe: Recipe | None = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    logit_scale: float
    logit_bias: float | None

    @torch.no_grad()
    def embed_images(self, images: Picture | Iterable[Picture], batch: int = 64, progress: bool = True) -> Tensor:
        """Images -> float32 [N, D] of unit length, on the CPU. One image is a list of one: [1, D]; none: [0, D].

        Each is a path, a PIL image, or a uint8 tensor [3, H, W] of values 0..255; a tensor may be [N, 3, H, W] as
        well. All are resized, cropped and normalised as in evaluation; like there, an EXIF rotation is not applied.
        `batch` images are computed at a time. `progress` shows a bar when it takes more than two seconds.

        Errors: UserError names an image that cannot be read, is broken, or exceeds `data.max_image_pixels`.
        """
        tower = self.config.image
        with ThreadPoolExecutor(THREADS) as threads:

            def embed(numbered: Sequence[tuple[int, Picture]]) -> Tensor:
                pixels = stack_images(list(threads.map(self._pixels, numbered)))
                values = normalize(pixels.to(self.device), tower.mean, tower.std, self.dtype)
                return self.model.encode_image(values, normalize=True)

            return self._embed(_as_list(images), embed, batch, progress, "embedding images")

    @torch.no_grad()
    def embed_texts(self, captions: str | Iterable[str], batch: int = 256, progress: bool = True) -> Tensor:
        """Captions -> float32 [T, D] of unit length, on the CPU. One caption is a list of one: [1, D]; none: [0, D].

        Captions longer than the text tower's context are cut. `batch` and `progress` as in `embed_images`.
        Errors: UserError names a caption that is no text.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)

        def embed(numbered: Sequence[tuple[int, str]]) -> Tensor:
            tokens = self.tokenizer([_checked_caption(number, caption) for number, caption in numbered])
            return self.model.encode_text(tokens.to(self.device), normalize=True)

        return self._embed(captions, embed, batch, progress, "embedding captions")

    def similarity(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Logits float32 [N, T] on the CPU: the logit scale x the cosine, plus the logit bias where there is one.

        A softmax over a row gives the probabilities of captions for an image. With a sigmoid loss's bias, a sigmoid
        gives the probability of each pair by itself.
        """
        cosine = image_embeddings.float().cpu() @ text_embeddings.float().cpu().T
        return self.logit_scale * cosine + (self.logit_bias or 0.0)

    def _embed(
        self,
        rows: Sequence[Row],
        embed: Callable[[Sequence[tuple[int, Row]]], Tensor],
        batch: int,
        progress: bool,
        what: str,
    ) -> Tensor:
        """What `embed` gives of (number, row), `batch` rows at a time: [len(rows), D]."""
        if batch < 1:
            raise UserError(f"batch {batch} is not a number of rows: give 1 or more")
        found = torch.empty(len(rows), self.config.embed_dim)
        numbered = list(enumerate(rows))
        # Work that ends within two seconds shows no bar.
        with tqdm(total=len(rows), desc=what, delay=2, disable=not progress) as bar:
            for first in range(0, len(rows), batch):
                part = numbered[first : first + batch]
                found[first : first + len(part)] = embed(part)
                bar.update(len(part))
        return found

    def _pixels(self, numbered: tuple[int, Picture]) -> Tensor:
        """Image number i as uint8 [3, S, S]; UserError names its path, or its number where it has none."""
        number, picture = numbered
        limit = (self.recipe.data if self.recipe else schema.Data()).max_image_pixels
        name = str(picture) if isinstance(picture, str | Path) else f"picture {number}"
        try:
            if isinstance(picture, str | Path):
                return self.transform(decode_image(name, Path(picture).read_bytes(), limit))
            if isinstance(picture, Tensor):
                return self.transform(_picture_of(picture))
            if isinstance(picture, Image.Image):
                name = str(getattr(picture, "filename", "") or name)
                with _DECODING:
                    picture.load()
                return self.transform(plain_picture(picture))
        except BrokenSample as error:
            raise UserError(f"{error}: mend this picture or leave it out") from None
        # Pillow decodes an image that somebody else opened only now, and its decoders raise nearly anything.
        except (OSError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}: {reason}: mend this picture or leave it out") from None
        raise UserError(
            f"picture {number} is a {type(picture).__name__}: give a path, a PIL picture or a uint8 tensor [3, H, W]"
        )


def load_clip(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    recipe: str | Path | Recipe | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    ema: bool = False,
) -> Clip:
    """What `convclip.load` gives; it says what the arguments are. Errors: UserError."""
    place, precision = pick_device(device), _precision(dtype)
    # Building a tower draws random weights: the caller's generators must not move.
    with torch.random.fork_rng(devices=[]):
        model, config, own = _read(source, recipe, pretrained, ema)
    scale = model.logit_scale.detach().exp().item()
    bias = None if model.logit_bias is None else model.logit_bias.item()
    text = config.text
    if tokenizer is not None:
        text = text.model_copy(update={"tokenizer": str(tokenizer)})
    elif text.tokenizer != "open_clip" and any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        # An export takes its tokenizer along, where somebody has put it there for open_clip.
        text = text.model_copy(update={"tokenizer": str(source)})
    return Clip(
        model=to_precision(model.requires_grad_(False), precision, place).eval(),
        tokenizer=build_tokenizer(text),
        transform=EvalTransform(config.image.image_size, config.image.interpolation),
        config=config,
        recipe=own,
        device=place,
        dtype=precision,
        # Taken in fp32: rounding its logarithm to bf16 changes the scale by up to 1.6 %.
        logit_scale=scale,
        logit_bias=bias,
    )


def _read(
    source: str | Path, recipe: str | Path | Recipe | None, pretrained: str | Path | None, ema: bool
) -> tuple[DualTower, schema.Model, Recipe | None]:
    """The model that `source` holds, on the CPU in fp32, its configuration, and the recipe where there is one."""
    place = Path(source)
    is_run = any((place / name).is_file() for name in ("state.json", "best", "latest", "recipe.yaml"))
    is_export = (place / OUR_CONFIG).is_file()
    if ema and (is_export or not is_run):
        raise UserError(f"ema=True goes with a run or a checkpoint; {source} is neither: leave it out")
    if str(source).startswith(OPEN_CLIP):
        if recipe is not None:
            raise UserError(f"{source} says itself which model it is: leave recipe= out")
        return *_released(str(source).removeprefix(OPEN_CLIP), pretrained), None
    if pretrained is not None:
        raise UserError(f"pretrained= goes with a source {OPEN_CLIP}NAME; {source} holds its own weights: leave it out")
    if (is_run or is_export) and recipe is not None:
        raise UserError(f"{source} says itself which model it holds: leave recipe= out")
    if is_export:
        return *load_export(place), None
    if is_run:
        path = checkpoint_path(place)
        own = _image_text(recipe_of(path), path)
        model = build_model(own.model)
        load_from(model, place, ema)
        return model, own.model, own
    if not place.exists() and not str(source).startswith(HUB):
        raise UserError(f"{source}: no such file or folder; give a run's, a checkpoint's or an export's folder")
    if recipe is None:
        what = "holds no run, checkpoint or export" if place.is_dir() else "does not say which model it holds"
        raise UserError(f"{source} {what}: if it holds weights, name their model with recipe=")
    own = _image_text(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), source)
    own = own.model_copy(update={"model": with_encoder(own.model)})
    model = build_model(own.model)
    load_exact(model, source)
    return model, own.model, own


def _released(name: str, pretrained: str | Path | None) -> tuple[DualTower, schema.Model]:
    """open_clip's model `name` with all of its weights, and its configuration."""
    source = f"{OPEN_CLIP}{name}"
    values = {"open_clip": name, "pretrained": None if pretrained is None else str(pretrained)}
    try:
        config = schema.Model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_problem(error, schema.Model).removeprefix('recipe: ')}") from None
    if config.pretrained is None:
        tags = schema.RELEASED[name].tags if name in schema.RELEASED else ()
        tag = f"a tag ({', '.join(tags)}), " if tags else ""
        raise UserError(f"{source} needs its weights: give pretrained={tag}a file, a folder or {HUB}owner/name")
    model = build_model(config)
    load_exact(model, config.pretrained)
    return model, config


def _image_text(recipe: Recipe, source: str | Path) -> Recipe:
    if recipe.task == "video":
        raise UserError(
            f"{source} is a video model, and convclip.load is for pictures: score it with "
            f"launch/evaluate.py --checkpoint {source}"
        )
    return recipe


def _precision(dtype: str | torch.dtype | None) -> torch.dtype:
    known = {**PRECISIONS, **{str(value).removeprefix("torch."): value for value in PRECISIONS.values()}}
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UserError(f"dtype {name} is not one that a model computes in here: give {', '.join(PRECISIONS)}")
    return known[name]


def _as_list(images: Picture | Iterable[Picture]) -> list[Picture]:
    if isinstance(images, Tensor):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, str | Path | Image.Image) else list(images)


def _picture_of(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image; ValueError for anything else."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise ValueError(f"a tensor {tuple(pixels.shape)} of {pixels.dtype} is not uint8 [3, H, W], RGB of 0 to 255")
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _checked_caption(number: int, caption: str) -> str:
    if not isinstance(caption, str):
        raise UserError(f"caption {number} is a {type(caption).__name__}: give text")
    # Half of a surrogate pair, as left by reading a file in a wrong encoding; some tokenizers crash on it.
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"caption {number} is no Unicode text: read its file in the encoding it was written in")
    return caption
