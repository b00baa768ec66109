"""Where timm's trunks are cut: whole = prefix + rest, family by family, and what no chain of modules may pass for."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from convclip import schema
from convclip.models.timm_image import TimmImage
from convclip.models.timm_units import trunk_units
from convclip.models.towers import build_image_tower

# The smallest member of a family -> its layer groups, and those of them at which it cannot be cut.
FAMILIES: dict[str, tuple[int, set[int]]] = {
    "tf_efficientnet_lite0": (17, set()),
    "mobilenetv3_small_050": (14, set()),
    "mobilenetv4_conv_small": (19, set()),
    "resnet18": (9, set()),
    "regnety_002": (14, set()),
    "convnext_atto_ols": (14, set()),
    "fastvit_t8": (12, set()),
    "edgenext_xx_small": (14, set()),
    "repvit_m1": (21, set()),
    # At stages: what timm groups more finely is no chain within them.
    "test_byobnet": (5, set()),
    "cs3darknet_focus_s": (10, {3, 4, 6, 7, 8}),
    # One unit: timm's forward does more than run its modules in turn.
    "ghostnet_050": (18, {*range(1, 18)}),
}
# Larger members, and families at the edge of what is asked for: `make test-full`.
MORE: dict[str, tuple[int, set[int]]] = {
    "tf_efficientnet_lite1": (22, set()),
    "tf_efficientnet_lite2": (22, set()),
    "efficientnet_b0": (17, set()),
    "mobilenetv2_050": (18, set()),
    "mobilenetv4_hybrid_medium": (34, set()),
    "seresnext26d_32x4d": (9, set()),
    "resnext50_32x4d": (17, set()),
    "resnetv2_18": (9, set()),
    "regnetx_002": (14, set()),
    "regnetv_040": (23, set()),
    "convnextv2_tiny": (20, set()),
    "fastvit_mci0": (22, set()),
    "fastvit_mci2": (46, set()),
    "fastvit_mci4": (48, set()),
    "test_nfnet": (5, set()),
    "dla46x_c": (11, {4, 6, 8, 10}),
    "densenet121": (60, {*range(1, 60)} - {1, 7, 19, 43, 59}),
    "hrnet_w18_small": (6, {1, 2, 3, 4, 5}),
    "poolformerv2_s12": (1, set()),
    "hgnetv2_b0": (7, set()),
}


def tower(backbone: str, head: str = "average_linear", **options: Any) -> TimmImage:
    torch.manual_seed(0)
    config = schema.ImageTowerConfig.model_validate({"backbone": backbone, "image_size": 64, "head": head, **options})
    model = build_image_tower(config, 16)
    assert isinstance(model, TimmImage)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(modules: list[tuple[nn.Module, ...]], x: Tensor) -> Tensor:
    for unit in modules:
        for module in unit:
            x = module(x)
    return x


def check_family(backbone: str, groups: int, without: set[int]) -> None:
    model = tower(backbone)
    trunk, units = model.trunk, model.units()
    assert len(model.layer_groups()) == groups
    assert model.cuts == [cut for cut in range(groups + 1) if cut not in without]
    for training in (False, True):
        trunk.train(training)
        with torch.no_grad():
            torch.manual_seed(5)
            whole = trunk(images())
            torch.manual_seed(5)
            entering = [images()]
            for unit in units:
                entering.append(run([unit], entering[-1]))
            torch.testing.assert_close(entering[-1], whole, atol=1e-6, rtol=0)
            # What enters at each cut then gives the whole, by the units after it: the same computation again.
    middle = model.cuts[len(model.cuts) // 2]
    with torch.no_grad():
        part = model.forward_from(model.eval().forward_prefix(images(), middle), middle)
        torch.testing.assert_close(part, model.head(trunk(images())), atol=1e-6, rtol=0)
    # Each unit has the parameters of its groups, each group those that timm says.
    if hasattr(trunk, "group_matcher"):
        timms = group_parameters(trunk, trunk.group_matcher())  # type: ignore[operator]
        ordered = [{f"trunk.{name}" for name in timms[number]} for number in sorted(timms)]
        assert [set(group) for group in model.layer_groups()] == ordered
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for low, high, unit in zip(model.cuts, model.cuts[1:], units, strict=False):
        held = {names[id(p)] for module in unit for p in module.parameters()}
        assert held == {name for group in model.layer_groups()[low:high] for name in group}
    features = model.eval().forward_prefix(images(), model.map_cut)
    assert features.ndim == (2 if model.map_cut == groups else 4)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_cut_of_a_family_is_the_whole(backbone):
    check_family(backbone, *FAMILIES[backbone])


@pytest.mark.full
@pytest.mark.parametrize("backbone", MORE)
def test_every_cut_of_more_members_is_the_whole(backbone):
    check_family(backbone, *MORE[backbone])


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet18", "fastvit_t8", "mobilenetv3_small_050"])
def test_the_map_before_an_attention_pool_is_the_trunks(backbone):
    model = tower(backbone, "attention_pool").eval()
    features = model.forward_prefix(images(), model.map_cut)
    torch.testing.assert_close(features, model.trunk.forward_features(images()))
    torch.testing.assert_close(model.forward_from(features, model.map_cut), model(images()))


def test_watching_draws_nothing_and_leaves_nothing_behind():
    """Weights that a seed gives do not depend on whether a trunk of the kind was watched before."""
    first = tower("tf_efficientnet_lite0", drop_path=0.1)
    state = torch.get_rng_state()
    again = tower("tf_efficientnet_lite0", drop_path=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again.state_dict(), first.state_dict(), atol=0, rtol=0)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0, drop_path_rate=0.1)
    assert [name for name, _ in first.trunk.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in first.modules())


def test_recomputed_units_of_a_batch_norm_trunk_count_a_batch_once():
    buffers = []
    for enable in (False, True):
        model = tower("mobilenetv3_small_050").train()
        model.set_grad_checkpointing(enable)
        model(images(4)).square().sum().backward()
        buffers.append(dict(model.named_buffers()))
    for name, value in buffers[0].items():
        if "running" in name:
            torch.testing.assert_close(buffers[1][name], value)


class Block(nn.Module):
    """Two convolutions; `kind` says how they are put together."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        if self.kind == "doubled in place":
            y *= 2
        if self.kind == "doubled":
            y = y * 2
        if self.kind == "in training only" and self.training:
            y = y + x
        y = self.second(input=y) if self.kind == "by name" else self.second(y)
        if self.kind == "added in place":
            y += x
        if self.kind == "twice":
            y = self.second(y)
        return y


class Plain(nn.Module):
    """As timm's trunks: `forward_features`, then `forward_head`."""

    def __init__(self, kind: str):
        super().__init__()
        self.stem, self.block, self.kind = nn.Conv2d(3, 4, 3), Block(kind), kind

    def forward_features(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))

    def forward_head(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x.relu() if self.kind == "between the two" else x)


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        ("a chain", (0, 1, 2, 3)),
        ("doubled", (0, 1, 3)),
        ("doubled in place", (0, 1, 3)),
        ("added in place", (0, 1, 3)),
        ("by name", (0, 1, 3)),
        ("twice", (0, 1, 3)),
        ("in training only", (0, 3)),
        ("between the two", (0, 3)),
    ],
)
def test_only_a_chain_is_taken_apart(kind, cuts):
    with torch.device("meta"):
        trunk = Plain(kind)
    groups = [[f"{part}.weight", f"{part}.bias"] for part in ("stem", "block.first", "block.second")]
    found = trunk_units(trunk, groups, 8)
    assert found.cuts == cuts
    torch.manual_seed(0)
    real = Plain(kind)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(found.modules(real), x), real(x))


def test_a_group_out_of_order_and_a_parameter_that_no_module_runs_stop_cuts():
    with torch.device("meta"):
        trunk = Plain("a chain")
    swapped = [[f"{part}.weight", f"{part}.bias"] for part in ("stem", "block.second", "block.first")]
    assert trunk_units(trunk, swapped, 8).cuts == (0, 1, 3)
    with torch.device("meta"):
        trunk.unused = nn.Linear(2, 2)
    assert trunk_units(trunk, [*swapped, ["unused.weight", "unused.bias"]], 8).cuts == (0, 4)
