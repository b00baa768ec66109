"""Collectives against what a single process would compute, in worlds 1 (nothing initialised) and 2."""

import torch

from convclip import distributed
from tests.processes import run_in_world


def test_works_without_initialisation():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.gather_with_gradient(x) is x
    for function in (
        distributed.gather,
        distributed.all_reduce_sum,
        distributed.all_reduce_max,
        distributed.all_reduce_mean,
    ):
        result = function(x)
        assert torch.equal(result, x) and not result.requires_grad
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]


def _who_am_i():
    distributed.barrier()
    return distributed.rank(), distributed.world_size(), distributed.is_main()


def test_rank_and_world():
    assert run_in_world(1, _who_am_i) == [(0, 1, True)]
    assert run_in_world(2, _who_am_i) == [(0, 2, True), (1, 2, False)]


def _reductions():
    x = torch.tensor([1.0, 4.0]) if distributed.rank() == 0 else torch.tensor([3.0, 2.0])
    x.requires_grad_()
    results = [f(x) for f in (distributed.all_reduce_sum, distributed.all_reduce_mean, distributed.all_reduce_max)]
    scalars = distributed.gather(torch.tensor(float(distributed.rank())))
    # What was given in stays as it was.
    return [r.tolist() for r in results], x.tolist(), scalars.tolist()


def test_reductions():
    for rank, (results, given, scalars) in enumerate(run_in_world(2, _reductions)):
        assert results == [[4.0, 6.0], [2.0, 3.0], [3.0, 4.0]]
        assert given == ([1.0, 4.0], [3.0, 2.0])[rank]
        assert scalars == [0.0, 1.0]


def _rows_and_objects(count):
    rank = distributed.rank()
    rows = torch.arange(count * 2).view(-1, 2) + 100 * rank
    return distributed.gather(rows).tolist(), distributed.gather_objects("ab"[rank])


def test_rows_and_objects():
    for count in (3, 1, 0):
        expected = [[100 * r + 2 * i, 100 * r + 2 * i + 1] for r in range(2) for i in range(count)]
        for rows, objects in run_in_world(2, _rows_and_objects, count):
            assert rows == expected
            assert objects == ["a", "b"]


def _gather_gradient(whole, weights):
    """Rank r's loss is weights[r] . everything gathered, through a transposed (non-contiguous) gradient."""
    rank, rows = distributed.rank(), whole.shape[0] // distributed.world_size()
    own = whole[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    gathered = distributed.gather_with_gradient(own)
    (gathered.T * weights[rank].T).sum().backward()
    return gathered.detach(), own.grad


def test_gather_with_gradient():
    whole = torch.randn(4, 3, dtype=torch.float64)
    weights = torch.randn(2, 4, 3, dtype=torch.float64)
    for rank, (gathered, gradient) in enumerate(run_in_world(2, _gather_gradient, whole, weights)):
        assert torch.equal(gathered, whole)
        torch.testing.assert_close(gradient, weights.sum(0)[2 * rank : 2 * rank + 2])


def _group_of_one():
    groups = [torch.distributed.new_group([r]) for r in range(2)]
    mine = groups[distributed.rank()]
    x = torch.ones(2, requires_grad=True)
    return distributed.world_size(mine), distributed.rank(mine), distributed.gather_with_gradient(x, mine) is x


def test_a_group_of_its_own():
    assert run_in_world(2, _group_of_one) == [(1, 0, True), (1, 0, True)]


def _decisions():
    """What one rank decides or fails at, all ranks learn: values, and the words of what was raised."""
    own = distributed.rank()

    def fails_on(ranks):
        if own in ranks:
            raise ValueError(f"rank {own}")
        return own

    found = [distributed.on_main(lambda: f"of {own}"), distributed.alike(lambda: own)]
    for work in (
        lambda: distributed.on_main(lambda: fails_on((0,))),
        lambda: distributed.alike(lambda: fails_on((1,))),
    ):
        try:
            work()
        except ValueError as error:
            found.append(str(error))
    # The main rank alone is asked; an error is raised by all, so all go on together.
    found.append(distributed.on_main(lambda: fails_on((1,))))
    return found


def test_what_one_rank_decides_all_learn():
    assert run_in_world(2, _decisions) == [["of 0", own, "rank 0", "rank 1", 0] for own in (0, 1)]
    assert distributed.on_main(lambda: 3) == distributed.alike(lambda: 3) == 3
