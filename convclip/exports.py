"""A trained model for other libraries: a run, a checkpoint or a weight file as a folder in one of three formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from convclip.config import load_recipe, nearest
from convclip.evaluation.run_record import about_file, about_run
from convclip.models import DualTower, build_model
from convclip.models.checkpoint_weights import checkpoint_path, load_from, recipe_of
from convclip.models.export import Export, export_open_clip, refuse_in_use
from convclip.models.onnx_export import export_onnx, refuse_without_packages
from convclip.models.transformers_export import export_transformers, refuse_other_towers
from convclip.models.weights import load_exact
from convclip.schema import Recipe, UserError

FORMATS = ("open_clip", "transformers", "onnx")


def export_checkpoint(
    source: Path,
    folder: Path,
    form: str,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
) -> list[str]:
    """Write what `source` holds to the new `folder`, whole or not at all; what to tell the user, in lines.

    `source`: a run (its best checkpoint), a checkpoint, or with `recipe` a safetensors file of that recipe's model.
    `ema`: the moving average of a run's weights.
    Errors: UserError for an unknown `form`, a folder in use, a video model, a tower that the format cannot hold.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form!r} is not known{nearest(form, FORMATS)}: give one of {', '.join(FORMATS)}")
    if ema and recipe:
        raise UserError(f"--ema goes with a run or a checkpoint, {source} is a weight file (--recipe): leave it out")
    # All that can be refused is, before anything large is read.
    refuse_in_use(folder)
    if form == "onnx":
        refuse_without_packages()
    found = load_recipe(recipe, overrides) if recipe else recipe_of(checkpoint_path(source), overrides)
    _refuse_video(found, source)
    if form == "transformers":
        refuse_other_towers(found.model)
    # Shown where reading or writing takes more than two seconds; ONNX has a bar of its own.
    with tqdm(total=2, desc="exporting", delay=2, unit="step", disable=form == "onnx") as bar:
        model, about = _read(source, found, recipe is not None, ema)
        bar.update()
        lines = write_export(model, found, folder, form, about)
        bar.update()
    return [f"wrote {folder}", *lines]


def _read(source: Path, recipe: Recipe, is_file: bool, ema: bool) -> tuple[DualTower, str]:
    """The model with its weights, in eval mode, and what its card says of them."""
    model = build_model(recipe.model)
    if is_file:
        load_exact(model, source)
        return model.eval(), about_file(str(source), recipe)
    path, state = load_from(model, source, ema)
    return model.eval(), about_run(path, recipe, state, ema)


def write_export(model: DualTower, recipe: Recipe, folder: Path, form: str, about: str) -> list[str]:
    """Write `model` to the new `folder` in one of FORMATS; how it is loaded, and notes.

    `about` is what the model card says of where its weights come from. Errors: UserError.
    """
    if form == "transformers":
        notes = export_transformers(model, recipe.model, folder, about)
        how = f'load it with transformers.VisionTextDualEncoderModel.from_pretrained("{folder}")'
        return [how, *(f"note: {note}" for note in notes)]
    if form == "onnx":
        said = export_onnx(model, recipe.model, folder, about)
        return [*said, f'load it with onnxruntime.InferenceSession("{folder}/image.onnx"), and text.onnx likewise']
    done: Export = export_open_clip(model, recipe.model, folder, about)
    if done.for_open_clip:
        lines = [f'load it with open_clip.create_model_and_transforms("local-dir:{done.folder}")']
    else:
        lines = [f'load it with convclip.models.export.load_export("{done.folder}")']
    return [*lines, *([f"note: {done.note}"] if done.note else [])]


def _refuse_video(recipe: Recipe, source: Path) -> None:
    """No format has a place for a model of videos. Errors: UserError."""
    if recipe.task == "video":
        raise UserError(
            f"{source} is a model of videos, whose temporal part no format has a place for: it cannot be exported; "
            f"score it with launch/evaluate.py --checkpoint {source}, or name an image recipe's run"
        )
