"""Export a trained model to a folder that open_clip loads: create_model_and_transforms("local-dir:FOLDER").

    python tools/export_open_clip.py --checkpoint runs/tiny --output_dir runs/tiny/export

The checkpoint is a run's folder (its best checkpoint), one of its checkpoints, or a safetensors file of convclip's or
open_clip's names, for which --recipe says the model. A model with GPT-2 has no place in open_clip: it is exported as
safetensors for convclip only, and said so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.command_line import add_overrides, run
from convclip.config import Recipe, UserError, load_recipe


def main(arguments: list[str] | None = None) -> int:
    """Export what the command line names; 2 with one line on stderr when that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run, its checkpoint, or a .safetensors file")
    parser.add_argument("--recipe", help="recipe of a .safetensors file's model; a run knows its own")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder to write")
    add_overrides(parser)
    return run("export_open_clip", export, parser.parse_args(arguments))


def export(options: argparse.Namespace) -> None:
    """Build the checkpoint's model, load it exactly, write the folder and say how to use it."""
    # Imported late: --help should not wait for torch.
    from convclip.models import build_model
    from convclip.models.checkpoint_weights import checkpoint_path, load_from, recipe_of
    from convclip.models.export import export_open_clip
    from convclip.models.weights import load_exact

    if options.recipe is None:
        path = checkpoint_path(options.checkpoint)
        recipe = recipe_of(path, options.overrides)
        refuse_video(recipe, options.checkpoint)
        model = build_model(recipe.model)
        load_from(model, options.checkpoint)
    else:
        recipe = load_recipe(options.recipe, options.overrides)
        refuse_video(recipe, options.checkpoint)
        model = build_model(recipe.model)
        load_exact(model, options.checkpoint)
    done = export_open_clip(model, recipe.model, options.output_dir)
    print(f"wrote {done.folder}")
    if done.for_open_clip:
        print(f'load it with open_clip.create_model_and_transforms("local-dir:{done.folder}")')
    else:
        print('load it with convclip.models.export.load_export("' + str(done.folder) + '")')
    if done.note:
        print(f"note: {done.note}")


def refuse_video(recipe: Recipe, source: Path) -> None:
    """open_clip has no place for a model of videos. Errors: UserError."""
    if recipe.task == "video":
        raise UserError(
            f"{source} is a model of videos, whose temporal part open_clip has no place for: it cannot be exported; "
            f"score it with launch/evaluate.py --checkpoint {source}, or name an image recipe's run"
        )


if __name__ == "__main__":
    sys.exit(main())
