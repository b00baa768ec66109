"""Environment of every test: CPU, offline, one thread; and the real data folder where there is one."""

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong; and a failure should be the same one again.
settings.register_profile("convclip", deadline=None, derandomize=True)
settings.load_profile("convclip")

REPOSITORY = Path(__file__).resolve().parent.parent
# `make test-full`: everything marked `full`, and every cell of the tables that `make test` takes a choice of.
FULL = "CONVCLIP_FULL" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FULL:
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="make test-full runs it"))


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder with flickr8k, coco and msrvtt samples (CONVCLIP_REALDATA, or ../shared/data)."""
    folder = Path(os.environ.get("CONVCLIP_REALDATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set CONVCLIP_REALDATA to run this test")
    return folder
