"""The DeepSpeed engine of a run that opens its towers in stages: built once, rebuilt at every unfreeze event."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from convclip.devices import RandomState, current_device
from convclip.distributed import on_main, rank, share_from_main, world_size
from convclip.engine.planned_stop import PlannedStop
from convclip.engine.stages.groups import Stage, event_starts, training_stages
from convclip.engine.stages.norms import norms_kept
from convclip.engine.zero.build import build_engine, dismantle, rebuild_engine
from convclip.engine.zero.checkpoint import (
    load_checkpoint,
    move_pointer,
    refuse_not_finite,
    remove_old,
    save_checkpoint,
    save_locked,
)
from convclip.engine.zero.ds_config import adapts_loss_scale, precision
from convclip.engine.zero.masters import clamp_parameter, master_shards
from convclip.engine.zero.moving_average import MovingAverage
from convclip.locks import Lock
from convclip.models.batch_norm import average_running_statistics
from convclip.models.checkpoint_weights import RunState, load_weights, read_state, write_state
from convclip.models.dual_tower import Cut, DualTower
from convclip.models.layer_groups import frozen_cut
from convclip.schema import Recipe, UserError


@dataclass
class Start:
    """Where a run begins: the state it has there, the checkpoint that this is from (None for a new run), whether
    that `is_own`, in the run's folder, what the log should say of how it was found, the main rank's `lock` of the
    folder, where it may `stop` early, and the recipe that the checkpoint was `saved` with. A run that `keeps_weights`
    not writes figures alone."""

    state: RunState
    checkpoint: Path | None = None
    is_own: bool = False
    notes: list[str] = field(default_factory=list)
    lock: Lock | None = None
    keeps_weights: bool = True
    stop: PlannedStop = field(default_factory=PlannedStop)
    saved: Recipe | None = None


class StagedEngine:
    """Owns the engine, the stage it is in, the fp32 values of what has not been opened yet, and the masters.

    In this order: `load` the weights, perhaps a `trial`, `start`, and before every step `open_due`. `stage` numbers the
    present one of `stages`. `engine` is the DeepSpeed engine of that stage, a new one after each event; `trainable` are
    the names it trains, and `frozen` is the cut below which nothing trains. `average` is the moving average of them.
    """

    engine: DeepSpeedEngine
    trainable: set[str]
    frozen: Cut

    def __init__(
        self, model: DualTower, recipe: Recipe, ds_config: Mapping[str, Any], steps_per_epoch: int, folder: Path
    ) -> None:
        """`model` is in fp32 on the CPU; `folder` is the run's. Errors: UserError of the recipe's events."""
        self.recipe, self.ds_config, self.folder = recipe, ds_config, folder
        self.world, self.dtype = world_size(), precision(ds_config)
        self.adapts_loss_scale = adapts_loss_scale(ds_config)
        self.micro_batches: int = ds_config["gradient_accumulation_steps"]
        self.stages = training_stages(model, recipe)
        self.starts = [stage.start(steps_per_epoch) for stage in self.stages]
        self.event_starts = event_starts(self.stages, steps_per_epoch)
        self.stage = 0
        model.keep_norms(recipe.freezing.still_norms)
        self.average = MovingAverage(recipe.optim.ema_decay)
        self._model = model

    @property
    def present(self) -> Stage:
        """The stage that trains."""
        return self.stages[self.stage]

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with `name`, `lr` and `lr_scale`; the trainer sets lr before every step."""
        return self.engine.optimizer.param_groups

    def load(self, begin: Start) -> None:
        """Weights of the checkpoint, if any; the state learns which locked weights belong to the run.

        Errors: UserError on every rank.
        """
        state, checkpoint = begin.state, begin.checkpoint
        self._lock = begin.lock
        self._keeps_weights = begin.keeps_weights
        if checkpoint is not None:
            # One rank reads all weights, and sends them to the others: what trains they read by pieces in `start`.
            on_main(lambda: load_weights(self._model, checkpoint))
            share_from_main(self._model.state_dict().values(), current_device())
        # What is locked is written by a run that begins in its folder: one of an earlier run there is not this one's.
        if not begin.is_own and self._keeps_weights:
            state.locked = save_locked(self._model, self.stages[0].trainable, self.folder / "checkpoints", state.run)
        ever = self.stages[-1].trainable
        self._unopened = {n: p.detach().clone().cpu() for n, p in self._model.named_parameters() if n in ever}

    @contextlib.contextmanager
    def trial(self, total_steps: int) -> Iterator[None]:
        """An engine of the last stage that a run of `total_steps` reaches, for as long as the context lasts."""
        self._build(max(number for number, start in enumerate(self.starts) if start < total_steps or number == 0))
        yield
        dismantle(self.engine)
        self.average.begin(())

    def start(self, begin: Start) -> None:
        """Build the engine for the stage of the run's state, with all that a checkpoint has of the optimizer."""
        state, checkpoint = begin.state, begin.checkpoint
        # With other data, steps per epoch and so the starts of the stages are others.
        if state.stage >= len(self.stages) or state.step < self.starts[state.stage]:
            raise UserError(
                f"cannot resume at step {state.step}: stage {state.stage} of the unfreeze schedule, open by then, "
                "would now begin later or not at all; resume from a checkpoint before that event, or with the same data"
            )
        self._refuse_other_norms(begin)
        self._build(state.stage)
        self._unopened = {n: value for n, value in self._unopened.items() if n not in self.trainable}
        torch.manual_seed(self.recipe.seed + rank())
        if checkpoint is not None:
            has_average, seed = self.average.decay is not None, self.recipe.seed
            self.average.begin(self._shards, load_checkpoint(self.engine, checkpoint, has_average, seed))

    def _refuse_other_norms(self, begin: Start) -> None:
        """A run of before `freezing.batch_norm` took each batch's statistics in what opened, and goes on so."""
        state = begin.state
        if begin.checkpoint is not None and not state.batch_norm:
            kept = norms_kept(self._model, self.recipe, self.stages[-1].trainable)
            if kept:
                raise UserError(
                    f"cannot resume, {begin.checkpoint} is of a convclip whose opened batch norms took each batch's "
                    f"statistics, and {kept} would now keep theirs: add --set freezing.batch_norm=batch"
                )
        state.batch_norm = self.recipe.freezing.batch_norm or "auto"

    def open_due(self, step: int) -> Iterator[Stage]:
        """Open the stages that begin before optimizer step `step`, one by one; the engine is rebuilt for each."""
        while self.stage + 1 < len(self.stages) and step >= self.starts[self.stage + 1]:
            self.stage += 1
            values = {name: self._unopened.pop(name) for group in self.present.opened for name in group.parameters}
            self.engine = rebuild_engine(self.engine, self.present.groups, self.ds_config, self.recipe.optim, values)
            self._look()
            self.average.follow(self._shards)
            yield self.present

    def clamp_logit_scale(self, low: float, high: float) -> None:
        """Keep the logit scale (not exponentiated) within bounds, in the masters and in the model."""
        clamp_parameter(self.engine, self._shards, "logit_scale", low, high)

    @contextlib.contextmanager
    def evaluating(self, ema: bool = False) -> Iterator[None]:
        """The model in eval mode and without gradient, with running statistics that all ranks share.

        `ema`: with the moving average as its weights; training then goes on as if that had not been evaluated. The
        weights are evaluated before it: averaging equal statistics once more may change their last digit.
        """
        if not ema:
            average_running_statistics(self._model)
        self.engine.eval()
        random = RandomState.now()
        with torch.no_grad(), self.average.as_weights(self.engine) if ema else contextlib.nullcontext():
            yield
        if ema:
            random.restore()
        self.engine.train()

    def save(self, state: RunState, is_best: bool, keep_last: int) -> None:
        """Write a checkpoint on all ranks, point `latest` (and `best`) at it, and remove all but the newest and best.

        A run that keeps no weights only makes sure that they are finite, as a checkpoint's have to be.

        Errors: UserError on every rank where one cannot write, or where another run has taken the folder over.
        """
        if self._lock is not None:
            on_main(self._lock.check)
        average_running_statistics(self._model)
        state = replace(state, stage=self.stage)
        if not self._keeps_weights:
            refuse_not_finite(self.engine, state.step, self.average.values)
            return
        path = save_checkpoint(self.engine, self.folder / "checkpoints", state, self.average.values)
        # In this order: whoever reads a pointer in between finds a checkpoint that is there.
        move_pointer(self.folder, "latest", path)
        if is_best:
            move_pointer(self.folder, "best", path)
        remove_old(self.folder, keep_last)

    def mark_best(self, state: RunState) -> bool:
        """Make the checkpoint resumed from say that it is the best; False where it is not in this run's folder."""
        path = self.folder / "checkpoints" / f"step-{state.step:08d}"

        def mark() -> bool:
            if not path.is_dir():
                return False
            write_state(path, replace(read_state(path), best=state.best))
            return True

        marked = on_main(mark)
        if marked:
            move_pointer(self.folder, "best", path)
        return marked

    def _build(self, stage: int) -> None:
        self.stage = stage
        self.engine = build_engine(self._model, self.present.groups, self.ds_config, self.recipe.optim, self._unopened)
        self._look()
        self.average.begin(self._shards)

    def _look(self) -> None:
        self._shards = master_shards(self.engine)
        self.trainable = self.present.trainable
        self.frozen = frozen_cut(self._model, self.trainable)
