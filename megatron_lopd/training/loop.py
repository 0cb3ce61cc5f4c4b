"""The one training loop: sft and train differ in their objective, data and settings alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.config import GuardConfig, TrainingConfig
from megatron_lopd.convert.load_model import load_hf_weights
from megatron_lopd.data.batch_plan import BatchPlan, PlanPart
from megatron_lopd.errors import (
    DataError,
    EngineDied,
    EngineError,
    NumericsError,
    OutOfMemory,
    StopRequested,
    is_out_of_memory,
)
from megatron_lopd.estimate.memory import Training, logit_rows
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.flops import peak_flops, step_flops
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities, notices
from megatron_lopd.mcore.gpus import require_one_kind, require_usable
from megatron_lopd.mcore.model import PackedGPTModel, build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization, guarded_step, zero_gradients
from megatron_lopd.mcore.precision import check_precision, packed_padding
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.mcore.recompute import check_recompute
from megatron_lopd.objectives import get_objective
from megatron_lopd.ops.kernel_trial import agree
from megatron_lopd.runtime import heartbeats
from megatron_lopd.runtime.signals import StopSignals
from megatron_lopd.training.checkpoints import Checkpoint, Checkpoints, Progress, checkpoint_name
from megatron_lopd.training.consensus import any_rank
from megatron_lopd.training.data_sources import Batches
from megatron_lopd.training.guards import (
    check_drift,
    check_skipped,
    checkpoints_kept,
    drift_seen,
    recent_drift,
)
from megatron_lopd.training.job import TrainingJob
from megatron_lopd.training.metrics import Counts, summarize
from megatron_lopd.training.reporter import Reporter
from megatron_lopd.training.saving import Saver, load_checkpoint, newest_checkpoint
from megatron_lopd.training.step import run_micro_batches
from megatron_lopd.training.trainer import Trainer


def run_training(job: TrainingJob) -> Progress:
    """Train from the newest checkpoint, or from the start, to the last step; called in every rank.

    A job of several segments is trained to the end of the one that the newest checkpoint is in.

    Returns what was consumed, over all attempts.

    Raises ConfigError and DataError for input that cannot be trained on and CheckpointError for another
    job's checkpoints, before anything is allocated; CheckpointError for a full disk, NumericsError when a
    guard stops the run, and with the checkpoint saved EngineError from a live sampler or teacher, and
    StopRequested after SIGTERM or SIGUSR1 or when a live teacher's process was killed. OutOfMemory and, for a
    file that cannot be read or written, DataError are of one rank alone: they end it, and the launcher the
    others.
    """
    with _in_a_line(job):
        return _run_training(job)


def _run_training(job: TrainingJob) -> Progress:
    require_usable()
    require_one_kind(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))))
    compat.prepare()
    heartbeats.at(f"setting up {job.name}")
    setup = job.model
    architecture = read_architecture(setup.directory)
    _check_data(job, architecture)
    check_precision(architecture, setup.parallel, setup.fp8)
    grouped = compat.takes_transformer_engine(setup.precision)
    check_recompute(architecture, setup.parallel, setup.fp8, grouped=grouped)
    with (
        StopSignals() as stop,
        model_parallel(setup.parallel, setup.seed) as ranks,
        Reporter(job.name, job.work_dir, ranks.rank, job.config.loggers) as reporter,
    ):
        for line in notices(setup.precision):
            reporter.note(line)
        kept = checkpoints_kept(job.config, job.guard)
        directory, lineage = job.work_dir / "checkpoints", job.segment.lineage
        checkpoints = Checkpoints(directory, job.identity, architecture, lineage, kept)
        newest = newest_checkpoint(checkpoints, reporter.note)
        if job.segment_at is not None:
            job = replace(job, segment=job.segment_at(0 if newest is None else newest.progress.step))
            checkpoints = replace(checkpoints, lineage=job.segment.lineage)
            _check_data(job, architecture)
        agree(compat.device())
        drawn = setup.init == "random" and newest is None
        seed = setup.seed if drawn else None
        model = build_model(architecture, setup.parallel, setup.precision, seed, setup.fp8)
        if setup.init == "pretrained" and newest is None:
            for chunk in model:
                load_hf_weights(chunk, architecture, setup.directory)
        run = _Run(job, model, ranks, reporter, stop, checkpoints)
        return run.to_the_end(newest)


@contextmanager
def _in_a_line(job: TrainingJob) -> Iterator[None]:
    """What a machine lacks, memory or disk, as an error of this project: another start would end alike."""
    try:
        yield
    except ConnectionError:  # another rank's end, for which a start may well go through
        raise
    except OSError as error:
        where = error.filename or job.work_dir
        raise DataError(
            f"{job.name}: {where}: {error.strerror or error}: check the disk and its permissions"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rank, section = os.environ.get("RANK", "0"), job.config.section
        raise OutOfMemory(
            f"{job.name}: memory ran out on rank {rank}, whose device is {compat.device()} "
            f"({str(error).splitlines()[0]}): lower {section}.micro_batch_tokens="
            f"{job.config.micro_batch_tokens}, set parallel.recompute=full, or split the model over more "
            "ranks (parallel.tensor, parallel.pipeline)"
        ) from error


def _check_data(job: TrainingJob, architecture: Architecture) -> None:
    data, padding = job.segment.data, packed_padding(job.model.parallel, job.model.fp8)
    data.require_within(job.config.micro_batch_tokens, padding)
    data.require_positions(architecture.max_positions)
    data.require_vocabulary(architecture.vocab_size)


class _Run:
    """One attempt at a job: from the newest checkpoint on."""

    def __init__(
        self,
        job: TrainingJob,
        model: list[PackedGPTModel],
        ranks: Ranks,
        reporter: Reporter,
        stop: StopSignals,
        checkpoints: Checkpoints,
    ) -> None:
        config, segment, seed = job.config, job.segment, job.model.seed
        self.job, self.reporter, self.stop = job, reporter, stop
        self.device: torch.device = compat.device()
        whole = BatchPlan(len(segment.data), config.global_batch_size, seed)
        whole = segment.part.plan if segment.part else whole
        self.total_steps = _total_steps(config, whole)
        self.part = segment.part or PlanPart(whole, 0, self.total_steps, visited_only=False)
        self.optimization: Optimization = build_optimization(
            model, config.optimizer, job.model.precision, self.total_steps
        )
        self.trainer = Trainer(
            job,
            self.optimization,
            get_objective(job.objective, config),
            model[0].arch,
            ranks,
            self.device,
            reporter.note,
        )
        self.saver = Saver(checkpoints, self.optimization, ranks, self.device)
        self.checkpoints = checkpoints
        self.saved_steps: list[int] = []
        self.peak_flops = peak_flops(capabilities().gpu)
        self.rows = _rows_at_once(self.trainer)

    def to_the_end(self, newest: Checkpoint | None) -> Progress:
        """Go on from `newest`, or from the start when there is none."""
        progress = Progress()
        if newest is not None:
            progress = load_checkpoint(newest, self.optimization, self.trainer.ranks)
            self.saved_steps = [step for step in self.checkpoints.steps() if step <= progress.step]
            if progress.step == self.part.first_step:  # what was drifted from has been replaced
                progress = replace(progress, recent_drift=())
            self.reporter.note(f"resumed after step {progress.step} of {self.total_steps}")
        data = self.job.segment.data
        data.prepare(self.trainer, self.part, progress.step)
        self.reporter.begin(progress.step, self.total_steps)
        try:
            with data.batches(self.trainer, self.part, progress.step) as batches:
                return self._train(progress, batches)
        except NumericsError:  # raised by every rank alike: the checkpoint on its way is worth its while
            self.saver.finish()
            raise

    def _train(self, progress: Progress, batches: Batches) -> Progress:
        while progress.step < self.part.end_step:
            try:
                progress = self._step(progress, batches)
            except EngineError as error:  # raised by every rank alike, before the step changed anything
                self._save_after_engine(error, progress)
                raise
            self.saver.poll()
            stopping = any_rank(self.stop.requested, self.device) and progress.step < self.total_steps
            at_end = progress.step == self.part.end_step
            due = progress.step % self.job.config.checkpoint_every == 0 or at_end
            heartbeats.at(f"after step {progress.step}")  # to write a checkpoint, say
            if due or stopping:
                self.reporter.sync()
                self.saver.start(progress)
                self.saved_steps.append(progress.step)
            if stopping:
                break
        self.saver.finish()
        if progress.step < self.total_steps and any_rank(self.stop.requested, self.device):
            raise StopRequested(
                f"{self.job.name}: stopped on request after step {progress.step} of {self.total_steps}, "
                "with the checkpoint saved: run the same command to go on"
            )
        return progress

    def _save_after_engine(self, error: EngineError, progress: Progress) -> None:
        """Save what was done. Raises StopRequested when the same command may well go through."""
        if progress.step and progress.step not in self.saved_steps:
            self.reporter.sync()
            self.saver.start(progress)
        self.saver.finish()
        if isinstance(error, EngineDied):
            saved = "with the checkpoint saved" if progress.step else "with nothing to save yet"
            raise StopRequested(
                f"{self.job.name}: {error}: stopped after step {progress.step} of {self.total_steps}, "
                f"{saved}: run the same command to go on"
            ) from error

    def _step(self, before: Progress, batches: Batches) -> Progress:
        began = time.perf_counter()
        heartbeats.at(f"step {before.step + 1}", before.step + 1 if self.job.segment.data.is_alone else -1)
        config, guard, trainer = self.job.config, self.job.guard, self.trainer
        micro_batches = batches.get(before.step)
        data_wait = max(0.0, time.perf_counter() - began - sum(batches.seconds.values()))
        batches.check(before.step, micro_batches)
        zero_gradients(self.optimization)
        parts = run_micro_batches(
            self.optimization.chunks,
            trainer.objective,
            micro_batches,
            config.micro_batch_tokens,
            self.device,
            rows=self.rows,
        )
        learning_rate = self.optimization.learning_rate
        grad_norm, applied = guarded_step(self.optimization)
        counts = Counts.of(micro_batches, self.device)
        measured = summarize(parts, counts, trainer.objective, trainer.ranks, self.device)

        seconds = time.perf_counter() - began
        capacity = len(micro_batches) * trainer.ranks.dp_size * config.micro_batch_tokens
        progress = Progress(
            step=before.step + 1,
            samples=before.samples + counts.samples,
            tokens=before.tokens + counts.tokens,
            response_tokens=before.response_tokens + counts.response_tokens,
            skipped_steps=before.skipped_steps + (not applied),
            loss=measured["loss"] if math.isfinite(measured["loss"]) else None,
            recent_drift=recent_drift(before.recent_drift, measured, guard.window) if guard else (),
        )
        self.reporter.step(
            {
                "step": progress.step,
                **measured,
                "grad_norm": grad_norm,
                "lr": learning_rate,
                "samples": counts.samples,
                "tokens": counts.tokens,
                "response_tokens": counts.response_tokens,
                "skipped": int(not applied),
                "packing_fill": counts.tokens / capacity,
                "seconds": seconds,
                "data_wait_s": data_wait,
                **batches.seconds,
                "tokens_per_s": counts.tokens / seconds,
                **self._utilisation(batches.lengths(before.step), counts.response_tokens, seconds),
            }
        )
        check_skipped(progress.skipped_steps, config.max_skipped_steps, progress.step, grad_norm)
        if guard is not None and progress.step < self.total_steps:  # there is nothing left to stop
            last_good = self._last_good(progress.step - guard.window)
            check_drift(progress.recent_drift, guard, progress.step, last_good)
        if guard is not None and progress.step == self.part.end_step:
            self._tell_drift(progress, guard)
        return progress

    def _tell_drift(self, progress: Progress, guard: GuardConfig) -> None:
        if seen := drift_seen(progress.recent_drift, guard, progress.step):
            self.reporter.note(f"{seen}: at its end, so not stopped: see metrics.jsonl before you use it")

    def _last_good(self, step: int) -> Path:
        """What was saved last up to `step`; `to_the_end` sees to it that it is committed."""
        before = [saved for saved in self.saved_steps if saved <= step]
        if not before:
            return self.job.model.directory
        return self.job.work_dir / "checkpoints" / checkpoint_name(max(before))

    def _utilisation(
        self, lengths: NDArray[np.int64], response_tokens: int, seconds: float
    ) -> dict[str, float]:
        """`mfu`, model FLOPs by the bf16 peak of all ranks' GPUs; nothing where that is not known."""
        if self.peak_flops is None:
            return {}
        flops = step_flops(self.trainer.architecture, lengths.tolist(), response_tokens)
        return {"mfu": flops / (seconds * self.trainer.ranks.world_size * self.peak_flops)}


def _rows_at_once(trainer: Trainer) -> int | None:
    """Rows of logits that the log-prob operation may hold, by what training is planned to leave of the card.

    Never by what happens to be free, so that the same recipe on the same card sums in the same order. None,
    the operation's own choice, on a CPU and beside a live sampler, which takes what there is.
    """
    job, setup, device = trainer.job, trainer.job.model, trainer.device
    if device.type != "cuda" or not job.segment.data.is_alone:
        return None
    training = Training(job.config.micro_batch_tokens, setup.precision, setup.fp8 is not None)
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MIN)  # ranks must meet as often
    return logit_rows(trainer.architecture, setup.parallel, trainer.ranks.world_size, training, int(memory))


def _total_steps(config: TrainingConfig, plan: BatchPlan) -> int:
    if config.epochs is not None:
        return plan.steps_for(config.epochs)
    assert config.steps is not None  # TrainingConfig holds exactly one of the two
    return config.steps
