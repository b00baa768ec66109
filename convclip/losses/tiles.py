"""Computes a large logits matrix tile by tile, with a running softmax over its rows and columns.

Shape legend: B rows of this rank, W world, N = W*B columns of all ranks, D embed; row i pairs with column `first` + i.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convclip.distributed import Group, all_reduce_max, all_reduce_sum


def at_least_single(x: Tensor) -> Tensor:
    """x in float32 when it is float16 or bfloat16, else x: sums over a large batch need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products of x keep its precision, whatever autocast the caller is in."""
    return torch.autocast(x.device.type, enabled=False)


def same_image(row_ids: Tensor, column_ids: Tensor, pair_at: int) -> Tensor:
    """bool [rows, columns]: of one image, but not the matching pairs, which stand on diagonal `pair_at`."""
    same = row_ids[:, None] == column_ids[None, :]
    same.diagonal(pair_at).fill_(False)
    return same


class LogitTiles:
    """Tiles of the logits scale * rows @ columns.T, computed into one buffer that the next tile overwrites.

    rows [B, D], columns [N, D], scale (), ids (int64 [B], int64 [N]) or None: with ids, entries of one image other
    than the matching pair are -inf. `first` is the column of row 0's pair, `tile` the largest height and width.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, first: int, tile: int, ids: tuple | None = None):
        self.rows, self.columns, self.scale, self.first, self.ids = rows, columns, scale, first, ids
        self.tile = min(tile, max(len(rows), len(columns)))

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields (rows, columns, logits, spare): the tile, and room of the same shape; both may be overwritten."""
        buffers = self.rows.new_empty(2, self.tile, self.tile)
        for top in range(0, len(self.rows), self.tile):
            rows = slice(top, min(top + self.tile, len(self.rows)))
            scaled = self.rows[rows] * self.scale
            for left in range(0, len(self.columns), self.tile):
                columns = slice(left, min(left + self.tile, len(self.columns)))
                logits, spare = buffers[:, : rows.stop - top, : columns.stop - left]
                torch.mm(scaled, self.columns[columns].T, out=logits)
                if self.ids is not None:
                    same = same_image(self.ids[0][rows], self.ids[1][columns], self.first + top - left)
                    logits.masked_fill_(same, -torch.inf)
                yield rows, columns, logits, spare

    def pairs(self, rows: slice, columns: slice, tile: Tensor) -> tuple[slice, Tensor]:
        """(rows whose matching pair lies in this tile, a view of these entries of `tile`); both may be empty."""
        diagonal = self.first + rows.start - columns.start
        entries = tile.diagonal(diagonal)
        start = rows.start + max(0, -diagonal)
        return slice(start, start + len(entries)), entries


class FeatureGradients:
    """Gradients of rows [B, D], columns [N, D] and scale () of some LogitTiles, summed up tile by tile.

    Without `columns_learn`, as when a text tower is locked, there is none for the columns: a quarter less work.
    """

    def __init__(self, tiles: LogitTiles, columns_learn: bool = True):
        self.tiles = tiles
        self.rows = torch.zeros_like(tiles.rows)
        self.columns = torch.zeros_like(tiles.columns) if columns_learn else None

    def add(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        """Takes in the gradient of one tile of logits."""
        self.rows[rows].addmm_(gradient, self.tiles.columns[columns])
        if self.columns is not None:
            self.columns[columns].addmm_(gradient.T, self.tiles.rows[rows])

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """(rows, columns, scale). The sums so far lack the scale; times the rows they are the scale's gradient."""
        # A product and a sum would hold another [B, D].
        scale = torch.einsum("bd,bd->b", self.rows, self.tiles.rows).sum()
        columns = None if self.columns is None else self.columns.mul_(self.tiles.scale)
        return self.rows.mul_(self.tiles.scale), columns, scale


class RunningSoftmax:
    """The softmax over each line (row or column) of a matrix that comes in tiles.

    Each line keeps its largest logit and the sum of exponentials relative to it. One log-sum-exp in place of the two
    would round away digits that the gradient needs. `weighted` is the sum of another matrix's
    entries under these exponentials, where `add` is given them.
    """

    def __init__(self, lines: int, like: Tensor):
        # Finite, so that a line whose entries so far are all -inf gives 0 and not nan.
        self.maximum = like.new_full((lines,), torch.finfo(like.dtype).min)
        self.total = like.new_zeros(lines)
        self.weighted = like.new_zeros(lines)

    def add(self, part: slice, logits: Tensor, dim: int, spare: Tensor, values: Tensor | None = None) -> None:
        """Takes in a tile whose lines, each along `dim`, are those of `part`; overwrites `spare`."""
        before = self.maximum[part]
        maximum = torch.maximum(before, logits.amax(dim))
        fade = (before - maximum).exp_()
        torch.sub(logits, maximum.unsqueeze(dim), out=spare).exp_()
        self.total[part] = self.total[part] * fade + spare.sum(dim)
        if values is not None:
            self.weighted[part] = self.weighted[part] * fade + spare.mul_(values).sum(dim)
        self.maximum[part] = maximum

    def join(self, group: Group) -> None:
        """Makes this the softmax over the entries that all ranks have seen of the same lines."""
        maximum = all_reduce_max(self.maximum, group)
        fade = (self.maximum - maximum).exp_()
        self.total, self.weighted = all_reduce_sum(torch.stack((self.total, self.weighted)) * fade, group)
        self.maximum = maximum

    def minus_log(self, logits: Tensor, part: slice = slice(None)) -> Tensor:
        """-log softmax of one logit of each line of `part`."""
        return (self.maximum[part] - logits) + self.total[part].log()

    def mean(self, part: slice = slice(None)) -> Tensor:
        """Mean of the values given to `add` under the softmax of each line of `part`."""
        return self.weighted[part] / self.total[part]

    def probability(self, part: slice, logits: Tensor, dim: int, weight: Tensor, out: Tensor) -> Tensor:
        """Softmax of a tile times each line's weight, into `out`, which may be `logits`."""
        factor = (weight[part] / self.total[part]).unsqueeze(dim)
        return torch.sub(logits, self.maximum[part].unsqueeze(dim), out=out).exp_().mul_(factor)
