"""Batch norms of what an event opens: no jump and the same statistics to the bit where they are frozen; and a line in
the log where an event raises the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convclip.config import load_recipe
from convclip.engine import loss_rise
from convclip.engine.loss_rise import SPAN, LossRises
from convclip.engine.plan.plan import format_plan, make_plan
from convclip.engine.task import ImageTextTask
from convclip.models import build_model
from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import locked_names, unlocked_names
from convclip.schema import UserError
from tests.conftest import REPOSITORY
from tests.engine.small_run import make_files, weights_of
from tests.processes import run_ranks

# Three steps an epoch; the image tower's last two groups open before step 4.
EVENT, STEPS = 3, 6
OPENED = ("visual.trunk.blocks.3.", "visual.trunk.blocks.4.", "visual.trunk.bn2.")
OPENS = [{"epoch": 1, "tower": "image", "groups": 2}]
NORMS = {
    "model.image": {"backbone": "test_efficientnet", "image_size": 32, "head": "average_linear"},
    "epochs": 2,
    "batch.global": 8,
    "evaluation.every_epochs": 0,
    "checkpoint.every_epochs": 0,
    "freezing": {"lock": ["image"], "unfreeze": OPENS},
}


def train(files: Path, output: Path, ds_config: str = "zero1_fp32", resume: str = "never", **values: Any) -> list[dict]:
    """Rows of metrics.jsonl of a run in this process group."""
    from convclip.run import train_recipe

    shards = {"data.train": str(files / "train-{000000..000002}.tar")}
    settings = {**NORMS, **shards, **{key.replace("__", "."): value for key, value in values.items()}}
    recipe = load_recipe(files / "small.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    train_recipe(recipe, REPOSITORY / "ds_configs" / f"{ds_config}.json", output, resume)
    torch.distributed.barrier()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "event" not in row]


def freezing(batch_norm: str | None = None, opens: Any = OPENS, **more: Any) -> dict[str, Any]:
    return {"lock": ["image"], "unfreeze": opens, "batch_norm": batch_norm, **more}


def statistics(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights_of(folder).items() if "running" in name or "num_batches" in name}


def of_one_rank(files: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Evaluated and saved at the event: the modes come back.
    looked = {"evaluation.every_epochs": 1, "data.val": str(files / "val-000000.tar"), "checkpoint.every_epochs": 1}
    for name, given in (("locked", freezing(opens=[])), ("frozen", freezing()), ("batch", freezing("batch"))):
        found["plain", name] = losses(train(files, folder / "plain" / name, freezing=given, **looked))
    for name, given in (("locked", freezing(opens=[])), ("frozen", freezing())):
        found["chunks", name] = losses(train(files, folder / "c" / name, "zero3_fp32", freezing=given, batch__micro=2))
    found["statistics"] = {name: statistics(folder / "plain" / name) for name in ("locked", "frozen", "batch")}
    found["weights"] = {name: weights_of(folder / "plain" / name) for name in ("locked", "frozen")}
    # From the checkpoint at the event.
    again = folder / "plain" / "frozen" / "checkpoints" / f"step-{EVENT:08d}"
    found["resumed"] = losses(train(files, folder / "resumed", resume=str(again), freezing=freezing()))
    for backbone in ("test_efficientnet", "test_resnet"):
        image = {"backbone": backbone, "image_size": 32, "head": "average_linear"}
        for mode in ("live", "fill"):
            rows = train(files, folder / backbone / mode, model__image=image, features={"mode": mode, "views": 1})
            found[backbone, mode] = losses(rows)
    found["refused"] = before_batch_norm(files, folder, again)
    # Whatever the loss does counts as a rise, in one go and resumed in between.
    before, loss_rise.TOLERATED = loss_rise.TOLERATED, 0.0
    opened, saved = freezing("batch"), {"checkpoint": {"every_steps": 1, "keep_last": 10}}
    train(files, folder / "risen", freezing=opened, **saved)
    train(
        files, folder / "risen again", resume=str(folder / "risen/checkpoints/step-00000004"), freezing=opened, **saved
    )
    loss_rise.TOLERATED = before
    return found


def before_batch_norm(files: Path, folder: Path, checkpoint: Path) -> list[str]:
    """What is said of going on from a checkpoint of before there was `freezing.batch_norm`; it is allowed as it was."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["batch_norm"], state["losses"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    said = []
    for number, how in enumerate((None, "batch")):
        try:
            rows = train(files, folder / f"old{number}", resume=str(checkpoint), freezing=freezing(how))
            said.append(f"{len(losses(rows))} steps")
        except UserError as error:
            said.append(str(error))
    return said


def of_two_ranks(files: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, given in (("locked", freezing(opens=[])), ("frozen", freezing())):
        found[name] = losses(train(files, folder / name, "zero2_fp32", freezing=given, batch__accumulation=2))
    found["statistics"] = {name: statistics(folder / name) for name in ("locked", "frozen")}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(what the runs gave, their folder)."""
    folder = tmp_path_factory.mktemp("norms")
    return run_ranks(1, of_one_rank, make_files(folder), folder), folder


@pytest.mark.launch
@pytest.mark.parametrize("way", ["plain", "chunks"])
def test_frozen_norms_open_without_a_jump(runs, way):
    locked, frozen = (runs[0][way, name] for name in ("locked", "frozen"))
    assert len(frozen) == STEPS and frozen[:EVENT] == locked[:EVENT]
    # The first step with the opened groups computes what it would have computed with the trunk locked, then learns.
    assert frozen[EVENT] == pytest.approx(locked[EVENT], abs=1e-7)
    assert frozen[EVENT + 1] != locked[EVENT + 1]
    if way == "plain":
        batch = runs[0][way, "batch"]
        assert batch[:EVENT] == locked[:EVENT] and abs(batch[EVENT] - locked[EVENT]) > 1e-3


@pytest.mark.launch
def test_frozen_norms_keep_their_statistics_to_the_bit_and_train_their_weights(runs):
    kept = runs[0]["statistics"]
    assert kept["locked"] and all(torch.equal(value, kept["frozen"][name]) for name, value in kept["locked"].items())
    moved = {name for name, value in kept["locked"].items() if not torch.equal(value, kept["batch"][name])}
    assert moved and all(name.startswith(OPENED) for name in moved)
    before, after = runs[0]["weights"]["locked"], runs[0]["weights"]["frozen"]
    assert not torch.equal(before["visual.trunk.bn2.weight"], after["visual.trunk.bn2.weight"])
    assert torch.equal(before["visual.trunk.bn1.weight"], after["visual.trunk.bn1.weight"])


@pytest.mark.full
@pytest.mark.launch
def test_two_ranks_that_accumulate_open_without_a_jump(tmp_path):
    found = run_ranks(2, of_two_ranks, make_files(tmp_path), tmp_path)
    assert found["frozen"][EVENT] == pytest.approx(found["locked"][EVENT], abs=1e-7)
    assert found["frozen"][EVENT + 1] != found["locked"][EVENT + 1]
    kept = found["statistics"]
    assert all(torch.equal(value, kept["frozen"][name]) for name, value in kept["locked"].items())


@pytest.mark.launch
def test_resumed_at_the_event_it_goes_on_alike(runs):
    assert runs[0]["resumed"] == runs[0]["plain", "frozen"][EVENT:]


@pytest.mark.launch
@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet"])
def test_from_the_store_a_batch_norm_trunk_trains_as_live(runs, backbone):
    live, stored = runs[0][backbone, "live"], runs[0][backbone, "fill"]
    assert [f"{loss:.4f}" for loss in live] == [f"{loss:.4f}" for loss in stored]
    assert live == pytest.approx(stored, abs=1e-6) and live[-1] != pytest.approx(live[0], abs=1e-3)


@pytest.mark.launch
def test_a_run_of_before_goes_on_only_as_it_was(runs):
    refused, allowed = runs[0]["refused"]
    assert "add --set freezing.batch_norm=batch" in refused and "\n" not in refused
    assert allowed == f"{STEPS - EVENT} steps"


@pytest.mark.launch
def test_the_log_says_what_norms_do_and_which_event_raised_the_loss(runs):
    folder = runs[1]
    said = {name: (folder / "plain" / name / "train.log").read_text() for name in ("frozen", "batch")}
    assert "batch norms keep their running statistics; rebuilt in" in said["frozen"]
    assert "batch norms take each batch's statistics; rebuilt in" in said["batch"]
    assert "the loss rose" not in said["frozen"]
    lines = [
        [line[9:] for line in (folder / name / "train.log").read_text().splitlines() if "the loss rose" in line]
        for name in ("risen", "risen again")
    ]
    assert len(lines[0]) == 1 and lines[0] == lines[1]
    assert (
        f"the {STEPS - EVENT} after step {EVENT}, where image last 2 groups opened: 7 batch norms take" in lines[0][0]
    )
    assert "freezing.batch_norm=frozen avoids that" in lines[0][0]


def small_model(**options: Any) -> DualTower:
    given = {**NORMS, **options}
    recipe = load_recipe("demo", [f"{key}={json.dumps(value)}" for key, value in given.items()])
    torch.manual_seed(0)
    model = build_model(recipe.model)
    model.keep_norms(recipe.freezing.still_norms)
    return model


def test_in_a_partly_locked_trunk_each_norm_has_its_own_mode():
    for how, opened in ((None, False), ("frozen", False), ("batch", True)):
        model = small_model(freezing=freezing(how))
        trains = set(unlocked_names(model, "image", groups=2))
        for name in locked_names(model, "image"):
            model.get_parameter(name).requires_grad_(name in trains)
        for _ in range(2):
            model.eval()
            model.train()
            assert not model.visual.trunk.bn1.training and model.visual.trunk.bn2.training == opened
            # The rest of what opened does train.
            assert model.visual.trunk.blocks[3][0].training and model.visual.head.training


def test_which_towers_norms_are_still():
    for given, expected in (
        ({"lock": ["image"]}, ("image",)),
        ({}, ()),
        ({"batch_norm": "frozen"}, ("image", "text")),
        ({"lock": ["image"], "batch_norm": "batch"}, ()),
    ):
        recipe = load_recipe("demo", [f"freezing={json.dumps({'lock': [], 'unfreeze': [], **given})}"])
        assert recipe.freezing.still_norms == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (freezing(), "of what trains of the image tower, 7 batch norms keep their running statistics"),
        (freezing("batch"), "7 batch norms take each batch's statistics"),
        ({"lock": [], "unfreeze": [], "batch_norm": "frozen"}, "batch norms keep their running statistics"),
        ({"lock": [], "unfreeze": []}, None),
        (freezing(opens=[]), None),
    ],
)
def test_the_plan_says_what_norms_do(given, words):
    settings = {**NORMS, "freezing": given}
    recipe = load_recipe("demo", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    text = format_plan(make_plan(ImageTextTask(recipe)))
    assert words in text if words else "batch norms" not in text


def rises(losses: list[float], starts: list[int], pieces: int = 1) -> list[tuple]:
    """What is found where the losses come in so many pieces, each after a resume."""
    numbered, found, recent = list(enumerate(losses, start=1)), [], []
    for piece in range(pieces):
        share = numbered[piece * len(losses) // pieces : (piece + 1) * len(losses) // pieces]
        watch = LossRises(starts, len(losses), recent)
        found += list(watch.add(share))
        recent = json.loads(json.dumps(watch.recent))
    return found


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 40])
def test_a_rise_of_more_than_a_tenth_is_found_once_wherever_the_run_is_cut(pieces):
    calm, high, low = [1.0] * 20, [1.2] * 15, [1.25] * 5
    assert [rise[0] for rise in rises([*calm, *high, *low], [20, 35], pieces)] == [20]
    (rise,) = rises([*calm, *high, *low], [20, 35], pieces)
    assert rise.before == pytest.approx(1.0) and rise.after == pytest.approx(1.2)
    assert (rise.steps_before, rise.steps_after) == (SPAN, SPAN)
    # Events close together are compared with what lies between.
    (rise,) = rises([*calm, *[1.0] * 3, *[2.0] * 17], [20, 23], pieces)
    assert (rise.start, rise.steps_before, rise.steps_after) == (23, 3, SPAN)
    assert rises([*calm, *[1.05] * 20], [20], pieces) == [] == rises(calm * 2, [0, 40, 50], pieces)
    assert rises([*[1.0] * 19, float("nan"), *[2.0] * 20], [20], pieces) == []
