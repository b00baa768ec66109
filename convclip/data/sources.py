"""Which kind of samples lies behind an address."""

from __future__ import annotations

from convclip.data.csv_table import CsvTable
from convclip.data.samples import SampleSource
from convclip.data.shard_table import ShardTable
from convclip.schema import Data


def open_source(address: str, data: Data) -> SampleSource:
    """The samples behind an address, as data.format says; `auto` takes .csv and .tsv files as CSV, all else as shards.

    Raises:
        UserError: nothing readable is there.
    """
    return CsvTable(address, data) if is_csv(address, data) else ShardTable(address, data)


def is_csv(address: str, data: Data) -> bool:
    """Whether an address is taken for a CSV table, not for shards."""
    return data.format == "csv" or (data.format == "auto" and address.lower().endswith((".csv", ".tsv")))
