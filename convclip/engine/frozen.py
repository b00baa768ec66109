"""What of a recipe is frozen for long enough to be computed once, and what identifies the store that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convclip.data.feature_format import ArraySpec
from convclip.data.features import state_dict_sha256
from convclip.data.transforms import EvalTransform, TrainTransform, Views
from convclip.engine.parameter_groups import Stage
from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import frozen_image_boundary, layer_groups
from convclip.models.teacher import weights_sha256
from convclip.schema import Recipe, UserError

PRECISION_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class FrozenWork:
    """`boundary`: what enters this layer group of the image tower is stored (0: nothing). `text`: the text embeddings
    of a locked text tower. `teacher`: the teacher's embeddings."""

    boundary: int
    text: bool
    teacher: bool

    def __bool__(self) -> bool:
        return bool(self.boundary or self.text or self.teacher)

    def arrays(self, recipe: Recipe, map_shape: tuple[int, ...], dtype: torch.dtype, teacher_width: int) -> dict:
        """The store's arrays: maps in the precision they are computed in, unit-length embeddings in float32."""
        arrays = {}
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

    The boundary lies before everything that an event opens, so that one store serves all stages; where an event opens
    the whole image tower, it lies before what was opened until then, and that last stage runs live.
    """
    boundaries = [frozen_image_boundary(model, stage.trainable) for stage in stages]
    if recipe.head_alignment is not None:
        # The reference head reads the map before the trunk's final norm.
        boundaries = [min(boundary, model.visual.map_boundary) for boundary in boundaries]
    return FrozenWork(
        boundary=min((boundary for boundary in boundaries if boundary), default=0) if boundaries[0] else 0,
        text=not any(name.startswith("text.") for name in stages[0].trainable),
        teacher=recipe.teacher is not None,
    )


def recipe_views(recipe: Recipe) -> Views | None:
    """The fixed views of `recipe`'s images, or None where every row has a crop of its own."""
    count, size = recipe.features.view_count, recipe.model.image.image_size
    if count is None:
        return None
    return Views(count, recipe.seed, TrainTransform(size, recipe.data.crop_scale), EvalTransform(size))


def store_identity(
    recipe: Recipe, work: FrozenWork, weights: Mapping[str, Tensor], captions: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What the store must have been made of.

    `weights` are the parameters of `work.frozen_names`, `captions` the fingerprint of the data's captions.
    """
    views = recipe_views(recipe)
    if views is None:
        raise UserError("features.views is not set: say how many views of each image to store, 1 for the centre crop")
    without_files = {"pretrained": True, "image": {"pretrained"}, "text": {"pretrained"}}
    identity: dict[str, Any] = {
        "model": recipe.model.model_dump_json(exclude=without_files),
        "weights_sha256": state_dict_sha256(weights),
        "boundary": work.boundary,
        "text": work.text,
        "precision": PRECISION_NAMES[dtype],
        "transform": views.describe(),
        "tokenizer": recipe.model.text.tokenizer,
        "captions_sha256": captions,
    }
    if recipe.teacher is not None:
        identity["teacher"] = recipe.teacher.model
        identity["teacher_sha256"] = weights_sha256(recipe.teacher)
    return identity
