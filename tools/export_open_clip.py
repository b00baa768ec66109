"""Export a trained model to a folder that open_clip loads: create_model_and_transforms("local-dir:FOLDER").

    python tools/export_open_clip.py --checkpoint runs/tiny --output_dir runs/tiny/export

The checkpoint is a run's folder (its best checkpoint), one of its checkpoints, or a safetensors file of convclip's or
open_clip's names, for which --recipe says the model. A model with GPT-2 has no place in open_clip: it is exported as
safetensors for convclip only, and said so. tools/export.py writes other formats too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.command_line import add_ema, add_overrides, run


def main(arguments: list[str] | None = None) -> int:
    """Export what the command line names; 2 with one line on stderr when that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run, its checkpoint, or a .safetensors file")
    parser.add_argument("--recipe", help="recipe of a .safetensors file's model; a run knows its own")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder to write")
    add_ema(parser)
    add_overrides(parser)
    return run("export_open_clip", export, parser.parse_args(arguments))


def export(options: argparse.Namespace) -> None:
    """Write the folder and say how to use it."""
    # Imported late: --help should not wait for torch.
    from convclip.exports import export_checkpoint

    given = (options.checkpoint, options.output_dir, "open_clip", options.recipe, options.overrides, options.ema)
    print("\n".join(export_checkpoint(*given)))


if __name__ == "__main__":
    sys.exit(main())
