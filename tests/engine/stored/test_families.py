"""A trunk of each family, part of it open from an event on, trains from the store as it does live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_run import make_files
from tests.engine.test_frozen_norms import train
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

# Rows that run at a time: all of a step's, and those of a chunk.
WAYS: dict[str, dict[str, Any]] = {"whole": {}, "chunked": {"batch__micro": 2}}
FAMILIES = (
    *("tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv2_050", "mobilenetv4_conv_small", "resnet18"),
    *("resnext50_32x4d", "regnety_002", "convnext_atto", "convnextv2_atto", "fastvit_t8", "fastvit_mci0"),
    *("edgenext_xx_small", "repvit_m1", "cs3darknet_focus_s"),
)


def live_and_stored(files: Path, folder: Path, backbone: str, ways: tuple[str, ...]) -> dict[str, list[list[dict]]]:
    """By way: rows of the run live and from the store."""
    found: dict[str, list[list[dict]]] = {}
    settings: dict[str, Any] = {
        "model__image": {"backbone": backbone, "image_size": 64, "head": "average_linear"},
        "freezing": {"lock": ["image"], "unfreeze": [{"epoch": 1, "tower": "image", "groups": 2}]},
        "optim__clip_grad_norm": 1.0,
    }
    for way in ways:
        for mode in ("live", "fill"):
            more = {**settings, **WAYS[way], "features": {"mode": mode, "views": 1}}
            found.setdefault(way, []).append(train(files, folder / way / mode, **more))
    return found


def printed(rows: list[dict]) -> list[str]:
    """Loss and gradient norm as the log has them."""
    return [f"{row['loss']:.4f} {row['grad_norm']:.3f}" for row in rows if "event" not in row]


def check(backbone: str, folder: Path, ways: tuple[str, ...]) -> None:
    found = run_ranks(1, live_and_stored, make_files(folder), folder, backbone, ways)
    for way, (live, stored) in found.items():
        assert sum("event" in row for row in live) == sum("event" in row for row in stored) == 1
        assert printed(live) == printed(stored), way
        assert len(set(printed(live))) == len(printed(live)) == 6
        for a, b in zip(live, stored, strict=True):
            assert "event" in a or a["loss"] == pytest.approx(b["loss"], abs=5e-7), way


def test_a_mobilenet_trains_from_the_store_as_live(tmp_path):
    """Its small maps are rounded by the size of the batch, which must be the live run's."""
    check("mobilenetv3_small_050", tmp_path, ("chunked",))


@pytest.mark.full
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_trains_from_the_store_as_live(backbone, tmp_path):
    check(backbone, tmp_path, tuple(WAYS))
