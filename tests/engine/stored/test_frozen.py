"""What is frozen is computed once: runs from the feature store against live runs, step by step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convclip.config import load_recipe
from convclip.engine.stages.groups import reached_stages
from convclip.engine.stored.frozen import storable
from convclip.models import build_model
from convclip.models.dual_tower import INPUT
from convclip.schema import UserError
from tests.conftest import FULL
from tests.engine.small_run import arguments
from tests.engine.stored.frozen_run import (
    EVENTS,
    OPEN_ALL,
    call_script,
    make_frozen_files,
    make_recipe,
    overrides,
    train,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

LOCKED = {"lock": ["image", "text"], "unfreeze": []}
ALIGN = {"kind": "mse", "weight": 0.5}
AUGMENTED = {"data__random_erasing": 0.5, "data__color_jitter": [0.4, 0.4, 0.4, 0.1], "data__crop_scale": [0.33, 1.0]}
# (world, ds_config, views, what else): each runs live and from the store.
CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "one view, ZeRO 0": (1, "zero0_fp32", 1, {}),
    "three views, accumulation, head alignment, ZeRO 3": (
        *(1, "zero3_fp32", 3),
        {"batch__accumulation": 2, "head_alignment": ALIGN},
    ),
    "three views, chunked, head alignment, ZeRO 2": (
        *(1, "zero2_fp32", 3),
        {"batch__micro": 2, "head_alignment": ALIGN, "teacher__end_step": 5},
    ),
    "the whole image tower opens, ZeRO 1": (
        *(1, "zero1_fp32", 1),
        {"freezing": {"lock": ["image", "text"], "unfreeze": OPEN_ALL}},
    ),
    "two ranks, three views, head alignment, ZeRO 1": (2, "zero1_fp32", 3, {"head_alignment": ALIGN}),
    "two ranks, accumulation, ZeRO 2": (2, "zero2_fp32", 1, {"batch__accumulation": 2}),
    "two ranks, chunked, three augmented views, ZeRO 3": (2, "zero3_fp32", 3, {"batch__micro": 2, **AUGMENTED}),
    "bf16": (1, "zero2_bf16", 1, {"head_alignment": ALIGN}),
}
if not FULL:
    # Accumulation, two ranks and ZeRO 2 are each in another case.
    del CASES["two ranks, accumulation, ZeRO 2"]
TOLERANCE = {"bf16": 2e-2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_frozen_files(tmp_path_factory.mktemp("files"))


def live_and_stored(files: Path, folder: Path, world: int) -> dict[str, Any]:
    """Every case of `world`, its metrics live and from the store."""
    found: dict[str, Any] = {}
    for number, (name, (ranks, config, views, more)) in enumerate(CASES.items()):
        if ranks != world:
            continue
        more = {**more}
        end_step = more.pop("teacher__end_step", None)
        if end_step:
            more["teacher"] = {"model": f"local-dir:{files / 'teacher'}", "end_step": end_step}
        live = train(files, folder / f"live{number}", config, features={"mode": "live", "views": views}, **more)
        stored = train(files, folder / f"stored{number}", config, features={"mode": "fill", "views": views}, **more)
        found[name] = (live, stored)
    if world == 1:
        found["checks"] = {
            "teacher": teacher_logits(files, folder),
            "state": what_learns(files, folder),
            "only heads": nothing_frozen_runs(files, folder),
            "refused": refusals(files, folder),
        }
    return found


def stored_of(number_of: str) -> str:
    """Folder name of a case's run from the store."""
    return f"stored{list(CASES).index(number_of)}"


def teacher_logits(files: Path, folder: Path) -> float:
    """Largest difference between the teacher's logits live and from the store."""
    from convclip.engine.task import ImageTextTask

    device, difference = torch.device("cpu"), 0.0
    store = folder / stored_of("three views, accumulation, head alignment, ZeRO 3")
    for epoch in range(3):
        logits = []
        for path in (None, store / "features.h5"):
            recipe = make_recipe(files, features__views=3, head_alignment=ALIGN)
            task = ImageTextTask(recipe)
            loader, source, _ = task.open(task.initial_model()[0], device, torch.float32, path)
            reads = source.reads(INPUT, {"text.ln_final.weight"}, 0)
            batches = [source.inputs(batch, epoch, reads) for batch in loader.epoch(epoch)]
            logits.append([source.teacher_scale * batch.teacher[0] @ batch.teacher[1].T for batch in batches])
        difference = max(difference, *((a - b).abs().max().item() for a, b in zip(*logits, strict=True)))
        assert all(a.std() > 0.01 for a in logits[0])
    return difference


def what_learns(files: Path, folder: Path) -> dict[str, Any]:
    """After a live run with teacher and reference head: who has a gradient, and what the optimizer holds."""
    from convclip import run
    from convclip.engine import trainer as trainer_module
    from convclip.engine.zero.masters import master_shards

    made: list[Any] = []

    class Kept(trainer_module.Trainer):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    before, trainer_module.Trainer = trainer_module.Trainer, Kept
    try:
        saved = {"checkpoint__every_epochs": 3, "head_alignment": ALIGN}
        train(files, folder / "state", "zero1_fp32", features={"views": 1}, **saved)
    finally:
        trainer_module.Trainer = before
    run.evaluate_checkpoint(folder / "state", str(files / "val-000000.tar"), folder / "evaluated")
    trainer = made[0]
    teacher, engine = trainer.parts.source.teacher, trainer.staged.engine
    frozen = [*teacher.named_parameters(), *engine.module.reference.named_parameters()]
    held = {piece.parameter for shard in master_shards(engine) for piece in shard.pieces}
    source = load_file(files / "start" / "open_clip_model.safetensors")
    return {
        "gradient": [name for name, parameter in frozen if parameter.requires_grad or parameter.grad is not None],
        "in eval": not (teacher.training or engine.module.reference.training),
        "evaluated": (folder / "evaluated" / "eval.jsonl").is_file(),
        "held": sorted(held),
        "trainable": sorted(trainer.staged.stages[-1].trainable),
        "reference moved": not torch.equal(engine.module.reference.proj.weight, source["visual.head.proj.weight"]),
    }


def nothing_frozen_runs(files: Path, folder: Path) -> int:
    """Train from the store while decoding a picture, the trunk, the text tower and the teacher raise; its steps."""
    from convclip.data import micro_batches
    from convclip.engine import trainer
    from convclip.models.teacher import Teacher

    def forbidden(*given: Any, **named: Any) -> None:
        raise AssertionError("frozen work was done again")

    class Guarded(trainer.StagedEngine):
        def _look(self) -> None:
            super()._look()
            model, boundary = self.engine.module, self.frozen.image
            assert boundary == 11
            for unit in model.visual.units()[:boundary]:
                for module in unit:
                    module.register_forward_pre_hook(forbidden)
            model.text.register_forward_pre_hook(forbidden)

    train(files, folder / "filled", features="fill", freezing=LOCKED, max_steps=1)
    before = trainer.StagedEngine, micro_batches.decode_image, Teacher.__init__
    trainer.StagedEngine, micro_batches.decode_image, Teacher.__init__ = Guarded, forbidden, forbidden
    try:
        rows = train(files, folder / "guarded", features=str(folder / "filled" / "features.h5"), freezing=LOCKED)
    finally:
        trainer.StagedEngine, micro_batches.decode_image, Teacher.__init__ = before
    return len(rows)


def refusals(files: Path, folder: Path) -> dict[str, str]:
    """What is said to a store that does not fit, by what differs."""
    store = folder / stored_of("one view, ZeRO 0") / "features.h5"
    shutil.copytree(files / "teacher", files / "teacher2", dirs_exist_ok=True)
    cases = {
        "weights_sha256": {"model__pretrained": None},
        "boundary": {"freezing": {"lock": ["image", "text"], "unfreeze": EVENTS[:1]}},
        "model": {"model__image__mean": [0.5, 0.5, 0.5]},
        "transform": {"features__views": 3},
        "captions_sha256": {"data__train": str(files / "train-{000000..000001}.tar")},
        "precision": {"config": "zero2_bf16"},
        "teacher": {"teacher": {"model": f"local-dir:{files / 'teacher2'}"}},
    }
    said, teacher = {}, files / "teacher" / "open_clip_model.safetensors"
    weights = load_file(teacher)
    for name, more in [*cases.items(), ("teacher_sha256", {})]:
        if name == "teacher_sha256":
            save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, teacher)
        try:
            train(files, folder / f"refused {name}", features__mode="store", features__store=str(store), **more)
            said[name] = "not refused"
        except UserError as error:
            said[name] = str(error)
    save_file(weights, teacher)
    return said


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """(rows by case, folder of the runs)."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Any] = {}
    for world in (1, 2):
        (folder / f"{world}").mkdir()
        found |= run_ranks(world, live_and_stored, files, folder / f"{world}", world)
    return found, folder / "1"


@pytest.mark.parametrize("case", CASES)
def test_the_store_gives_the_live_runs_losses(runs, case):
    live, stored = runs[0][case]
    assert [row.get("event") for row in live] == [row.get("event") for row in stored]
    pairs = [(a, b) for a, b in zip(live, stored, strict=True) if "event" not in a]
    assert len(pairs) == 9 and sum("event" in row for row in live) in (2, 3)
    for a, b in pairs:
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith("loss") and a[key] is not None:
                assert abs(a[key] - b[key]) <= TOLERANCE.get(case, 1e-5), (a["step"], key, a[key], b[key])
    # The runs do learn, so that equality says something.
    assert pairs[0][0]["loss"] != pytest.approx(pairs[-1][0]["loss"], abs=1e-3)


def test_views_change_from_epoch_to_epoch(runs):
    one, three = (runs[0][case][0] for case in list(CASES)[:2])
    assert one[0]["loss"] != three[0]["loss"]


def test_teacher_logits_from_the_store_are_the_live_ones(runs):
    assert runs[0]["checks"]["teacher"] <= 1e-5


def test_teacher_and_reference_head_learn_nothing(runs):
    state = runs[0]["checks"]["state"]
    assert state["gradient"] == [] and state["in eval"] and not state["reference moved"]
    # What a run is evaluated or gone on from has no use for the reference head.
    assert state["evaluated"]
    assert state["held"] == state["trainable"]
    assert not any("reference" in name or "teacher" in name for name in state["held"])


def test_from_the_store_nothing_frozen_runs(runs):
    assert runs[0]["checks"]["only heads"] == 9


def test_a_store_of_something_else_is_refused_and_says_how_it_differs_in_words(runs):
    expected = {
        "weights_sha256": "made with other weights: the locked towers' weight files, or the seed",
        "boundary": "it holds what enters layer group",
        "model": "made with another model: model.image.mean [0.48145466, 0.4578275, 0.40821073], the recipe has [0.5",
        "transform": "made with 1 view of each image, the recipe has 3 (features.views)",
        "captions_sha256": "made from other training data: 24 views and 48 captions, other than the data have now",
        "precision": "made in float32, this run computes in bfloat16",
        "teacher": "made with the teacher local-dir:",
        "teacher_sha256": "made with other weights of the teacher",
    }
    said = runs[0]["checks"]["refused"]
    assert said.keys() == expected.keys()
    for key, message in said.items():
        assert f"features.h5: {expected[key]}" in message and "\n" not in message, (key, message)
        assert not re.search("[0-9a-f]{64}", message), message


def test_the_command_line_says_so_in_one_line(runs, files, tmp_path):
    store = runs[1] / stored_of("one view, ZeRO 0") / "features.h5"
    damaged = tmp_path / "damaged.h5"
    shutil.copy(store, damaged)
    with open(damaged, "r+b") as file:
        # The middle of the file is a row of the largest array.
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    more = [part for value in overrides(files) for part in ("--set", value) if not value.startswith("data.train")]
    for path, change, words in [
        (
            store,
            ["--set", "seed=1", "--set", "model.image.std=[0.5, 0.5, 0.5]"],
            [str(store), "made with another model: model.image.std"],
        ),
        (damaged, [], [str(damaged), "is damaged: its checksum differs"]),
    ]:
        given = [*more, "--set", f"features={path}", *change]
        done = call_script(tmp_path, "launch/train.py", *arguments(files, tmp_path / f"run{len(change)}", *given))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert all(word in last for word in words), last


def test_the_plan_says_what_can_be_stored_and_its_size():
    recipe = load_recipe("base_absattn_distill_unfreeze", ["teacher.pretrained=anything"])
    with torch.device("meta"):
        model = build_model(recipe.model)
    lines = storable(model, recipe, reached_stages(model, recipe))
    images = round(591_753 / 5)
    gib = images * 1024 * 7 * 7 * 2 / 2**30
    # Training opens the last two of 38 groups.
    assert lines[0].startswith("image_map: 1024x7x7 bfloat16 entering layer group 36 per view")
    assert float(lines[0].split()[-2]) == pytest.approx(gib, abs=0.02)
    assert [line.split(":")[0] for line in lines[1:4]] == ["text_embedding", "teacher_image", "teacher_text"]
    assert f"about {images:,} views and 591,753 captions" in lines[-1]


def test_nothing_can_be_stored_where_nothing_is_locked():
    recipe = load_recipe("tiny_gpt2_nofreeze")
    with torch.device("meta"):
        model = build_model(recipe.model)
    assert storable(model, recipe, reached_stages(model, recipe)) == []
