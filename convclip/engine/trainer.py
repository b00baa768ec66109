"""The training loop: one place to read what happens in a run, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from convclip.data.loader import EpochLoader
from convclip.distributed import rank, world_size
from convclip.engine.evaluations import ImageEvaluation
from convclip.engine.inputs import Inputs, InputSource
from convclip.engine.meters import LossWatch, RunLog, StepClock, logger, memory_gib, on_accelerator
from convclip.engine.objective import Objective, VideoObjective
from convclip.engine.plan.memory import check_estimate
from convclip.engine.reports import step_figures, summary_report, unfreeze_report
from convclip.engine.stages.groups import event_starts, reached_stages, training_stages
from convclip.engine.stages.schedule import LearningRates
from convclip.engine.steps import accumulated_step, chunked_step
from convclip.engine.trial import try_full_step
from convclip.engine.zero.build import build_engine, dismantle, rebuild_engine
from convclip.engine.zero.checkpoint import load_checkpoint, move_pointer, remove_old, save_checkpoint, save_locked
from convclip.engine.zero.ds_config import precision, zero_stage
from convclip.engine.zero.masters import clamp_parameter, optimizer_shards
from convclip.models.checkpoint_weights import RunState, load_weights, read_state
from convclip.models.layer_groups import frozen_cut, parameter_counts
from convclip.schema import Recipe
from convclip.video.video_inputs import VideoInputs, VideoSource


class Trainer:
    """Trains a dual tower by a recipe under DeepSpeed; `fit()` is the run."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        ds_config: dict[str, Any],
        loader: EpochLoader,
        source: InputSource | VideoSource,
        objective: Objective | VideoObjective,
        evaluation: ImageEvaluation | None,
        folder: Path,
        checkpoint: Path | None = None,
    ) -> None:
        self.recipe, self.ds_config, self.loader, self.folder = recipe, ds_config, loader, folder
        self.source, self.objective, self.evaluation = source, objective, evaluation
        self.device = torch.device(get_accelerator().current_device_name())
        self.dtype = precision(ds_config)
        self.total_steps = min(loader.steps_per_epoch * recipe.epochs, recipe.max_steps or math.inf)
        self.micro_batches = ds_config["gradient_accumulation_steps"]
        self.log = RunLog(folder, self.total_steps)
        self.clock, self.losses = StepClock(), LossWatch(recipe.max_bad_steps)
        self.step, self.stage, self.best = 0, 0, {}
        self.stages = training_stages(model, recipe)
        self.starts = [stage.start(loader.steps_per_epoch) for stage in self.stages]
        self.rates = LearningRates(recipe, self.total_steps, event_starts(self.stages, loader.steps_per_epoch))
        self._start_engine(model, checkpoint)

    def fit(self) -> dict[str, Any]:
        """Run to the last step and return the summary (also logged)."""
        started, first_step = time.perf_counter(), self.step
        self._report_start()
        while self.step < self.total_steps:
            epoch, step_in_epoch = divmod(self.step, self.loader.steps_per_epoch)
            batches = None
            self.clock.reset()
            for number in range(step_in_epoch, self.loader.steps_per_epoch):
                if self._unfreeze_if_due() or batches is None:
                    # A stage may need pictures or captions that the one before had from the store.
                    batches = self.loader.epoch(epoch, number, **self.source.wanted)
                losses, logit_scale = self._train_step(epoch, batches)
                self.step += 1
                self.clock.steps += 1
                if self.step == first_step + 1:
                    self._report_memory()
                self._report_step(epoch, losses, logit_scale)
                if self._save_due_in_epoch():
                    self._save()
                if self.step == self.total_steps:
                    break
            self._finish_epoch(epoch)
        seconds = time.perf_counter() - started
        summary, line = summary_report(self.recipe, self.best, self.step - first_step, seconds)
        logger.info(line)
        logger.info(f"next: deepspeed launch/evaluate.py --checkpoint {self.folder} --data … --output_dir …")
        self.log.close()
        return summary

    def _train_step(self, epoch: int, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns the losses (of this rank) and exp(logit_scale), with the bias if any."""
        self.rates.set(self.step, self.engine.optimizer.param_groups)
        self.objective.step = self.step
        self.source.teacher_is_on = self.objective.is_on(self.recipe.teacher)
        inputs = (self._next_inputs(epoch, batches) for _ in range(self.micro_batches))
        if self.recipe.batch.micro is None:
            losses, logit_scale = accumulated_step(self.engine, inputs, self.objective, self.micro_batches)
        else:
            keep = self.recipe.batch.keep_frozen_gib * 2**30
            losses, logit_scale = chunked_step(self.engine, inputs, self.objective, self.frozen, keep)
        clamp_parameter(self.engine, self.shards, "logit_scale", 0.0, self.recipe.optim.max_logit_scale)
        return losses, logit_scale

    def _try_last_stage(self, model: nn.Module) -> None:
        """On an accelerator, find out before the data starts whether a step of the run's largest stage fits."""
        if not on_accelerator() or self.recipe.video is not None:
            return
        now, self.stage = self.stage, len(reached_stages(model, self.recipe, self.loader.steps_per_epoch)) - 1
        stage = self.stages[self.stage]
        self.engine = build_engine(model, stage.groups, self.ds_config, self.recipe.optim, self.fp32_values)
        self._look_at_engine()
        try_full_step(
            self.engine,
            self.recipe,
            stage,
            self.ds_config,
            self.source,
            lambda made_up: self._train_step(0, made_up),
        )
        dismantle(self.engine)
        self.stage = now

    def _report_memory(self) -> None:
        """After the first step on an accelerator: the plan's estimate beside the true peak."""
        if on_accelerator() and self.recipe.video is None:
            stage = self.stages[self.stage]
            logger.info(check_estimate(self.recipe, stage, self.ds_config, world_size(), memory_gib()))

    def _next_inputs(self, epoch: int, batches: Iterator[dict[str, Any]]) -> Inputs | VideoInputs:
        """The next micro batch on the device; names the samples in it that were broken."""
        batch = self.clock.waiting(batches)
        for problem in batch["broken"]:
            logger.warning(f"step {self.step + 1}: broken sample replaced: {problem}")
        return self.source(batch, epoch)

    def _unfreeze_if_due(self) -> bool:
        """Open the stages that begin before this step: the engine is rebuilt with their groups added."""
        before = self.stage
        while self.stage + 1 < len(self.stages) and self.step >= self.starts[self.stage + 1]:
            self.stage += 1
            stage, started = self.stages[self.stage], time.perf_counter()
            values = {n: self.fp32_values.pop(n) for group in stage.opened for n in group.parameters}
            self.engine = rebuild_engine(self.engine, stage.groups, self.ds_config, self.recipe.optim, values)
            self._look_at_engine()
            self.rates.set(self.step, self.engine.optimizer.param_groups)
            epoch, seconds = self.step // self.loader.steps_per_epoch, time.perf_counter() - started
            for event in stage.events:
                self.log.event(*unfreeze_report(self.engine, self.recipe, stage, event, self.step, epoch, seconds))
            self.clock.reset()
        return self.stage > before

    def _report_step(self, epoch: int, losses: dict[str, Tensor], logit_scale: Tensor) -> None:
        """Every `log_every` steps write the figures; in between only watch that the loss is finite."""
        due = self.step % self.recipe.log_every == 0 or self.step == self.total_steps
        self.losses.add(self.step, losses["total"])
        self.losses.read(keep=0 if due else 1)
        if not due:
            return
        row = {
            "step": self.step,
            "epoch": epoch,
            **step_figures(self.engine, losses, logit_scale),
            **self.clock.report(self.recipe.batch.global_),
        }
        self.log.metrics(row)
        for warning in self.objective.warnings(row):
            logger.warning(warning)

    def _finish_epoch(self, epoch: int) -> None:
        """After an epoch's last step (or the run's): evaluate, then save."""
        last = self.step == self.total_steps
        every = self.recipe.evaluation.every_epochs
        figures = None
        if self.evaluation is not None and every and (last or (epoch + 1) % every == 0):
            figures = self._evaluate(epoch)
        every = self.recipe.checkpoint.every_epochs
        if every and (last or (epoch + 1) % every == 0):
            self._save(figures)

    def _report_start(self) -> None:
        """Before the first step of a new run, the figures that training starts from, where the evaluation has some."""
        if self.step or self.evaluation is None:
            return
        self.engine.eval()
        with torch.no_grad():
            figures = self.evaluation.start(self.engine, self.device, self.dtype)
        self.engine.train()
        if figures is None:
            return
        self.log.evaluation({"step": 0, "epoch": 0, "event": "start", **figures}, self.evaluation.table(figures))
        problem = self.evaluation.start_problem(figures)
        if problem:
            logger.warning(problem)

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        self.engine.eval()
        with torch.no_grad():
            figures = self.evaluation.figures(self.engine, self.device, self.dtype)
        self.engine.train()
        row = {"step": self.step, "epoch": epoch, **figures}
        self.log.evaluation(row, self.evaluation.table(figures))
        return figures

    def _save_due_in_epoch(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        at_epoch_end = self.step % self.loader.steps_per_epoch == 0 or self.step == self.total_steps
        return bool(every) and self.step % every == 0 and not (at_epoch_end and self.recipe.checkpoint.every_epochs)

    def _save(self, figures: dict[str, Any] | None = None) -> None:
        """Save a checkpoint, move `latest`, and `best` where the mean standard R@1 is higher than ever."""
        self.losses.read()
        if self.losses.bad_steps:
            logger.warning(f"step {self.step}: not saved, the loss is not finite")
            return
        first = [value for key, value in figures["standard"].items() if key.endswith("_r1")] if figures else [-1.0]
        score = sum(first) / len(first)
        is_best = bool(figures) and score > self.best.get("mean_r1", -1.0)
        if is_best:
            self.best = {"mean_r1": score, "step": self.step, **figures["standard"]}
        state = RunState(
            self.step, self.stage, world_size(), zero_stage(self.ds_config), str(self.dtype), dict(self.best)
        )
        path = save_checkpoint(self.engine, self.folder / "checkpoints", state)
        move_pointer(self.folder, "latest", path)
        if is_best:
            move_pointer(self.folder, "best", path)
        remove_old(self.folder, self.recipe.checkpoint.keep_last)

    def _start_engine(self, model: nn.Module, checkpoint: Path | None) -> None:
        """Build the engine for stage 0, or for the checkpoint's stage, and restore it."""
        if checkpoint is not None:
            state = read_state(checkpoint)
            load_weights(model, checkpoint)
            self.step, self.stage, self.best = state.step, state.stage, state.best
        save_locked(model, self.stages[0].trainable, self.folder / "checkpoints")
        ever_trained = self.stages[-1].trainable
        self.fp32_values = {n: p.detach().clone().cpu() for n, p in model.named_parameters() if n in ever_trained}
        self._try_last_stage(model)
        trainable = self.stages[self.stage].trainable
        counts = parameter_counts(model, trainable)
        groups = self.stages[self.stage].groups
        self.engine = build_engine(model, groups, self.ds_config, self.recipe.optim, self.fp32_values)
        self.fp32_values = {n: value for n, value in self.fp32_values.items() if n not in trainable}
        self._look_at_engine()
        torch.manual_seed(self.recipe.seed + rank())
        if checkpoint is not None:
            load_checkpoint(self.engine, checkpoint)
            logger.info(f"resumed from {checkpoint}: {self.step} of {self.total_steps} steps done")
        micro = self.ds_config["train_micro_batch_size_per_gpu"]
        logger.info(
            f"{self.recipe.name}: trainable visual {counts['visual']:,} text {counts['text']:,} "
            f"total {counts['total']:,}"
        )
        logger.info(
            f"micro batch {micro} x accumulation {self.micro_batches} x world {world_size()} = global batch "
            f"{micro * self.micro_batches * world_size()}; {self.loader.steps_per_epoch} steps per epoch, "
            f"{self.total_steps} in all"
        )
        logger.info(self.rates.describe())

    def _look_at_engine(self) -> None:
        """What a stage fixes: where the logit scale's master lies, and how much of the towers is frozen."""
        self.shards = optimizer_shards(self.engine)
        trainable = self.stages[self.stage].trainable
        self.frozen = frozen_cut(self.engine.module, trainable)
        self.source.enter_stage(self.frozen, trainable)
