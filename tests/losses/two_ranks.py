"""A loss on two ranks, each with half of the rows; imports little, because the ranks' processes import it too."""

import torch

from convclip import distributed
from tests.processes import run_in_world


def value_and_gradients(loss, *inputs, upstream=1.0, **options):
    """[value, gradient of each input that got one]"""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs, **options)
    (upstream * value).backward()
    return [value.detach(), *(x.grad for x in inputs if x.grad is not None)]


def of_two_ranks(cases, upstream=(1.0, 1.0)):
    """[[values, gradient of each input] put together from both ranks] of every case (loss, inputs, options).

    Inputs with several rows, and such options, are divided between the ranks. What data-parallel training does with
    gradients of parameters is to take their mean over ranks: so the gradients of rows are halved, others averaged.
    """
    joined = []
    for ranks in zip(*run_in_world(2, _all_cases, cases, upstream), strict=True):
        values, *gradients = zip(*ranks, strict=True)
        means = [torch.cat(x) / 2 if x[0].ndim == 2 else torch.stack(x).mean(0) for x in gradients]
        joined.append([torch.stack(values), *means])
    return joined


def _all_cases(cases, upstream):
    return [_own_share(*case, upstream[distributed.rank()]) for case in cases]


def _own_share(loss, inputs, options, upstream):
    options = {name: _half(x) for name, x in options.items()}
    return value_and_gradients(loss, *map(_half, inputs), upstream=upstream, **options)


def _half(x):
    if not isinstance(x, torch.Tensor) or x.numel() == 1:
        return x
    return x.chunk(distributed.world_size())[distributed.rank()]
