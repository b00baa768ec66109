"""Which parts of a recipe are frozen long enough to be computed once, and what identifies the store that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convclip.data.transforms import EvalTransform, TrainTransform, Views
from convclip.engine.stages.groups import Stage
from convclip.features.layout import ArraySpec, estimate
from convclip.features.reader import state_dict_sha256
from convclip.models.dual_tower import Cut, DualTower
from convclip.models.layer_groups import frozen_cut, layer_groups
from convclip.models.teacher import model_sizes, weights_sha256
from convclip.schema import AS_BEFORE, Recipe, UserError

# What --plan takes an image to have, where the data are not known.
CAPTIONS_PER_IMAGE = 5
# What of `model` in a recipe does not change the features: the weights have a hash of their own.
WITHOUT_FILES: dict[str, bool | set[str]] = {
    "pretrained": True,
    "image": {"pretrained"},
    "text": {"pretrained", "model"},
}
PRECISION_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class FrozenWork:
    """What is stored. `boundary`: the image tower's cut, whose feature maps are stored (0: none). `text`: the text
    embeddings of a locked text tower. `teacher`: the teacher's embeddings."""

    boundary: int
    text: bool
    teacher: bool

    def __bool__(self) -> bool:
        return bool(self.boundary or self.text or self.teacher)

    def arrays(
        self, recipe: Recipe, map_shape: tuple[int, ...], dtype: torch.dtype, teacher_width: int
    ) -> dict[str, ArraySpec]:
        """The store's arrays: maps in the precision they are computed in, unit-length embeddings in float32."""
        arrays: dict[str, ArraySpec] = {}
        if self.boundary:
            arrays["image_map"] = ArraySpec(map_shape, PRECISION_NAMES[dtype], "activation", "view")
        if self.text:
            arrays["text_embedding"] = ArraySpec((recipe.model.embed_dim,), "float32", "unit vector", "caption")
        if self.teacher:
            for name, kind in (("teacher_image", "view"), ("teacher_text", "caption")):
                arrays[name] = ArraySpec((teacher_width,), "float32", "unit vector", kind)
        return arrays

    def frozen_names(self, model: DualTower) -> list[str]:
        """Parameters that the stored features depend on."""
        names = [name for group in layer_groups(model, "image")[: self.boundary] for name in group]
        return names + ([name for name, _ in model.named_parameters() if name.startswith("text.")] if self.text else [])


def frozen_work(model: DualTower, recipe: Recipe, stages: list[Stage]) -> FrozenWork:
    """What of `recipe` can be stored; `stages` are those that training reaches, `model` may be on the meta device.

    The cut lies before everything that an event opens, so that one store serves all stages. Where an event opens the
    whole image tower, the cut lies before what opened earlier, and that last stage runs live.
    """
    boundaries = [frozen_cut(model, stage.trainable).image for stage in stages]
    if recipe.head_alignment is not None:
        # The reference head reads the map before the trunk's final norm.
        boundaries = [min(boundary, model.visual.map_cut) for boundary in boundaries]
    return FrozenWork(
        boundary=min((boundary for boundary in boundaries if boundary), default=0) if boundaries[0] else 0,
        text=not any(name.startswith("text.") for name in stages[0].trainable),
        teacher=recipe.teacher is not None,
    )


def recipe_views(recipe: Recipe) -> Views | None:
    """The fixed views of `recipe`'s images, or None where every row has a crop of its own."""
    count, image = recipe.features.view_count, recipe.model.image
    if count is None:
        return None
    evaluation = EvalTransform(image.image_size, image.interpolation)
    return Views(count, recipe.seed, TrainTransform.of(recipe.data, image), evaluation)


def store_identity(
    recipe: Recipe, work: FrozenWork, weights: Mapping[str, Tensor], captions: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What the store must have been made of.

    `weights` are the parameters of `work.frozen_names`, `captions` the fingerprint of the data's captions.
    """
    views = recipe_views(recipe)
    if views is None:
        raise UserError("features.views is not set: say how many views of each image to store, 1 for the centre crop")
    identity: dict[str, Any] = {
        "model": recipe.model.model_dump_json(exclude=WITHOUT_FILES, context=AS_BEFORE),
        "boundary": work.boundary,
        "text": work.text,
        "precision": PRECISION_NAMES[dtype],
        "weights_sha256": state_dict_sha256(weights),
        "transform": views.describe(),
        "tokenizer": recipe.model.text.tokenizer,
        "captions_sha256": captions,
    }
    if recipe.teacher is not None:
        identity["teacher"] = recipe.teacher.model
        identity["teacher_sha256"] = weights_sha256(recipe.teacher)
    return identity


@torch.no_grad()
def map_shape(model: DualTower, size: int, boundary: int) -> tuple[int, ...]:
    """Shape (C, H, W) of what enters layer group `boundary` of the image tower; images are size x size pixels."""
    training = model.training
    # A batch norm in train mode refuses a single value per channel, as one image's map of 1 x 1 has.
    model.eval()
    image_map, _ = model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device), stop=Cut(boundary))
    model.train(training)
    return tuple(image_map.shape[1:])


def storable(model: DualTower, recipe: Recipe, stages: list[Stage]) -> list[str]:
    """For --plan: what a feature store would hold of `recipe` and its size, a line each; [] where nothing is frozen.

    `model` may be on the meta device; `stages` are those that training reaches. Totals need recipe.rows_per_epoch.
    """
    work = frozen_work(model, recipe, stages)
    if not work:
        return []
    size = recipe.model.image.image_size
    shape: tuple[int, ...] = ()
    if work.boundary:
        shape = map_shape(model, size, work.boundary)
    width = _teacher_width(recipe)
    arrays = work.arrays(recipe, shape, torch.bfloat16, width)
    items = _expected_items(recipe)
    lines = []
    for name, spec in arrays.items():
        shown = "x".join(map(str, spec.row_shape))
        where = f" entering layer group {work.boundary}" if name == "image_map" else ""
        unknown = ", width not known here" if name.startswith("teacher") and not width else ""
        total = f", {estimate({name: spec}, items) / 2**30:.2f} GiB" if items and not unknown else ""
        lines.append(f"{name}: {shown} {spec.dtype}{where} per {spec.item_kind}{unknown}{total}")
    if items:
        counts = " and ".join(f"{count:,} {kind}s" for kind, count in items.items())
        whole = [estimate(work.arrays(recipe, shape, d, width), items) for d in (torch.bfloat16, torch.float32)]
        lines.append(f"about {counts}: {whole[0] / 2**30:.2f} GiB (in fp32 {whole[1] / 2**30:.2f} GiB)")
    return lines


def _expected_items(recipe: Recipe) -> dict[str, int]:
    """Items by kind that recipe.rows_per_epoch stands for; {} where it is not set."""
    rows, views = recipe.rows_per_epoch, recipe.features.view_count or 1
    if rows is None:
        return {}
    images = rows if recipe.data.captions == "one" else round(rows / CAPTIONS_PER_IMAGE)
    captions = rows if recipe.data.captions == "all" else rows * CAPTIONS_PER_IMAGE
    return {"view": images * views, "caption": captions}


def _teacher_width(recipe: Recipe) -> int:
    """The teacher's embedding size by its configuration alone; 0 where that is not at hand."""
    if recipe.teacher is None:
        return 0
    name = recipe.teacher.model
    file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
    if name.startswith("local-dir:") and file.is_file():
        return json.loads(file.read_text(encoding="utf-8-sig"))["model_cfg"]["embed_dim"]
    return (model_sizes(recipe.teacher) or {}).get("embed_dim", 0)
