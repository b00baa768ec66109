"""Export a trained model to a folder that open_clip loads: create_model_and_transforms("local-dir:FOLDER").

    python tools/export_open_clip.py --checkpoint model.safetensors --recipe tiny_cliptext_unfreeze --output_dir export

The checkpoint is a safetensors file (or a folder with one) under convclip's or open_clip's names. A model with GPT-2
has no place in open_clip: it is exported as safetensors for convclip only, and said so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.config import load_recipe
from convclip.schema import Model, UserError


def main(arguments: list[str] | None = None) -> int:
    """Export what the command line names; 2 with one line on stderr when that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="weights: a .safetensors file, or a folder that holds one")
    parser.add_argument("--recipe", required=True, help="name or path of the recipe that the model was built from")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        export(options.checkpoint, recipe.model, options.output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint: str, config: Model, folder: Path) -> None:
    """Build the model of `config`, load `checkpoint` into it exactly, write `folder` and say how to use it."""
    # Imported late: --help should not wait for torch.
    from convclip.models import build_model
    from convclip.models.export import export_open_clip
    from convclip.models.weights import load_exact

    model = build_model(config)
    count = load_exact(model, checkpoint)
    done = export_open_clip(model, config, folder)
    print(f"wrote {done.folder}: {count} tensors")
    if done.for_open_clip:
        print(f'load it with open_clip.create_model_and_transforms("local-dir:{done.folder}")')
    else:
        print('load it with convclip.models.export.load_export("' + str(done.folder) + '")')
    if done.note:
        print(f"note: {done.note}")


if __name__ == "__main__":
    sys.exit(main())
