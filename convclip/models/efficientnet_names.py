"""The names of EfficientNets released for PyTorch by L. Melas-Kyriazi and after him -> timm's, for its `tf_` backbones.

They hold TensorFlow's weights, as timm's `tf_efficientnet_*` do, whose padding and norms they need. Data, and one
function; imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

BACKBONES = "tf_efficientnet_"
# A name that no other release has.
MARK = "_blocks.0._depthwise_conv.weight"
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
# A block whose width is expanded first, and one that has no expansion.
_EXPANDED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    **_SQUEEZE,
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE}


def timm_names(names: Collection[str], blocks: Sequence[str]) -> dict[str, str]:
    """Names of such a release -> timm's; a name that does not fit stays as it is.

    `blocks`: timm's blocks in order (`blocks.0.0`, `blocks.1.0`, …), which the release counts from 0 on.
    """
    expanded = {name.split(".")[1] for name in names if "._expand_conv." in name}
    found = {}
    for name in names:
        first, *rest = name.split(".")
        found[name] = name
        if first != "_blocks" and first in _OUTSIDE:
            found[name] = ".".join((_OUTSIDE[first], *rest))
        elif first == "_blocks" and len(rest) == 3 and rest[0].isdecimal() and int(rest[0]) < len(blocks):
            parts = _EXPANDED if rest[0] in expanded else _PLAIN
            if rest[1] in parts:
                found[name] = f"{blocks[int(rest[0])]}.{parts[rest[1]]}.{rest[2]}"
    return found
