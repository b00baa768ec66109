"""The frozen reference of head alignment: a pretrained model's own average-pool head.

A ConvNeXt has a norm in that head; a trunk that ends with its last map, such as an EfficientNet, has none.

Shapes: B batch, C channels and H.W size of the trunk's last map, D embed.
"""

from __future__ import annotations

from torch import Tensor, nn

from convclip import schema
from convclip.models.weights import open_clip_names, read_weights
from convclip.schema import UserError

_NORM = "visual.trunk.head.norm"
_PROJECTION = "visual.head.proj.weight"


class ReferenceHead(nn.Module):
    """Average pool, norm, linear projection: what open_clip's pretrained convnext_base_w ends with.

    Its norm is its own copy, since the trunk's may be unlocked and drift. Frozen, always in eval mode.
    """

    def __init__(self, channels: int, embed_dim: int, has_norm: bool = True):
        super().__init__()
        # timm's eps for ConvNeXt.
        self.norm = nn.LayerNorm(channels, eps=1e-6) if has_norm else nn.Identity()
        self.proj = nn.Linear(channels, embed_dim, bias=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        """The image tower's map at its `map_cut` [B, C, H, W] -> embeddings [B, D], not normalised."""
        return self.proj(self.norm(features.mean(dim=(2, 3))))


def load_reference_head(config: schema.Model, has_norm: bool = True) -> ReferenceHead:
    """The reference head from the open_clip checkpoint that `config` starts from.

    `has_norm`: whether the trunk has parameters behind its last map; the one kind known is a ConvNeXt's norm.
    Errors: UserError when it names none, or the checkpoint's head is no average pool + linear of the recipe's width.
    """
    source = config.pretrained or config.image.pretrained
    if source is None or source == "timm":
        raise UserError("head_alignment needs model.pretrained: an open_clip checkpoint with an average-pool head")
    tensors = open_clip_names(read_weights(source))
    norm = {"norm.weight": f"{_NORM}.weight", "norm.bias": f"{_NORM}.bias"} if has_norm else {}
    names = {**norm, "proj.weight": _PROJECTION}
    pooled = any(name.startswith("visual.head.pool.") for name in tensors)
    if pooled or any(name not in tensors for name in names.values()):
        raise UserError(f"{source}: its image head is not average pool, norm and linear: nothing to align to")
    projection = tensors[_PROJECTION]
    if projection.shape[0] != config.embed_dim:
        raise UserError(f"{source}: its head embeds into {projection.shape[0]}, model.embed_dim is {config.embed_dim}")
    head = ReferenceHead(projection.shape[1], config.embed_dim, has_norm)
    head.load_state_dict({own: tensors[name] for own, name in names.items()})
    return head
