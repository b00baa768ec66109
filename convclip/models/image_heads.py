"""The heads of timm's backbones that pool as the backbone does: `mlp`, and `none`, the backbone's own classifier.

Shapes: B batch, C channels of the pooled map, D embed.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import nn

from convclip.schema import UserError

# schema.ImageTowerConfig.head
MLP, OWN = "mlp", "none"
# The backbone's own classifier, as a part of the head.
CLASSIFIER = "fc"


def mlp_head(width: int, embed_dim: int) -> nn.Sequential:
    """open_clip's `timm_proj: mlp`: [B, C] -> [B, D] by way of 2 D, the second layer without bias."""
    head = nn.Sequential()
    head.add_module("mlp", Mlp(width, 2 * embed_dim, embed_dim, bias=(True, False)))
    return head


def own_head(trunk: nn.Module, backbone: str, width: int, embed_dim: int) -> nn.Sequential:
    """The classifier that timm gives `trunk`, with D classes, taken out of it: [B, C] -> [B, D].

    In the trunk it would be locked with it, and lie below the highest cut. Errors: UserError where the classifier is
    not one linear layer behind the pool.
    """
    timm_trunk: Any = trunk
    try:
        timm_trunk.reset_classifier(embed_dim, "avg")
        classifier, before = timm_trunk.get_classifier(), set(trunk.state_dict())
        timm_trunk.reset_classifier(0, "avg")
    except Exception:  # timm's backbones raise whatever their own arguments lead them to
        classifier, before = None, set()
    # A norm of the classifier's own would be gone with it.
    taken = before - set(trunk.state_dict())
    linear = isinstance(classifier, nn.Linear) and classifier.in_features == width
    if not linear or len(taken) != 2 or not all(name.startswith(classifiers_of(trunk)) for name in taken):
        raise UserError(
            f"model.image.head: none needs a backbone whose classifier is one linear layer behind its pool, which "
            f"{backbone} has not: set average_linear"
        )
    head = nn.Sequential()
    head.add_module(CLASSIFIER, classifier)
    return head


def classifiers_of(trunk: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the classifiers that timm gives a backbone: `head.fc.`; () where it has none."""
    default_cfg: Any = trunk.default_cfg
    names = default_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
