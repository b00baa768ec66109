"""Where a timm trunk can be cut: its modules in the order in which they run, proven by watching it run.

A trunk is watched once on the meta device, where nothing is computed. A module is a chain when what enters its first
child is its own input, what enters each later child is the very tensor that the child before gave, not changed in
between, and its output is the last child's. A chain is taken apart where it holds several of timm's layer groups;
everything else stays whole. So there is no list of architectures to keep, and a trunk whose structure is not plain has
fewer cuts, never wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.models import group_parameters
from torch import Tensor, nn

# What runs the tail of a trunk whose pooling is no module of its own, such as a mean over the map.
TAIL = "forward_head"
# Shape [B, 3, S, S]: two images, since a batch norm in train mode refuses one value per channel.
WATCHED_IMAGES = 2


class Seen(NamedTuple):
    """A tensor as it was at a moment; in-place work on it changes its version."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, value: Any) -> Seen | None:
        return cls(value, value._version) if isinstance(value, Tensor) else None


@dataclass
class Call:
    """A module's run: `name` in the trunk, what went in (None unless it is one tensor) and came out, and its calls."""

    name: str
    entered: Seen | None
    left: Seen | None = None
    inner: list[Call] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether this is its inner calls one after another and nothing else."""
        if not self.inner or self.entered is None or self.left is None:
            return False
        before = [self.entered, *(call.left for call in self.inner)]
        after = [*(call.entered for call in self.inner), self.left]
        names = [call.name for call in self.inner]
        return len(names) == len(set(names)) and all(
            a is not None and b is not None and a.tensor is b.tensor and a.version == b.version
            for a, b in zip(before, after, strict=True)
        )


@dataclass(frozen=True)
class TrunkUnits:
    """A trunk from input to output: names of the modules from each of `cuts` to the next; "" is the trunk itself.

    `map_cut`: the highest cut that does not lie behind the trunk's last feature map.
    """

    cuts: tuple[int, ...]
    units: tuple[tuple[str, ...], ...]
    map_cut: int

    def modules(self, trunk: nn.Module) -> list[tuple[nn.Module, ...]]:
        """The units. They are looked up by name, since synchronised batch norms replace modules."""
        return [tuple(_module(trunk, name) for name in unit) for unit in self.units]


class Tail(nn.Module):
    """A trunk's `forward_head` as a module; it has no parameters, and does not own the trunk."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self._trunk = (trunk,)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [B, C, H, W] -> the trunk's output."""
        return self._trunk[0].forward_head(x)  # type: ignore[operator]  # timm's


def timm_groups(trunk: nn.Module) -> list[list[str]]:
    """timm's own declaration of its layers, from input to output: names of the trunk's parameters.

    A trunk without one is one group.
    """
    if not hasattr(trunk, "group_matcher"):
        return [[name for name, _ in trunk.named_parameters()]]
    groups = group_parameters(trunk, trunk.group_matcher())  # type: ignore[operator]  # timm's
    return [groups[number] for number in sorted(groups)]


def trunk_units(trunk: nn.Module, groups: Sequence[Sequence[str]], size: int) -> TrunkUnits:
    """The units of a timm trunk between the layer `groups` (names of its parameters), for images of `size` pixels.

    `trunk` is on the meta device, and what is found fits every trunk that is built like it. One unit where the trunk is
    no chain of modules, or runs otherwise in training than in evaluation.
    """
    number_of = {name: number for number, group in enumerate(groups) for name in group}
    whole = TrunkUnits((0, len(groups)), (("",),), len(groups))
    found = [_steps(trunk, number_of, size, training) for training in (False, True)]
    if found[0] is None or found[0] != found[1]:
        return whole
    features, tail = found[0]
    names = [*features, *tail]
    held = [_groups_of(trunk, name, number_of) for name in names]
    if sum(len(_parameters_of(trunk, name)) for name in names) != len(number_of):
        return whole
    starts = _starts(held, len(features), len(groups))
    cuts = tuple(starts)
    ends = [*list(starts.values())[1:-1], len(names)]
    units = tuple(tuple(names[a:b]) for a, b in zip(list(starts.values())[:-1], ends, strict=True))
    before_tail = [cut for cut, start in starts.items() if start <= len(features)]
    has_parameters = any(held[len(features) :])
    return TrunkUnits(cuts, units, before_tail[-1] if has_parameters else len(groups))


def _starts(held: Sequence[set[int]], tail: int, count: int) -> dict[int, int]:
    """Each cut -> the place in the trunk's modules where it lies, both ascending; the ends are always among them.

    `held` are the layer groups of each module; from place `tail` on they belong to the trunk's head. A module without
    parameters is run with what comes before it, so that a stored map is as small as can be, but the head's with the
    head: a reference head wants the map before its pool.
    """
    starts = {0: 0}
    for cut in range(1, count):
        places = [
            place
            for place in range(len(held) + 1)
            if all(group < cut for groups in held[:place] for group in groups)
            and all(group >= cut for groups in held[place:] for group in groups)
        ]
        if places:
            starts[cut] = tail if places[0] <= tail <= places[-1] else places[-1]
    return {**starts, count: len(held)}


def _steps(
    trunk: nn.Module, number_of: dict[str, int], size: int, training: bool
) -> tuple[list[str], list[str]] | None:
    """Names of the modules that `forward_features` runs in turn, and those of `forward_head`; None where it does not.

    A module that holds several layer groups is taken apart where it is a chain.
    """
    calls = _watch(trunk, size, training)
    if calls is None or not calls.is_chain or len(calls.inner) != 2:
        return None
    features, tail = calls.inner
    if not features.is_chain:
        return None

    def apart(call: Call) -> Iterator[str]:
        if call.is_chain and len(_groups_of(trunk, call.name, number_of)) > 1:
            for inner in call.inner:
                yield from apart(inner)
        else:
            yield call.name

    steps = [name for call in features.inner for name in apart(call)]
    if tail.is_chain:
        return steps, [name for call in tail.inner for name in apart(call)]
    # What a tail that is no chain may do beside its modules needs none of the parameters.
    return (steps, [TAIL]) if not any(_parameters_of(trunk, call.name) for call in tail.inner) else None


def _watch(trunk: nn.Module, size: int, training: bool) -> Call | None:
    """The calls of a forward pass: `forward_features` and `forward_head`, with those of all modules within.

    None where the trunk has no such methods, or cannot run on the meta device.
    """
    if not hasattr(trunk, "forward_features") or not hasattr(trunk, TAIL):
        return None
    images = torch.zeros(WATCHED_IMAGES, 3, size, size, device="meta")
    whole = Call("", Seen.now(images))
    trunk.train(training)
    try:
        with torch.no_grad(), _recorded(trunk, whole):
            output = trunk(images)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError):
        return None
    whole.left = Seen.now(output)
    return whole


@contextmanager
def _recorded(trunk: nn.Module, whole: Call) -> Iterator[None]:
    """While it lasts, the calls of the trunk's modules and of its two methods are kept in `whole`."""
    running = [whole]

    def begin(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = Call(name, Seen.now(args[0]) if len(args) == 1 and not named else None)
        running[-1].inner.append(call)
        running.append(call)

    def end(output: Any) -> None:
        running.pop().left = Seen.now(output)

    def method(name: str) -> Callable[..., Any]:
        bound = getattr(trunk, name)

        def run(*args: Any, **named: Any) -> Any:
            begin(name, args, named)
            output = bound(*args, **named)
            end(output)
            return output

        return run

    with ExitStack() as stack:
        for name, module in trunk.named_modules():
            if name:
                before = module.register_forward_pre_hook(
                    lambda module, args, named, name=name: begin(name, args, named), with_kwargs=True
                )
                after = module.register_forward_hook(lambda module, args, output: end(output))
                stack.callback(before.remove)
                stack.callback(after.remove)
        for name in ("forward_features", TAIL):
            setattr(trunk, name, method(name))
            stack.callback(delattr, trunk, name)
        yield


def _module(trunk: nn.Module, name: str) -> nn.Module:
    return Tail(trunk) if name == TAIL else trunk.get_submodule(name)


def _parameters_of(trunk: nn.Module, name: str) -> list[str]:
    if name == TAIL:
        return []
    return [f"{name}.{parameter}" for parameter, _ in trunk.get_submodule(name).named_parameters()]


def _groups_of(trunk: nn.Module, name: str, number_of: dict[str, int]) -> set[int]:
    return {number_of[parameter] for parameter in _parameters_of(trunk, name)}
