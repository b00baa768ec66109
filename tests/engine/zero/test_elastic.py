"""A checkpoint of any number of ranks, ZeRO stage and precision is gone on with by any other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.elastic_cells import SAVED_AT, Kind, Small, differences, furthest, plain_losses, put_together
from tests.processes import run_ranks

ALIKE = 1e-6


def save_kinds(kinds: list[Kind], folder: str) -> dict[Any, Any]:
    """Save each kind around the event; the losses of the ten steps after each save."""
    found = {}
    for kind in kinds:
        small, losses = Small(kind), []
        while small.step < SAVED_AT[-1] + 10:
            if small.step in SAVED_AT:
                small.save(Path(folder) / kind.folder)
            losses.append(small.train())
        found.update({(kind, step): losses[step : step + 10] for step in SAVED_AT})
    return found


def load_kinds(
    cells: list[tuple[Kind, Kind]], folder: str, steps: dict[str, int], again: str | None = None
) -> dict[Any, Any]:
    """{(from, to, step): (what differs after loading, losses of so many steps by precision)}; saved `again` there."""
    found = {}
    for (source, target), step in itertools.product(cells, SAVED_AT):
        checkpoint = Path(folder) / source.folder / f"step-{step:08d}"
        small = Small(target, checkpoint, step)
        wrong = differences(small.held(), put_together(checkpoint, source))
        if again is not None:
            small.save(Path(again) / target.folder)
        found[source, target, step] = (wrong, [small.train() for _ in range(steps[target.precision])])
    return found


@pytest.mark.launch
def test_two_ranks_in_bf16_go_on_as_one_in_fp32_and_as_two_again(tmp_path):
    first, second, third = Kind(2, 3, "bf16"), Kind(1, 0, "fp32"), Kind(2, 2, "fp32", offload=True)
    steps = {"fp32": 10}
    run_ranks(2, save_kinds, [first], str(tmp_path / "a"))
    one = run_ranks(1, load_kinds, [(first, second)], str(tmp_path / "a"), steps, str(tmp_path / "b"))
    two = run_ranks(2, load_kinds, [(second, third)], str(tmp_path / "b"), steps)
    for step in SAVED_AT:
        wrong, losses = one[first, second, step]
        then, after = two[second, third, step]
        assert not wrong and not then, (step, wrong, then)
        found = put_together(tmp_path / "a" / first.folder / f"step-{step:08d}", first)
        assert found["steps"] and len(found["master"]) == (3 if step < SAVED_AT[-1] else 5)
        assert furthest(losses, plain_losses(found, step, 10)) < ALIKE
        # The run in fp32 that nothing interrupts.
        assert furthest(losses, after) < ALIKE


WORLDS, STAGES, PRECISIONS = (1, 2, 3), range(4), ("fp32", "bf16")
KINDS = [Kind(*kind) for kind in itertools.product(WORLDS, STAGES, PRECISIONS)]


@pytest.mark.full
@pytest.mark.launch
def test_every_kind_goes_on_as_every_other(tmp_path, capsys):
    saved: dict[Any, Any] = {}
    for world in WORLDS:
        saved |= run_ranks(world, save_kinds, [kind for kind in KINDS if kind.world == world], str(tmp_path))
    oracle = {
        key: plain_losses(put_together(tmp_path / key[0].folder / f"step-{key[1]:08d}", key[0]), key[1], 10)
        for key in saved
    }
    found: dict[Any, Any] = {}
    for world in WORLDS:
        cells = [(one, other) for one, other in itertools.product(KINDS, KINDS) if other.world == world]
        found |= run_ranks(world, load_kinds, cells, str(tmp_path), {"fp32": 10, "bf16": 2})
    assert len(found) == len(KINDS) ** 2 * len(SAVED_AT)
    equal = {key for key, (wrong, _) in found.items() if not wrong}
    in_fp32 = {key: losses for key, (_, losses) in found.items() if key[1].precision == "fp32"}
    plain = {key: furthest(losses, oracle[key[0], key[2]]) for key, losses in in_fp32.items()}
    on = {key: furthest(losses, saved[key[0], key[2]]) for key, losses in in_fp32.items() if key[0].precision == "fp32"}
    half = {
        key: furthest(losses, oracle[key[0], key[2]][:2])
        for key, (_, losses) in found.items()
        if key[1].precision == "bf16"
    }
    with capsys.disabled():
        print(f"\n{len(found)} cells, {len(equal)} equal to the bit after loading")
        print(f"fp32: furthest loss of ten from a plain loop {max(plain.values()):.2e} ({len(plain)} cells)")
        print(f"fp32 to fp32: furthest loss from the uninterrupted run {max(on.values()):.2e} ({len(on)} cells)")
        print(f"bf16: furthest loss of two from a plain loop in fp32 {max(half.values()):.2e} ({len(half)} cells)")
        for one in KINDS:
            counts = [sum((one, other, step) in equal for step in SAVED_AT) for other in KINDS]
            print(f"{one!s:<18} {' '.join(map(str, counts))}")
    assert equal == found.keys()
    assert max(plain.values()) < ALIKE and max(on.values()) < ALIKE and max(half.values()) < 0.05
