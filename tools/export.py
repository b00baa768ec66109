"""Export a trained model to a folder that open_clip, transformers or onnxruntime loads, with a model card.

    python tools/export.py --checkpoint runs/tiny --output_dir runs/tiny/export
    python tools/export.py --checkpoint runs/tiny --output_dir runs/tiny/onnx --format onnx

open_clip holds every tower that it can build; others are written for convclip only, and said so. transformers holds a
timm trunk with head average_linear and open_clip's causal text tower, as VisionTextDualEncoderModel. onnx is one file
for each tower, image.onnx and text.onnx, checked with onnxruntime; it needs `pip install onnx onnxscript onnxruntime`.

The checkpoint is a run's folder (its best checkpoint), one of its checkpoints, or a safetensors file of convclip's or
open_clip's names, for which --recipe says the model.
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
    parser.add_argument("--format", default="open_clip", help="open_clip (default), transformers or onnx")
    add_ema(parser)
    add_overrides(parser)
    return run("export", export, parser.parse_args(arguments))


def export(options: argparse.Namespace) -> None:
    """Write the folder and say how to use it."""
    # Imported late: --help should not wait for torch.
    from convclip.exports import export_checkpoint

    given = (options.checkpoint, options.output_dir, options.format, options.recipe, options.overrides, options.ema)
    print("\n".join(export_checkpoint(*given)))


if __name__ == "__main__":
    sys.exit(main())
