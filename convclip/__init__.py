"""convclip trains CLIP models with convolutional image towers; `load` gives a trained one to use.

Importing this package imports no torch: `load` does, when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from convclip.clip import Clip
    from convclip.schema import Recipe

__all__ = ["load"]


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    ema: bool = False,
) -> Clip:
    """A trained image-text model, ready to embed images and captions; no DeepSpeed and no process group is needed.

    `source`: a run's folder (its `best` checkpoint, else its `latest`), a checkpoint's folder, an export's folder, or
    a weight file, with `recipe` (a name, a YAML file or a Recipe) saying which model it holds. Or `open_clip:NAME`, one
    of open_clip's convolutional models, with `pretrained`: a tag of that name (where there is a network), a weight
    file, a folder that holds one, or `hf-hub:owner/name`.
    `device`: as torch writes it (`cpu`, `cuda`, `cuda:1`). None: what DS_ACCELERATOR names, else this machine's
    accelerator, else the CPU.
    `dtype`: what the towers compute in: fp32 (default), bf16 or fp16. Embeddings are float32.
    `ema`: the moving average of the weights, of a run or checkpoint that was trained with `optim.ema_decay`.
    `tokenizer`: the folder or name of the text tower's tokenizer, where it is not where the recipe says.

    Errors: `convclip.schema.UserError`, one line, when the source is no trained image-text model, a file is missing or
    damaged, or the device is not there.
    """
    from convclip.clip import load_clip

    return load_clip(source, device, dtype, recipe, tokenizer, pretrained, ema)
