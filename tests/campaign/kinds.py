"""Every kind of broken input, and its weight: about how many of 1,500 cases it gets."""

from __future__ import annotations

from tests.campaign import (
    checked_kinds,
    command_kinds,
    data_kinds,
    model_kinds,
    picture_kinds,
    release_kinds,
    settings_kinds,
)
from tests.campaign.judge import Kind

_WEIGHTED: tuple[tuple[Kind, int], ...] = (
    (settings_kinds.recipes, 220),
    (settings_kinds.overrides, 180),
    (settings_kinds.ds_configs, 180),
    (data_kinds.shards, 140),
    (data_kinds.indexed_shards, 80),
    (data_kinds.listed_data, 60),
    (data_kinds.csv_tables, 100),
    (data_kinds.annotations, 120),
    (data_kinds.images, 160),
    (model_kinds.feature_stores, 90),
    (model_kinds.frame_stores, 80),
    (model_kinds.runs, 50),
    (model_kinds.run_tensors, 20),
    (model_kinds.exports, 40),
    (model_kinds.weight_files, 80),
    (model_kinds.tokenizers, 50),
    (model_kinds.captions, 50),
    (model_kinds.videos, 40),
    (picture_kinds.picture_modes, 60),
    (picture_kinds.picture_shapes, 20),
    (checked_kinds.checked_shards, 50),
    (checked_kinds.joined_stores, 50),
    (checked_kinds.checked_runs, 80),
    (checked_kinds.checked_exports, 40),
    (release_kinds.model_names, 80),
    (release_kinds.text_folders, 100),
    (release_kinds.export_flags, 40),
    (command_kinds.wrong_files, 150),
    (command_kinds.listed_commands, 20),
    (command_kinds.evaluations, 60),
)
KINDS: dict[str, Kind] = {kind.__name__: kind for kind, _ in _WEIGHTED}
WEIGHTS = {kind.__name__: weight for kind, weight in _WEIGHTED}
# Kinds with failures that nobody has mended yet: `make campaign` shows them, `make test` leaves them out. None now.
UNMENDED: tuple[str, ...] = ()
