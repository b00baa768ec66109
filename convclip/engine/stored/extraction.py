"""Computes once what is frozen: trunk maps, text embeddings and a teacher's embeddings, into the feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from convclip.data.evaluation_set import EvaluationSet, load_evaluation_set
from convclip.data.samples import captions_fingerprint
from convclip.data.sources import open_source
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import normalize
from convclip.devices import current_device
from convclip.distributed import barrier, is_main, rank, world_size
from convclip.engine.stages.groups import reached_stages
from convclip.engine.stored.frozen import FrozenWork, frozen_work, map_shape, recipe_views, store_identity
from convclip.features.ids import Ids
from convclip.features.layout import estimate
from convclip.features.reader import FeatureStore, view_ids
from convclip.features.writer import FeatureWriter
from convclip.models.batch_norm import to_precision
from convclip.models.dual_tower import Cut, DualTower
from convclip.models.teacher import Teacher
from convclip.schema import Recipe, UserError

VERIFIED_ITEMS = 32
ComputedRows: TypeAlias = tuple[Ids, dict[str, Tensor]]


def expected_store(recipe: Recipe, model: DualTower, dtype: torch.dtype) -> tuple[FrozenWork, dict[str, Any]]:
    """What of `recipe` a store holds, and the identity that it must have; `model` as the run starts with it."""
    if recipe.data.train is None:
        raise UserError("data.train is not set: name the training data with --train_data")
    work = frozen_work(model, recipe, reached_stages(model, recipe))
    if not work:
        raise UserError(f"recipe {recipe.name}: nothing is frozen from the start, so there is nothing to store")
    captions = captions_fingerprint(open_source(recipe.data.train, recipe.data))
    # Whole modules: a batch norm's running statistics count too.
    modules = {name.rpartition(".")[0] for name in work.frozen_names(model)}
    weights = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] in modules}
    return work, store_identity(recipe, work, weights, captions, dtype)


class Extraction:
    """The frozen towers and teacher of a recipe, and the features they give for its training data."""

    def __init__(self, recipe: Recipe, model: DualTower, dtype: torch.dtype) -> None:
        """`model` as a run starts with it, in fp32; it is moved to the device and to `dtype`."""
        self.work, self.identity = expected_store(recipe, model, dtype)
        self.recipe, self.dtype = recipe, dtype
        self.device = current_device()
        model.reference = None
        self.model: DualTower = to_precision(model, dtype, self.device).requires_grad_(False).eval()
        self.teacher = Teacher(recipe.teacher).to(self.device, dtype) if recipe.teacher else None
        if self.teacher is not None:
            self.identity["teacher_logit_scale"] = self.teacher.scale
        views = recipe_views(recipe)
        assert views is not None  # `store_identity` refuses a recipe without
        self.views = views
        self.batch, self.workers = recipe.evaluation.batch, recipe.data.workers
        self.rows = rows_at_a_time(recipe)
        shape = map_shape(self.model, recipe.model.image.image_size, self.work.boundary)
        self.arrays = self.work.arrays(recipe, shape, dtype, self.teacher.width if self.teacher else 0)

    def open_data(self) -> EvaluationSet:
        """The training data's usable images and captions, each once."""
        recipe = self.recipe
        tokenizer = build_tokenizer(recipe.model.text)
        assert recipe.data.train is not None  # `expected_store` refuses a recipe without
        return load_evaluation_set(recipe.data.train, recipe.data, self.views.evaluation, tokenizer)

    def item_ids(self, data: EvaluationSet) -> dict[str, np.ndarray]:
        """Ids of the store's items: views of images, captions."""
        count = self.views.count
        kinds = {spec.item_kind for spec in self.arrays.values()}
        views = np.concatenate([view_ids(data.image_ids, view, count) for view in range(count)])
        for kind, items in (("image", data.image_ids), ("caption", data.caption_ids)):
            self._refuse_equal(kind, items)
        return {kind: ids for kind, ids in (("view", views), ("caption", data.caption_ids.numpy())) if kind in kinds}

    def _refuse_equal(self, kind: str, ids: Tensor) -> None:
        values, counts = ids.unique(return_counts=True)
        if (counts > 1).any():
            raise UserError(
                f"{self.recipe.data.train}: {kind} id {values[counts > 1][0]} occurs twice, and a feature store has "
                f"one row for each: make them differ, or leave image_id and caption_ids out of the samples' JSON"
            )

    def compute(self, data: EvaluationSet, kind: str, ids: np.ndarray) -> Iterator[ComputedRows]:
        """(ids, rows by array) of items of one kind, batch by batch."""
        ids = np.asarray(ids)
        if kind == "caption":
            yield from self._captions(data, ids)
            return
        number_of = {int(image): number for number, image in enumerate(data.image_ids)}
        for view in range(self.views.count):
            own = ids[ids % self.views.count == view]
            numbers = [number_of[int(item) // self.views.count] for item in own]
            first = 0
            for _, pixels in data.read_views(numbers, self.views, view, self.rows, self.workers):
                yield own[first : first + len(pixels)], self._images(pixels.to(self.device))
                first += len(pixels)

    @torch.no_grad()
    def _images(self, pixels: Tensor) -> dict[str, Tensor]:
        rows, count = {}, len(pixels)
        if count < self.rows:
            # The last ones: filled up, for the reason that `rows_at_a_time` gives.
            pixels = pixels[torch.arange(self.rows, device=pixels.device) % count]
        if self.work.boundary:
            tower = self.recipe.model.image
            images = normalize(pixels, tower.mean, tower.std, self.dtype)
            rows["image_map"] = self.model(images, stop=Cut(self.work.boundary)).image.cpu()
        if self.teacher is not None:
            rows["teacher_image"] = self.teacher.encode_image(pixels).cpu()
        return {name: values[:count] for name, values in rows.items()}

    @torch.no_grad()
    def _captions(self, data: EvaluationSet, ids: np.ndarray) -> Iterator[ComputedRows]:
        number_of = {int(caption): number for number, caption in enumerate(data.caption_ids)}
        numbers = [number_of[int(item)] for item in ids]
        tokenizers = [None] if self.teacher is None else [None, self.teacher.tokenizer]
        streams = [data.read_texts(numbers, self.batch, self.workers, tokenizer) for tokenizer in tokenizers]
        first = 0
        for batches in zip(*streams, strict=True):
            tokens = [batch.to(self.device) for _, batch in batches]
            rows = {}
            if self.work.text:
                rows["text_embedding"] = self.model(texts=tokens[0]).text.cpu()
            if self.teacher is not None:
                rows["teacher_text"] = self.teacher.encode_text(tokens[1]).cpu()
            yield ids[first : first + len(tokens[0])], rows
            first += len(tokens[0])


def rows_at_a_time(recipe: Recipe) -> int:
    """How many images are computed together: as many as in a live run, at most `evaluation.batch`.

    Convolutions of small maps choose their algorithm by the size of the batch, and round otherwise: with another one,
    features of MobileNets, FastViT and RepViT differ by some 1e-6 from those of a live run.
    """
    try:
        rows, _ = recipe.batch.per_rank(world_size())
    except UserError:
        # Another number of ranks will train from the store.
        return recipe.evaluation.batch
    return min(rows, recipe.evaluation.batch)


def extract(work: Extraction, path: Path) -> None:
    """Fill the feature store at `path` on all ranks; what an earlier, killed run has done is not done again."""
    data = work.open_data()
    ids = work.item_ids(data)
    counts = {kind: len(items) for kind, items in ids.items()}
    if is_main():
        size = estimate(work.arrays, counts) / 2**30
        print(
            f"{path}: {', '.join(f'{n} {kind}s' for kind, n in counts.items())}, {size:.3f} GiB when done", flush=True
        )
    writer = FeatureWriter(path, work.arrays, work.identity, ids, rank(), world_size())
    write_missing(writer, ids, lambda kind, missing: work.compute(data, kind, np.asarray(missing)))


def write_missing(writer: FeatureWriter, kinds: Iterable[str], compute: Callable[..., Iterator[ComputedRows]]) -> None:
    """Write what `compute(kind, missing ids)` gives of this rank's items, then finish the store; a collective."""
    for kind in kinds:
        missing = writer.missing(kind)
        bar = tqdm(total=len(missing), desc=f"extracting {kind}s", unit=kind, disable=not is_main())
        for items, rows in compute(kind, missing):
            writer.write(items, rows)
            bar.update(len(items))
        bar.close()
    writer.finish()
    barrier()
    if is_main():
        writer.finish()
    barrier()


def verify(work: Extraction, path: Path) -> dict[str, float]:
    """Compute a sample of the store's rows again; largest difference by array. UserError where it is another store."""
    store = FeatureStore(path, work.identity)
    data = work.open_data()
    worst: dict[str, float] = {}
    for kind, ids in work.item_ids(data).items():
        sample = ids[np.random.default_rng(0).choice(len(ids), min(VERIFIED_ITEMS, len(ids)), replace=False)]
        for items, rows in work.compute(data, kind, sample):
            for name, values in rows.items():
                difference = (store.read(name, items).float() - values.float()).abs().max().item()
                worst[name] = max(worst.get(name, 0.0), difference)
    return worst
