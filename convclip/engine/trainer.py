"""The training loop: one place to read what happens in a run, top to bottom."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convclip.data.micro_batches import Batch
from convclip.devices import RandomState, current_device, on_accelerator
from convclip.engine.inputs import Reads
from convclip.engine.meters import LossWatch, RunLog, StepClock, logger
from convclip.engine.reports import RiseReport, ema_title, start_report, step_figures, summary_report, unfreeze_report
from convclip.engine.stages.schedule import LearningRates
from convclip.engine.steps import StepResult, accumulated_step, chunked_step
from convclip.engine.task import DualTower, Evaluation, Parts, Task
from convclip.engine.trial import estimate_report, try_full_step
from convclip.engine.zero.staged_engine import StagedEngine, Start


class Trainer:
    """Trains a model by a recipe under DeepSpeed; `fit()` is the run."""

    def __init__(
        self,
        task: Task,
        model: DualTower,
        parts: Parts,
        ds_config: Mapping[str, Any],
        evaluation: Evaluation | None,
        folder: Path,
        start: Start,
    ) -> None:
        """`model` as the task gives it; the run begins at `start`. Errors: UserError."""
        self.task, self.recipe, self.parts, self.evaluation, self.folder = task, task.recipe, parts, evaluation, folder
        self.steps_per_epoch = parts.loader.steps_per_epoch
        self.total_steps = int(min(self.steps_per_epoch * self.recipe.epochs, self.recipe.max_steps or math.inf))
        self.log, self.clock = RunLog(folder, self.total_steps, start.state.step), StepClock()
        self.staged = StagedEngine(model, self.recipe, ds_config, self.steps_per_epoch, folder)
        self.losses = LossWatch(self.recipe.max_bad_steps, skips_are_normal=self.staged.adapts_loss_scale)
        self.rises = RiseReport(self.staged, self.recipe, self.total_steps, start.state.losses)
        self.rates = LearningRates(self.recipe, self.total_steps, self.staged.event_starts)
        self.state, self.stop = start.state, start.stop
        self.saved_step = start.state.step
        self.staged.load(start)
        self._start(start)

    def fit(self) -> dict[str, Any]:
        """Run to the last step and return the summary (also logged)."""
        started, first_step = time.perf_counter(), self.state.step
        self._evaluate_start()
        self._evaluate_missing()
        batches = self._batches()
        while self.state.step < self.total_steps and not self.stop.due(self.state.step):
            self._open_due()
            result = self._train_step(batches)
            self.state.step += 1
            self.clock.step_done()
            if self.state.step == first_step + 1:
                self._report_memory()
            self._report_step(result)
            figures = self._evaluate() if self._evaluation_due() else None
            if self._save_due():
                self._save(figures)
        if self.stop.why and self.saved_step != self.state.step:
            self._save(None)
        self.stop.close()
        seconds = time.perf_counter() - started
        summary, line = summary_report(self.recipe, self.state.best, self.state.step - first_step, seconds)
        logger.info(line)
        if self.stop.why:
            summary["stopped"] = self.stop.why
            logger.info(self.stop.line(self.state.step, self.total_steps, self.saved_step))
        logger.info(f"next: deepspeed launch/evaluate.py --checkpoint {self.folder} --data … --output_dir …")
        self.log.close()
        return summary

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        """One optimizer step on the next micro batches."""
        staged, step, batch = self.staged, self.state.step, self.recipe.batch
        self.rates.set(step, staged.parameter_groups)
        reads = self._reads()
        inputs = (self._inputs(self.clock.waiting(batches), reads) for _ in range(staged.micro_batches))
        if batch.micro is None:
            result = accumulated_step(staged.engine, inputs, self.parts.objective, step)
        else:
            keep = batch.keep_frozen_gib * 2**30
            result = chunked_step(staged.engine, inputs, self.parts.objective, step, staged.frozen, keep)
        staged.clamp_logit_scale(0.0, self.recipe.optim.max_logit_scale)
        if result.updated:
            staged.average.update()
        return result

    def _batches(self) -> Iterator[Batch]:
        """The loader's micro batches from the present step on, epoch after epoch.

        Where a step reads other things than the one before, the loader starts anew at that step: a stage may need
        images or captions that the one before had from the store.
        """
        while True:
            epoch, number = divmod(self.state.step, self.steps_per_epoch)
            reads = self._reads()
            stream = self.parts.loader.epoch(epoch, number, reads.pixels, reads.text)
            while self.state.step // self.steps_per_epoch == epoch and self._reads() == reads:
                yield from itertools.islice(stream, self.staged.micro_batches)

    def _reads(self) -> Reads:
        """What the present step takes from the feature store."""
        return self.parts.source.reads(self.staged.frozen, self.staged.trainable, self.state.step)

    def _inputs(self, batch: Batch, reads: Reads) -> Any:
        """A micro batch on the device; names the samples in it that were broken."""
        for problem in batch["broken"]:
            logger.warning(f"step {self.state.step + 1}: broken sample replaced: {problem}")
        return self.parts.source.inputs(batch, self.state.step // self.steps_per_epoch, reads)

    def _open_due(self) -> None:
        """Open the stages that begin before this step: the engine is rebuilt with their groups added."""
        started = time.perf_counter()
        for stage in self.staged.open_due(self.state.step):
            self.rates.set(self.state.step, self.staged.parameter_groups)
            epoch, seconds = self.state.step // self.steps_per_epoch, time.perf_counter() - started
            for row, line in unfreeze_report(self.staged, self.recipe, stage, self.state.step, epoch, seconds):
                self.log.event(row, line)
            self.clock.reset()
            started = time.perf_counter()

    def _report_step(self, result: StepResult) -> None:
        """Every `log_every` steps write the figures; in between only keep the loss, to see later that it is finite."""
        step = self.state.step
        due = step % self.recipe.log_every == 0 or step == self.total_steps
        self.losses.add(step, result.losses["total"], result.updated)
        if due or self.losses.is_full:
            self._read_losses()
        if not due:
            return
        row = {
            "step": step,
            "epoch": self._epoch,
            **step_figures(self.staged, result),
            **self.clock.report(self.recipe.batch.global_),
        }
        self.log.metrics(row)
        for warning in self.parts.objective.warnings(row):
            logger.warning(warning)

    def _read_losses(self) -> None:
        """Look at the losses since the last time, and say where an event raised them."""
        for line in self.rises.lines(self.losses.read()):
            logger.warning(line)
        self.state.losses = self.rises.recent

    def _report_memory(self) -> None:
        """After the first step on an accelerator: the plan's estimate beside the true peak."""
        if on_accelerator() and self.task.estimates_memory:
            logger.info(estimate_report(self.staged, self.recipe))

    def _evaluate_start(self) -> None:
        """Before the first step of a new run, the figures that training starts from, where the evaluation has some."""
        if self.state.step or self.evaluation is None:
            return
        with self.staged.evaluating():
            figures = self.evaluation.start(self.staged.engine, current_device(), self.staged.dtype)
        if figures is None:
            return
        self.log.evaluation({"step": 0, "epoch": 0, "event": "start", **figures}, self.evaluation.table(figures))
        problem = self.evaluation.start_problem(figures)
        if problem:
            logger.warning(problem)

    def _evaluate_missing(self) -> None:
        """Where a run goes on, write the evaluation that is due there and was lost, or is only now asked for."""
        if not self.state.step or not self._evaluation_due() or self.log.has_evaluation(self.state.step):
            return
        random = RandomState.now()
        figures = self._evaluate()
        # What comes after is to the bit what it would have been.
        random.restore()
        before = self.state.best
        if figures is not None and self.state.take_best(figures["standard"]) and not self.staged.mark_best(self.state):
            self.state.best = before

    @property
    def _epoch(self) -> int:
        """The epoch, counted from 0, that the last step done belongs to."""
        return (self.state.step - 1) // self.steps_per_epoch

    def _at_epoch_end(self, every: int) -> bool:
        """Whether the last step ended an epoch that is due, of every so many (0: none), or the run."""
        last, ends = self.state.step == self.total_steps, self.state.step % self.steps_per_epoch == 0
        return bool(every) and (last or (ends and (self._epoch + 1) % every == 0))

    def _evaluation_due(self) -> bool:
        return self.evaluation is not None and self._at_epoch_end(self.recipe.evaluation.every_epochs)

    def _evaluate(self) -> dict[str, Any] | None:
        """The figures of this step, also written; None where a stop is due before they are there."""
        assert self.evaluation is not None
        figures = self._figures()
        if figures is None:
            return None
        table = self.evaluation.table(figures)
        if self.recipe.optim.ema_decay is not None:
            average = self._figures(ema=True)
            if average is None:
                return None
            table += f"\n{ema_title(self.recipe)}\n{self.evaluation.table(average)}"
            figures = {**figures, "ema": average}
        self.log.evaluation({"step": self.state.step, "epoch": self._epoch, **figures}, table)
        self.clock.reset()
        return figures

    def _figures(self, ema: bool = False) -> dict[str, Any] | None:
        evaluation, staged = self.evaluation, self.staged
        assert evaluation is not None
        with staged.evaluating(ema):
            return self.stop.unless_due(
                staged.engine, lambda encode: evaluation.figures(encode, current_device(), staged.dtype)
            )

    def _save_due(self) -> bool:
        """After every so many steps, at the end of every so many epochs, whichever it is, and after the last step."""
        every, step = self.recipe.checkpoint, self.state.step
        by_step = bool(every.every_steps) and step % every.every_steps == 0
        return by_step or self._at_epoch_end(every.every_epochs) or step == self.total_steps

    def _save(self, figures: dict[str, Any] | None) -> None:
        """Save a checkpoint, move `latest`, and `best` where the mean standard R@1 is higher than ever."""
        self._read_losses()
        if self.losses.bad_steps:
            logger.warning(f"step {self.state.step}: not saved, the loss or the gradient is not finite")
            return
        is_best = figures is not None and self.state.take_best(figures["standard"])
        self.staged.save(self.state, is_best, self.recipe.checkpoint.keep_last)
        self.saved_step = self.state.step
        self.clock.reset()

    def _start(self, start: Start) -> None:
        """Start the engine in stage 0, or where a checkpoint stands."""
        if on_accelerator() and self.task.estimates_memory:
            # Find out before the data starts whether a step of the run's largest stage fits.
            with self.staged.trial(self.total_steps):
                rows, _ = self.recipe.batch.per_rank(self.staged.world)
                batch = self.task.trial_batch(self.parts.source, rows)
                try_full_step(self.staged, self.recipe, batch, self._train_step)
        self.staged.start(start)
        for note in start.notes:
            logger.warning(note)
        if start.checkpoint is not None:
            logger.info(f"resumed from {start.checkpoint}: {self.state.step} of {self.total_steps} steps done")
        for line in start_report(self.staged, self.recipe, self.steps_per_epoch, self.total_steps):
            logger.info(line)
        logger.info(self.rates.describe())
