"""What one micro batch feeds the towers and the losses, on the device.

Pictures, or what the store holds of them; token ids, or stored embeddings. Shapes: B batch, D embed, T tokens,
C channels and H.W size of a feature map, S image side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """A micro batch. `image` is pixels [B, 3, S, S] at boundary 0, else what enters layer group `boundary`."""

    image: Tensor
    boundary: int
    text: Tensor | None
    image_id: Tensor
    # Unit-length embeddings [B, D] of a locked text tower, in place of `text`.
    text_embedding: Tensor | None = None
    # Unit-length embeddings [B, D'] of the teacher, and its exponentiated logit scale [1].
    teacher: tuple[Tensor, Tensor, Tensor] | None = None
    # Unit-length embeddings [B, D] of the reference head.
    reference: Tensor | None = None

    def model_inputs(self, without_text: bool = False) -> tuple[Any, ...]:
        """Arguments of DualTower.forward."""
        return self.image, None if without_text else self.text, self.boundary

    def with_prefix(self, features: Tensor, boundary: int) -> Inputs:
        """The same batch, its pictures replaced by what the frozen part of the tower made of them."""
        return replace(self, image=features, boundary=boundary)

    def with_reference(self, reference: Tensor | None = None) -> Inputs:
        """The same batch with the reference head's embeddings."""
        return replace(self, reference=reference)


def join(tensors: list[Tensor | None]) -> Tensor | None:
    """The batches' rows end to end; None where they have none."""
    return None if tensors[0] is None else torch.cat(tensors)
