"""Which parameters train in which optimizer group, stage by stage: pure names, no DeepSpeed, no allocation.

A stage is a stretch of training with one trainable set. Stage 0 is the start of the run; every unfreeze time opens
the next. A stage keeps the groups of the stage before, unchanged and in the same order, and adds the new ones at the
end. The rebuild of the engine (`convclip/engine/zero/build.py`) relies on that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from convclip.config import UserError
from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import layers_below_head, locked_names, unlocked_names
from convclip.schema import Recipe, Unfreeze


@dataclass(frozen=True)
class Group:
    """One optimizer group. Its lr is lr(step) x lr_scale; `event` numbers the unfreeze event that opened it, `layer`
    the tower's layer group, from the input on, where lr decays from layer to layer."""

    name: str
    parameters: tuple[str, ...]
    lr_scale: float
    weight_decay: float
    event: int | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Stage:
    """A trainable set and when it begins: before `step` where an event says so, else at the start of `epoch`."""

    epoch: int | None
    step: int | None
    groups: tuple[Group, ...]
    # Groups that this stage adds; all of them in stage 0.
    opened: tuple[Group, ...]
    events: tuple[Unfreeze, ...] = field(default=())

    @property
    def trainable(self) -> set[str]:
        """Names of the parameters that train in this stage."""
        return {name for group in self.groups for name in group.parameters}

    def start(self, steps_per_epoch: int) -> int:
        """Optimizer step before which this stage begins."""
        return self.step if self.step is not None else (self.epoch or 0) * steps_per_epoch


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, as users name it in recipes and logs."""
    part = name.split(".", 1)[0]
    return "image" if part == "visual" else part


def describe_amount(event: Unfreeze) -> str:
    """`all`, `last 6 layers`, `last 4 groups`."""
    return "all" if event.all else f"last {event.groups or event.layers} {'groups' if event.groups else 'layers'}"


def training_stages(model: DualTower, recipe: Recipe) -> list[Stage]:
    """Stages of `recipe` in the order they begin; `model` may live on the meta device.

    Events are ordered by time; an epoch and a step cannot be compared without the data's size, so a recipe uses one
    or the other. Errors: UserError where an event opens nothing, or more layers than there are.
    """
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    frozen = {name for tower in recipe.freezing.lock for name in locked_names(model, tower)}
    # The reference head of head alignment never trains, and no event opens it.
    trains = [name for name in shapes if name not in frozen and not name.startswith("reference.")]
    layers = _decayed_layers(model, recipe)
    groups = tuple(_groups(trains, shapes, layers, recipe))
    if not groups:
        raise UserError("freezing.lock leaves no parameter to train: unlock a tower")
    stages = [Stage(0, None, groups, groups)]
    for (epoch, step), events in _by_time(recipe.freezing.unfreeze):
        opened: list[Group] = []
        for number, event in events:
            names = unlocked_names(model, event.tower, groups=event.groups, layers=event.layers, all=event.all)
            fresh = [name for name in shapes if name in set(names) & frozen]
            if not fresh:
                raise UserError(
                    f"freezing.unfreeze.{number} opens nothing that is still locked: remove it, or unlock more"
                )
            frozen -= set(fresh)
            opened += _groups(fresh, shapes, layers, recipe, number, event.lr_scale or recipe.freezing.new_lr_scale)
        at_start = not (epoch or step)
        before = stages.pop() if at_start else stages[-1]
        begun = before.opened if at_start else ()
        stages.append(
            Stage(
                epoch, step, before.groups + tuple(opened), begun + tuple(opened), tuple(event for _, event in events)
            )
        )
    return stages


def reached_stages(model: DualTower, recipe: Recipe, steps_per_epoch: int | None = None) -> list[Stage]:
    """The stages that begin before training ends; by epochs alone where the steps of an epoch are not known."""
    stages = training_stages(model, recipe)
    if steps_per_epoch is None:
        return [stage for stage in stages if stage.epoch is None or stage.epoch < recipe.epochs]
    total = min(steps_per_epoch * recipe.epochs, recipe.max_steps or steps_per_epoch * recipe.epochs)
    return [stage for stage in stages if stage.start(steps_per_epoch) < total]


def shown_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups whose lr a log or a figure shows: of a tower's layers only the lowest and the highest of an event."""
    groups = list(groups)
    opened: dict[tuple[str, int | None], list[int]] = {}
    for group in groups:
        if group.layer is not None:
            opened.setdefault((part_of(group.parameters[0]), group.event), []).append(group.layer)
    ends = {key: (min(layers), max(layers)) for key, layers in opened.items()}
    return [
        group
        for group in groups
        if group.layer is None or group.layer in ends[part_of(group.parameters[0]), group.event]
    ]


def event_starts(stages: Iterable[Stage], steps_per_epoch: int) -> dict[str, int]:
    """The step at which each group that an unfreeze event opens begins to train, by the group's name."""
    return {
        group.name: stage.start(steps_per_epoch)
        for stage in stages
        for group in stage.opened
        if group.event is not None
    }


def _by_time(events: Iterable[Unfreeze]) -> list[tuple[tuple[int | None, int | None], list[tuple[int, Unfreeze]]]]:
    """Events with their place in the recipe, gathered by time, earliest first."""
    numbered = list(enumerate(events))
    if len({event.step is None for _, event in numbered}) > 1:
        raise UserError("freezing.unfreeze mixes events by epoch and by step: use one of the two")
    times: dict[tuple[int | None, int | None], list[tuple[int, Unfreeze]]] = {}
    for number, event in sorted(numbered, key=lambda item: (item[1].epoch or 0, item[1].step or 0)):
        times.setdefault((event.epoch, event.step), []).append((number, event))
    return list(times.items())


def _decayed_layers(model: DualTower, recipe: Recipe) -> dict[str, tuple[int, float]]:
    """The layer group of each parameter whose lr decays by layer, and the factor on its lr: decay^(groups up to the
    head). A layer's depth is the tower's, whenever it opens."""
    found = {}
    for tower, decay in recipe.optim.layer_decay.items():
        layers = layers_below_head(model, tower) if decay != 1 else []
        found.update(
            {name: (number, decay ** (len(layers) - number)) for number, names in enumerate(layers) for name in names}
        )
    return found


def _groups(
    names: Iterable[str],
    ndims: dict[str, int],
    layers: dict[str, tuple[int, float]],
    recipe: Recipe,
    event: int | None = None,
    new_scale: float = 1.0,
) -> list[Group]:
    """Groups of `names` by part, by layer where lr decays by layer, and by weight decay (none for gains, biases and
    logit_scale: fewer than two axes)."""
    gathered: dict[tuple[str, int | None, float, bool], list[str]] = {}
    for name in names:
        layer, factor = layers.get(name, (None, 1.0))
        gathered.setdefault((part_of(name), layer, factor, ndims[name] >= 2), []).append(name)
    scales: dict[str, float] = dict(recipe.optim.part_lr_scale.items())
    suffix = "" if event is None else f".event{event}"
    return [
        Group(
            f"{part}{suffix}{'' if layer is None else f'.layer{layer:02}'}.{'decay' if decays else 'no_decay'}",
            tuple(members),
            new_scale * scales.get(part, 1.0) * factor,
            recipe.optim.weight_decay if decays else 0.0,
            event,
            layer,
        )
        for (part, layer, factor, decays), members in gathered.items()
    ]
