"""Reading a feature store, and the store in memory: against plain arrays, damage of every kind, worker processes."""

from __future__ import annotations

import gc
import pickle
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from convclip.features.ids import ItemIds
from convclip.features.layout import FORMAT_VERSION, ArraySpec
from convclip.features.reader import FeatureStore, state_dict_sha256, view_ids
from convclip.features.writer import FeatureWriter
from convclip.schema import UserError
from tests.features.extraction import ARRAYS, IDENTITY, ITEMS, extract, features, in_child

REUSED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module", params=[1, 3], ids=["one part", "three parts"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "features.h5"
    for rank in range(request.param):
        extract(path, rank, request.param)
    return path


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return {name: features(name, ITEMS[spec.item_kind]) for name, spec in ARRAYS.items()}


@REUSED
@given(name=st.sampled_from(sorted(ARRAYS)), places=st.lists(st.integers(0, 22), max_size=60))
def test_any_batch_of_ids(path: Path, expected: dict[str, torch.Tensor], name: str, places: list[int]) -> None:
    store = FeatureStore(path)
    ids = [ITEMS[ARRAYS[name].item_kind][place] for place in places]
    for _ in range(2):  # With checksums, then without.
        rows = store.read(name, ids)
        assert rows.dtype == ARRAYS[name].torch_dtype
        assert torch.equal(rows, expected[name][places])
    assert torch.equal(store.read(name, torch.tensor(ids)), rows) if ids and name == "map" else True


def test_what_a_store_says_of_itself(path: Path) -> None:
    store = FeatureStore(path, expect={"model": "tiny", "views": 1, "normalised": False, "fps": 1.5, "note": ""})
    assert store.arrays == ARRAYS and "map" in store and "video" not in store
    assert {key: store.identity[key] for key in IDENTITY} == IDENTITY
    assert set(store.ids("eot")) == set(ITEMS["caption"]) and set(store.ids("map")) == set(ITEMS["image"])
    ids = store.ids("map")
    assert ITEMS["image"][4] in ids and 10**7 not in ids and -1 not in ids
    assert store.rows("map", ids[::-1]).tolist() == list(range(len(ids)))[::-1]


def test_plain_h5py_reads_the_store_wherever_the_folder_is(path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(path.parent, tmp_path / "elsewhere")
    with h5py.File(folder / "features.h5") as file:
        assert file.attrs["format_version"] == FORMAT_VERSION
        assert file["arrays/map"].attrs["units"] == b"trunk output"
        ids = [item.decode() for item in file["ids/caption"][:]]
        assert np.array_equal(file["arrays/eot"][:], features("eot", ids).numpy())
        assert np.array_equal(file["arrays/map"][:], features("map", file["ids/image"][:]).numpy())
        bits = torch.from_numpy(file["arrays/words"][:].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(bits, features("words", ids))
    assert FeatureStore(folder / "features.h5").read("map", ITEMS["image"][:2]).shape == (2, 64, 7, 7)


def test_unknown_ids_and_arrays_are_named(path: Path) -> None:
    store = FeatureStore(path)
    with pytest.raises(UserError, match=r"array map has no row for item 10000000 and 1 more"):
        store.read("map", [ITEMS["image"][0], 10**7, 10**8])
    with pytest.raises(UserError, match="no array video; it has embedding, eot, map, words"):
        store.read("video", [1])
    with pytest.raises(ValueError, match="integers on one side"):
        store.read("map", ["one"])


def test_other_identity_is_refused_naming_both_values(path: Path) -> None:
    for key, value in (("model", "other"), ("views", 2), ("normalised", True)):
        with pytest.raises(UserError, match=f"its {key} is {IDENTITY[key]!r}, wanted is {value!r}"):
            FeatureStore(path, expect={"note": "", key: value})
    with pytest.raises(UserError, match="does not say its layer, which has to be 'stage 3'"):
        FeatureStore(path, expect={"layer": "stage 3"})


def test_files_that_are_no_finished_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such feature store"):
        FeatureStore(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(UserError, match="not a whole feature store"):
        FeatureStore(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="not a feature store of convclip"):
        FeatureStore(tmp_path / "other.h5")
    extract(tmp_path / "features.h5", batches=2)
    with pytest.raises(UserError, match=r"only 6 of 41 caption rows are done|only 6 of 23 image rows are done"):
        FeatureStore(tmp_path / "features.h5.rank-00000-of-00001.part")
    extract(tmp_path / "features.h5")
    with h5py.File(tmp_path / "features.h5", "a") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(UserError, match=f"format 99, this convclip reads {FORMAT_VERSION}"):
        FeatureStore(tmp_path / "features.h5")


def right_or_refused(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the damaged store was refused; if it was not, every row it gives must be right."""
    refused = False
    try:
        store = FeatureStore(path, expect=IDENTITY)
    except UserError as error:
        assert str(path) in str(error)
        return True
    for name, spec in ARRAYS.items():
        for place, item in enumerate(ITEMS[spec.item_kind]):
            try:
                assert torch.equal(store.read(name, [item])[0], expected[name][place])
            except UserError as error:
                refused = True
                assert str(path) in str(error) and f"array {name}" in str(error)
    return refused


@pytest.fixture(scope="module")
def whole(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.parent.iterdir()}


@REUSED
@given(seed=st.integers(0, 10**6))
def test_a_flipped_bit_never_gives_a_wrong_row(
    path: Path, whole: dict[Path, bytes], expected: dict[str, torch.Tensor], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    folder = shutil.copytree(path.parent, tmp_path / "copy", dirs_exist_ok=True)
    file, content = rng.choice(sorted(whole.items()))
    damaged = bytearray(content)
    # Half of the flips hit HDF5's own bookkeeping at the front of the file.
    damaged[rng.randrange(rng.choice([4096, len(content)]))] ^= 1 << rng.randrange(8)
    (folder / file.name).write_bytes(damaged)
    right_or_refused(folder / path.name, expected)


def test_a_flipped_bit_in_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    extract(path)
    with h5py.File(path) as file:
        offset = file["arrays/map"].id.get_offset() + 5 * ARRAYS["map"].row_bytes + 77
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 4
    path.write_bytes(damaged)
    store = FeatureStore(path)
    assert len(store.read("map", ITEMS["image"][:5])) == 5
    for _ in range(2):
        with pytest.raises(UserError, match=rf"features.h5: array map, row 5 \(image {ITEMS['image'][5]}\) is damaged"):
            store.read("map", ITEMS["image"])


@REUSED
@given(seed=st.integers(0, 10**6))
def test_a_truncated_file_is_refused(
    path: Path, whole: dict[Path, bytes], expected: dict[str, torch.Tensor], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    folder = shutil.copytree(path.parent, tmp_path / "copy", dirs_exist_ok=True)
    file, content = rng.choice(sorted(whole.items()))
    (folder / file.name).write_bytes(
        content[: len(content) - 1 - rng.randrange(min(rng.choice([9, 10**9]), len(content)))]
    )
    assert right_or_refused(folder / path.name, expected)


def test_a_file_cut_after_it_was_opened_is_refused(path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(path.parent, tmp_path / "copy")
    store = FeatureStore(folder / path.name)
    for file in folder.iterdir():
        with open(file, "r+b") as opened:
            opened.truncate(3000)
    with pytest.raises(UserError, match=r"array map needs .* truncated"):
        store.read("map", ITEMS["image"])


def test_a_missing_or_foreign_part_is_named(tmp_path: Path) -> None:
    path, part = tmp_path / "features.h5", tmp_path / "features.h5.rank-00001-of-00002"
    for rank in range(2):
        extract(path, rank, 2)
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(UserError, match=r"its part .*rank-00001-of-00002 is missing"):
        FeatureStore(path)
    other = tmp_path / "other.h5"
    writer = FeatureWriter(other, ARRAYS, {**IDENTITY, "model": "other"}, ITEMS, 1, 2)
    shutil.copy(writer._part.path, part)
    with pytest.raises(UserError, match="its model is 'other', wanted is 'tiny'"):
        FeatureStore(path)
    shutil.copy(tmp_path / "features.h5.rank-00000-of-00002", part)
    with pytest.raises(UserError):  # Another rank's rows in its place: sizes or checksums differ.
        FeatureStore(path).read("map", ITEMS["image"])
    part.write_bytes(content)
    assert len(FeatureStore(path).read("map", ITEMS["image"])) == len(ITEMS["image"])


class Maps(Dataset):
    """What the trainer's data set does: a store, opened once, read by batches of ids."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(ITEMS["image"])

    def __getitems__(self, places: list[int]) -> list[tuple[int, torch.Tensor]]:
        return list(zip(places, self.store.read("map", ITEMS["image"][places]), strict=True))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_loader_workers(path: Path, expected: dict[str, torch.Tensor], context: str) -> None:
    workers = {"fork": 2, "spawn": 1}[context]
    loader = DataLoader(
        Maps(FeatureStore(path)), batch_size=4, shuffle=True, num_workers=workers, multiprocessing_context=context
    )
    seen = 0
    for places, rows in loader:
        assert torch.equal(rows, expected["map"][places])
        seen += len(places)
    assert seen == len(ITEMS["image"])


def test_pickles_reopen_and_forks_share_what_was_verified(path: Path) -> None:
    store = pickle.loads(pickle.dumps(FeatureStore(path, expect={"model": "tiny"})))
    assert store.expect == {"model": "tiny"} and not store._verified["map"].any()
    assert in_child(lambda: store.read("map", ITEMS["image"][3:6])) == 0
    assert store._verified["map"].sum() == 3


def test_memory_is_flat_over_epochs(tmp_path: Path) -> None:
    spec, ids, path = ArraySpec((256, 7, 7), "float16"), np.arange(800), tmp_path / "features.h5"
    writer = FeatureWriter(path, {"map": spec}, {}, {"item": ids})
    writer.write(ids, {"map": torch.zeros(800, 256, 7, 7, dtype=torch.float16)})
    writer.finish()
    store, rng = FeatureStore(path), np.random.default_rng(0)

    def own_memory() -> int:
        gc.collect()
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    for epoch in range(12):
        for batch in np.split(rng.permutation(ids), 50):
            store.read("map", batch)
        if epoch == 1:
            before = own_memory()
    assert own_memory() - before < 2_000  # KiB; an epoch reads 20,000.


@given(
    ids=st.one_of(
        st.sets(st.integers(-(2**40), 2**40)),
        st.sets(st.integers(-50, 50)),
        st.sets(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)),
    ),
    data=st.data(),
)
@settings(derandomize=True)
def test_rows_of_ids(ids: set, data: st.DataObject) -> None:
    ids = list(ids)
    other = st.integers(-60, 60) if not ids or isinstance(ids[0], int) else st.text("abcé", max_size=5)
    wanted = data.draw(st.lists(st.one_of(st.sampled_from(ids), other) if ids else other))
    row_of = {item: row for row, item in enumerate(ids)}
    assert ItemIds(ids).find(wanted).tolist() == [row_of.get(item, -1) for item in wanted]


def test_view_ids() -> None:
    ids = np.concatenate([view_ids(torch.tensor([3, 9]), view, 4) for view in range(4)])
    assert len(set(ids.tolist())) == 8 and ids.dtype == np.int64 and view_ids([5], 0, 1).tolist() == [5]
    with pytest.raises(ValueError, match="view 4 of 4"):
        view_ids([1], 4, 4)


def test_fingerprints() -> None:
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones((), dtype=torch.bfloat16)}
    digest = state_dict_sha256(state)
    assert digest == state_dict_sha256(dict(reversed(state.items())))
    assert digest == state_dict_sha256({**state, "b": torch.arange(6.0).view(2, 3).t().contiguous().t()})
    others = [{"b": state["b"].t()}, {"b": state["b"] + 1}, {"a": torch.ones(())}, {"c": torch.ones(1)}]
    assert len({digest, *(state_dict_sha256({**state, **other}) for other in others)}) == 5
