"""A checkpoint of any number of ranks, ZeRO stage and precision is gone on with by any other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convclip.engine.zero import elastic
from convclip.engine.zero.elastic import Shares, layout_of, read_shares
from convclip.engine.zero.masters import MasterShard, Piece
from convclip.models import checkpoint_files
from convclip.models.checkpoint_files import TensorFile, write_tensors
from convclip.models.checkpoint_weights import RunState
from convclip.schema import UserError
from tests.engine.elastic_cells import SAVED_AT, Kind, Small, differences, furthest, plain_losses, put_together
from tests.engine.small_engine import allow_fp16_on_cpu
from tests.processes import run_ranks

ALIKE = 1e-6
# Made-up parameters, laid end to end and cut as ZeRO 1 cuts a group; the second group is one scalar.
SIZES = ({"a": 5000, "b": 7, "c": 3001, "d": 2}, {"scale": 1})
KEYS = ("master", "ema", "exp_avg")
BLOCK = 256


def full(key: str, name: str, size: int) -> torch.Tensor:
    """All values of a made-up parameter."""
    return torch.randn(size, generator=torch.Generator().manual_seed(KEYS.index(key) * 1000 + ord(name[0])))


def shards_of(rank: int, world: int) -> list[MasterShard]:
    """The shards of a rank, one of each group."""
    shards = []
    for sizes in SIZES:
        own = -(-sum(sizes.values()) // world)
        first, offset, pieces = rank * own, 0, []
        for name, size in sizes.items():
            begin, end = max(offset, first), min(offset + size, first + own)
            if begin < end:
                pieces.append(Piece(name, begin - offset, begin - first, end - begin))
            offset += size
        shards.append(MasterShard(torch.zeros(own), tuple(pieces)))
    return shards


def expected(shard: MasterShard, key: str) -> torch.Tensor:
    values, sizes = torch.zeros(shard.master.numel()), {**SIZES[0], **SIZES[1]}
    for piece in shard.pieces:
        stretch = full(key, piece.parameter, sizes[piece.parameter])[piece.start : piece.start + piece.length]
        values[piece.offset : piece.offset + piece.length] = stretch
    return values


def write_files(folder: Path, world: int, steps: tuple[float, ...] = (4.0, 4.0)) -> RunState:
    """A made-up checkpoint; `steps` are the optimizer's of each group."""
    folder.mkdir(exist_ok=True)
    state = RunState(4, 0, world, 1, "fp32", run="made up")
    for rank in range(world):
        shards, tensors = shards_of(rank, world), {}
        for index, shard in enumerate(shards):
            tensors |= {f"{index}/{key}": expected(shard, key) for key in KEYS}
            tensors[f"{index}/step"] = torch.tensor(steps[index])
        layout = {
            "shards": [layout_of(shard.pieces) for shard in shards],
            "state_keys": [["exp_avg", "step"]] * 2,
            "state_values": [{"word": "same"}] * 2,
        }
        write_tensors(tensors, folder / f"rank-{rank:05d}.safetensors", state.origin(rank), layout)
    return state


def read_as(folder: Path, state: RunState, rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> Shares:
    monkeypatch.setattr(elastic, "rank", lambda: rank)
    monkeypatch.setattr(elastic, "world_size", lambda: world)
    return read_shares(folder, state, shards_of(rank, world), ema=True)


@pytest.fixture
def bytes_read(monkeypatch) -> list[tuple[str, int]]:
    """(file, bytes) of each read of a tensor's values."""
    found: list[tuple[str, int]] = []
    opened = checkpoint_files.safe_open

    class Counting:
        def __init__(self, path: Path, framework: str) -> None:
            self.file, self.name = opened(path, framework=framework), path.name
            self.metadata, self.keys = self.file.metadata, self.file.keys

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor = self.file.get_tensor(key)
            found.append((self.name, tensor.nbytes))
            return tensor

        def get_slice(self, key: str) -> Any:
            return Slice(self.file.get_slice(key), self.name)

    class Slice:
        def __init__(self, inner: Any, name: str) -> None:
            self.inner, self.name, self.get_shape = inner, name, inner.get_shape

        def __getitem__(self, rows: slice) -> torch.Tensor:
            tensor = self.inner[rows]
            found.append((self.name, tensor.nbytes))
            return tensor

    monkeypatch.setattr(checkpoint_files, "safe_open", Counting)
    return found


@pytest.mark.parametrize("blocks", [BLOCK, 10**6], ids=["blocks", "one checksum"])
def test_a_rank_reads_its_share_and_little_more(tmp_path, monkeypatch, bytes_read, blocks):
    monkeypatch.setattr(checkpoint_files, "BLOCK", blocks)
    for old, new in itertools.product((1, 3, 8), (1, 2, 5)):
        state = write_files(tmp_path / str(old), old)
        for rank in range(new):
            bytes_read.clear()
            shares, shards = read_as(tmp_path / str(old), state, rank, new, monkeypatch), shards_of(rank, new)
            assert shares.averages is not None
            for index, shard in enumerate(shards):
                found = {"master": shares.masters[index], "ema": shares.averages[index], **shares.states[index]}
                assert all(torch.equal(found[key], expected(shard, key)) for key in KEYS if key in found)
                assert found.keys() - {"master", "ema"} == ({"exp_avg", "step", "word"} if shard.pieces else set())
                assert "step" not in found or (found["step"] == 4 and found["step"].shape == ())
            files = {name for name, _ in bytes_read}
            assert len(files) <= old // new + 2 + (rank > 0)
            if blocks == BLOCK:
                needed = 4 * len(KEYS) * sum(piece.length for shard in shards for piece in shard.pieces)
                # Of each tensor that it reads from, a block at either end may be needed in part.
                assert sum(count for _, count in bytes_read) <= needed + len(KEYS) * len(files) * 2 * 4 * BLOCK + 100


def test_damage_is_seen_by_the_rank_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "BLOCK", BLOCK)
    state = write_files(tmp_path, 1)
    path = tmp_path / "rank-00000.safetensors"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(full("master", "a", 5000)[4000:4010].numpy().tobytes())] ^= 1
    path.write_bytes(damaged)
    assert read_as(tmp_path, state, 0, 3, monkeypatch).masters
    for rank, world in ((1, 3), (1, 2), (0, 1)):
        with pytest.raises(UserError, match=r"rank-00000.safetensors is damaged \(wrong checksum of 0/master\)"):
            read_as(tmp_path, state, rank, world, monkeypatch)
    with pytest.raises(UserError, match="wrong checksum of 0/master"):
        TensorFile(path, state.origin(0)).get("0/master")
    # Values that are not finite were never saved.
    path.write_bytes(whole)
    tensors = {key: TensorFile(path).get(key) for key in TensorFile(path).keys}
    tensors["0/ema"][2500] = torch.nan
    write_tensors(tensors, path, state.origin(0), TensorFile(path).layout)
    assert read_as(tmp_path, state, 1, 2, monkeypatch).averages
    with pytest.raises(UserError, match="has values in 0/ema that are not finite"):
        read_as(tmp_path, state, 0, 2, monkeypatch)


def test_files_without_blocks_and_without_checksums_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "BLOCK", 10**6)
    state = write_files(tmp_path, 2)
    for format_ in (2, 1):
        state.format = format_
        for path in sorted(tmp_path.glob("*.safetensors")):
            file = TensorFile(path)
            tensors, metadata = {key: file.get(key) for key in file.keys}, dict(file._file.metadata())
            # As it was before there were blocks; and as convclip 0.1.0 wrote it.
            kept = ("layout", "checksums", "origin") if format_ == 2 else ("layout",)
            save_file(tensors, path, metadata={key: metadata[key] for key in kept if key in metadata})
        for rank in range(3):
            shares = read_as(tmp_path, state, rank, 3, monkeypatch)
            for shard, master in zip(shards_of(rank, 3), shares.masters, strict=True):
                assert torch.equal(master, expected(shard, "master"))


def test_what_cannot_be_one_shard_is_one_line(tmp_path, monkeypatch):
    state = write_files(tmp_path, 2)
    path = tmp_path / "rank-00001.safetensors"
    file = TensorFile(path, state.origin(1))
    tensors = {key: file.get(key) for key in file.keys}
    write_tensors({**tensors, "0/step": torch.tensor(3.0)}, path, state.origin(1), file.layout)
    with pytest.raises(UserError, match=r"step of the optimizer's state is not the same .* ZeRO stage 1 on 2 ranks"):
        read_as(tmp_path, state, 0, 1, monkeypatch)
    pieces = file.layout["shards"]
    for shards, words in (
        ([pieces[0][1:], pieces[1]], "does not hold all of a"),
        ([[["c", "0", 0, 9]], []], "its layout is not one of a checkpoint"),
        ([[*pieces[0][:-1], ["d", 0, 9000, 2]], pieces[1]], "its layout is not one of a checkpoint"),
    ):
        write_tensors(tensors, path, state.origin(1), {**file.layout, "shards": shards})
        with pytest.raises(UserError, match=words):
            read_as(tmp_path, state, 0, 1, monkeypatch)
    path.unlink()
    with pytest.raises(UserError, match=r"rank-00001.safetensors is missing or damaged"):
        read_as(tmp_path, state, 0, 1, monkeypatch)


def save_kinds(kinds: list[Kind], folder: str, steps: int = 10) -> dict[Any, Any]:
    """Save each kind around the event; the losses of the steps after each save."""
    found = {}
    for kind in kinds:
        small, losses = Small(kind), []
        while small.step < SAVED_AT[-1] + steps:
            if small.step in SAVED_AT:
                small.save(Path(folder) / kind.folder)
            losses.append(small.train())
        found.update({(kind, step): losses[step : step + steps] for step in SAVED_AT})
    return found


def load_kinds(
    cells: list[tuple[Kind, Kind]],
    folder: str,
    steps: dict[str, int],
    saved: tuple[int, ...] = SAVED_AT,
    again: str | None = None,
) -> dict[Any, Any]:
    """{(from, to, step): (what differs after loading, losses of so many steps by precision)}; saved `again` there."""
    found = {}
    for (source, target), step in itertools.product(cells, saved):
        checkpoint = Path(folder) / source.folder / f"step-{step:08d}"
        small = Small(target, checkpoint, step)
        wrong = differences(small.held(), put_together(checkpoint, source))
        if again is not None:
            small.save(Path(again) / target.folder)
        found[source, target, step] = (wrong, [small.train() for _ in range(steps[target.precision])])
    return found


def go_on_alone(first: Kind, second: Kind, folder: str, again: str) -> tuple[dict[Any, Any], dict[str, Any]]:
    """`load_kinds` of one cell, ten steps from before the event, and what becomes of fp16's loss scale."""
    allow_fp16_on_cpu()
    kinds = [Kind(1, stage, precision) for stage, precision in ((1, "fp16"), (3, "fp16"), (2, "bf16"))]
    small, scales = Small(kinds[0]), {}
    scales["new"] = small.engine.optimizer.loss_scaler.cur_scale
    for _ in range(5):
        small.train()
    scales["saved"] = (small.engine.optimizer.loss_scaler.cur_scale, small.engine.skipped_steps)
    path = small.save(Path(folder) / "fp16")
    other = Small(kinds[1], path, 5)
    scales["loaded"] = (other.engine.optimizer.loss_scaler.cur_scale, other.engine.skipped_steps)
    half = Small(kinds[2], path, 5)
    scales["bf16"] = half.engine.optimizer.loss_scaler.cur_scale
    expected = put_together(path, kinds[0])
    scales["wrong"] = [differences(one.held(), expected) for one in (other, half)]
    back = Small(kinds[1], half.save(Path(folder) / "bf16"), 5)
    scales["back"] = back.engine.optimizer.loss_scaler.cur_scale
    found = load_kinds([(first, second)], folder, {"fp32": 10}, SAVED_AT[:1], again)
    return found | load_kinds([(first, second)], folder, {"fp32": 2}, SAVED_AT[1:]), scales


@pytest.mark.launch
def test_two_ranks_in_bf16_go_on_as_one_in_fp32_and_as_two_again(tmp_path):
    first, second, third = Kind(2, 3, "bf16"), Kind(1, 0, "fp32"), Kind(2, 2, "fp32", offload=True)
    run_ranks(2, save_kinds, [first], str(tmp_path / "a"), 1)
    one, scales = run_ranks(1, go_on_alone, first, second, str(tmp_path / "a"), str(tmp_path / "b"))
    for step in SAVED_AT:
        wrong, losses = one[first, second, step]
        found = put_together(tmp_path / "a" / first.folder / f"step-{step:08d}", first)
        assert not wrong and found["steps"], (step, wrong)
        assert len(found["master"]) == len(found["ema"]) == (3 if step < SAVED_AT[-1] else 5)
        assert furthest(losses, plain_losses(found, step, len(losses))) < ALIKE
    two = run_ranks(2, load_kinds, [(second, third)], str(tmp_path / "b"), {"fp32": 10}, SAVED_AT[:1])
    ((wrong, losses),) = two.values()
    assert not wrong
    # The run in fp32 that nothing interrupts.
    assert furthest(losses, one[first, second, SAVED_AT[0]][1]) < ALIKE
    # Of fp16: kept where both have it, else begun anew.
    assert not any(scales["wrong"]) and scales["saved"][1] > 0
    assert scales["loaded"] == scales["saved"] and scales["saved"][0] < scales["new"] == scales["back"]
    assert scales["bf16"] == 1


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
