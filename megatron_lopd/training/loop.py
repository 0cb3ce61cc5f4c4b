"""The one training loop: sft and train differ in their objective, data and settings alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.artifacts.manifest import LineageStatus
from megatron_lopd.config import Fp8Config, ParallelConfig, TrainConfig, TrainingConfig
from megatron_lopd.convert.load_model import load_hf_weights
from megatron_lopd.data.batch_plan import BatchPlan, PlanPart
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.errors import EngineDied, EngineError, NumericsError, StopRequested
from megatron_lopd.estimate.memory import Training, logit_rows
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.flops import peak_flops, step_flops
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities, notices
from megatron_lopd.mcore.gpus import require_one_kind, require_usable
from megatron_lopd.mcore.loader import BatchLoader, ListedSamples
from megatron_lopd.mcore.model import PackedGPTModel, build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization, guarded_step, zero_gradients
from megatron_lopd.mcore.precision import check_precision, packed_padding
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.mcore.recompute import check_recompute
from megatron_lopd.objectives import get_objective
from megatron_lopd.ops.kernel_trial import agree
from megatron_lopd.runtime.signals import StopSignals
from megatron_lopd.training.batches import Batches, CachedBatches
from megatron_lopd.training.checkpoints import Checkpoint, Checkpoints, Progress, checkpoint_name
from megatron_lopd.training.consensus import any_rank
from megatron_lopd.training.fp8_scales import find_scales
from megatron_lopd.training.guards import check_drift, check_skipped, checkpoints_kept, recent_drift
from megatron_lopd.training.live import LiveBatches, LiveData
from megatron_lopd.training.metrics import Counts, summarize
from megatron_lopd.training.preflight import LIVE_CAUSES, Preflight, PreflightCheck
from megatron_lopd.training.reporter import Reporter
from megatron_lopd.training.saving import Saver, load_checkpoint, newest_checkpoint
from megatron_lopd.training.step import run_micro_batches


@dataclass(frozen=True)
class Segment:
    """Steps that are trained from data of their own, and how far that data's lineage is proved."""

    data: TrainingData
    part: PlanPart
    lineage: LineageStatus


@dataclass(frozen=True)
class TrainingJob:
    """Everything a run depends on.

    `name` labels its progress. `identity` is a digest of all that decides its numbers (model, data,
    recipe): a checkpoint that carries another is refused. `model_dir` is the Hugging Face directory to
    start from, its weights left unread when `init` is "random". LiveData is sampled and scored as the run
    goes, by the student as it then is. `work_dir` gets checkpoints/, metrics.jsonl and tensorboard/.
    `preflight` None checks nothing; of LiveData it checks the first step's.

    `segment_at(steps done)`, where given, says in every rank alike what to train from next; it may refuse.
    `data` then has the first segment's, and `part` which steps an attempt is to do (None: all).
    """

    name: str
    identity: str
    lineage: LineageStatus
    config: TrainingConfig
    objective: str
    parallel: ParallelConfig
    precision: Literal["fp32", "bf16"]
    seed: int
    model_dir: Path
    data: TrainingData | LiveData
    work_dir: Path
    init: Literal["pretrained", "random"] = "pretrained"
    preflight: Preflight | None = None
    fp8: Fp8Config | None = None
    segment_at: Callable[[int], Segment] | None = None
    part: PlanPart | None = None


def run_training(job: TrainingJob) -> Progress:
    """Train from the newest checkpoint, or from the start, to the last step; called in every rank.

    A job of several segments is trained to the end of the one that the newest checkpoint is in.

    Returns what was consumed, over all attempts.

    Raises ConfigError and DataError for input that cannot be trained on and CheckpointError for another
    job's checkpoints, before anything is allocated; CheckpointError for a full disk, NumericsError when a
    guard stops the run, and with the checkpoint saved EngineError from a live sampler or teacher, and
    StopRequested after SIGTERM or SIGUSR1 or when a live teacher's process was killed.
    """
    require_usable()
    require_one_kind(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))))
    compat.prepare()
    architecture = read_architecture(job.model_dir)
    _check_data(job, architecture)
    check_precision(architecture, job.parallel, job.fp8)
    grouped = compat.takes_transformer_engine(job.precision)
    check_recompute(architecture, job.parallel, job.fp8, grouped=grouped)
    with (
        StopSignals() as stop,
        model_parallel(job.parallel, job.seed) as ranks,
        Reporter(job.name, job.work_dir, ranks.rank, job.config.loggers) as reporter,
    ):
        for line in notices(job.precision):
            reporter.note(line)
        kept = checkpoints_kept(job.config)
        checkpoints = Checkpoints(job.work_dir / "checkpoints", job.identity, architecture, job.lineage, kept)
        newest = newest_checkpoint(checkpoints, reporter.note)
        if job.segment_at is not None:
            segment = job.segment_at(0 if newest is None else newest.progress.step)
            job = replace(job, data=segment.data, part=segment.part, lineage=segment.lineage)
            checkpoints = replace(checkpoints, lineage=segment.lineage)
            _check_data(job, architecture)
        agree(compat.device())
        model = build_model(architecture, job.parallel, job.precision, job.seed, job.fp8)
        if job.init == "pretrained" and newest is None:
            for chunk in model:
                load_hf_weights(chunk, architecture, job.model_dir)
        run = _Run(job, model, ranks, reporter, stop, checkpoints)
        return run.to_the_end(newest)


def _check_data(job: TrainingJob, architecture: Architecture) -> None:
    job.data.require_within(job.config.micro_batch_tokens, packed_padding(job.parallel, job.fp8))
    job.data.require_vocabulary(architecture.vocab_size)


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
        config = job.config
        self.job, self.ranks, self.reporter, self.stop = job, ranks, reporter, stop
        self.device: torch.device = compat.device()
        self.objective = get_objective(job.objective, config)
        whole = job.part.plan if job.part else BatchPlan(len(job.data), config.global_batch_size, job.seed)
        self.total_steps = _total_steps(config, whole)
        self.part = job.part or PlanPart(whole, 0, self.total_steps, visited_only=False)
        samples = ListedSamples() if isinstance(job.data, LiveData) else job.data
        self.loader = BatchLoader.of(samples, config, job.parallel, ranks, job.fp8)
        self.optimization: Optimization = build_optimization(
            model, config.optimizer, job.precision, self.total_steps
        )
        self.saver = Saver(checkpoints, self.optimization, ranks, self.device)
        self.checkpoints = checkpoints
        self.saved_steps: list[int] = []
        self.guard = config.guard if isinstance(config, TrainConfig) else None
        self.architecture = model[0].arch
        self.peak_flops = peak_flops(capabilities().gpu)
        self.rows = _rows_at_once(job, self.architecture, ranks, self.device)

    def to_the_end(self, newest: Checkpoint | None) -> Progress:
        """Go on from `newest`, or from the start when there is none."""
        progress = Progress()
        if newest is not None:
            progress = load_checkpoint(newest, self.optimization, self.ranks)
            self.saved_steps = [step for step in self.checkpoints.steps() if step <= progress.step]
            if progress.step == self.part.first_step:  # what was drifted from has been replaced
                progress = replace(progress, recent_drift=())
            self.reporter.note(f"resumed after step {progress.step} of {self.total_steps}")
        live = isinstance(self.job.data, LiveData)
        if newest is None and not live:  # a checkpoint brings its own scales
            self._find_scales(self.loader.micro_batches(self.part.samples(0).tolist()))
        if self.job.preflight is not None and progress.step == self.part.first_step and not live:
            self._preflight_check(self.job.preflight).check_cached()
        self.reporter.begin(progress.step, self.total_steps)
        try:
            with self._batches(progress.step) as batches:
                return self._train(progress, batches)
        except NumericsError:  # raised by every rank alike: the checkpoint on its way is worth its while
            self.saver.finish()
            raise

    def _batches(self, first_step: int) -> Batches:
        if isinstance(self.job.data, LiveData):
            return LiveBatches(
                self.job.data,
                self.loader,
                self.part.plan,
                self.optimization,
                self.architecture,
                self.ranks,
                self.device,
            )
        return CachedBatches(self.loader, self.part, self.device, first_step)

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

    def _find_scales(self, micro_batches: list[MicroBatch]) -> None:
        """Under FP8's delayed scaling, from as few of the first step's micro-batches as the layout takes."""
        fp8 = self.job.fp8
        if fp8 is not None and fp8.recipe == "delayed":
            few = micro_batches[: self.loader.count_multiple]
            budget = self.job.config.micro_batch_tokens
            find_scales(self.optimization, self.objective, few, budget, self.device)

    def _check_sampler(self, micro_batches: list[MicroBatch]) -> None:
        """Raise NumericsError unless trainer and live sampler give the first step the same log-probs."""
        if self.job.preflight is not None:
            self._preflight_check(self.job.preflight).check(micro_batches, LIVE_CAUSES)

    def _preflight_check(self, preflight: Preflight) -> PreflightCheck:
        return PreflightCheck(
            preflight, self.optimization.chunks, self.loader, self.ranks, self.device, self.reporter.note
        )

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
        config = self.job.config
        micro_batches = batches.get(before.step)
        data_wait = max(0.0, time.perf_counter() - began - sum(batches.seconds.values()))
        if before.step == 0 and isinstance(self.job.data, LiveData):
            self._find_scales(micro_batches)
            self._check_sampler(micro_batches)
        zero_gradients(self.optimization)
        parts = run_micro_batches(
            self.optimization.chunks,
            self.objective,
            micro_batches,
            config.micro_batch_tokens,
            self.device,
            rows=self.rows,
        )
        learning_rate = self.optimization.learning_rate
        grad_norm, applied = guarded_step(self.optimization)
        counts = Counts.of(micro_batches, self.device)
        measured = summarize(parts, counts, self.objective, self.ranks, self.device)

        seconds = time.perf_counter() - began
        capacity = len(micro_batches) * self.ranks.dp_size * config.micro_batch_tokens
        progress = Progress(
            step=before.step + 1,
            samples=before.samples + counts.samples,
            tokens=before.tokens + counts.tokens,
            response_tokens=before.response_tokens + counts.response_tokens,
            skipped_steps=before.skipped_steps + (not applied),
            loss=measured["loss"] if math.isfinite(measured["loss"]) else None,
            recent_drift=recent_drift(before.recent_drift, measured, self.guard.window) if self.guard else (),
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
        if self.guard is not None:
            check_drift(progress.recent_drift, self.guard, progress.step, self._last_good(progress.step))
        return progress

    def _last_good(self, step: int) -> Path:
        """What the guard would go back to from `step`; `to_the_end` sees to it that it is committed."""
        assert self.guard is not None
        before = [saved for saved in self.saved_steps if saved <= step - self.guard.window]
        if not before:
            return self.job.model_dir
        return self.job.work_dir / "checkpoints" / checkpoint_name(max(before))

    def _utilisation(
        self, lengths: NDArray[np.int64], response_tokens: int, seconds: float
    ) -> dict[str, float]:
        """`mfu`, model FLOPs by the bf16 peak of all ranks' GPUs; nothing where that is not known."""
        if self.peak_flops is None:
            return {}
        flops = step_flops(self.architecture, lengths.tolist(), response_tokens)
        return {"mfu": flops / (seconds * self.ranks.world_size * self.peak_flops)}


def _rows_at_once(
    job: TrainingJob, architecture: Architecture, ranks: Ranks, device: torch.device
) -> int | None:
    """Rows of logits that the log-prob operation may hold, by what training is planned to leave of the card.

    Never by what happens to be free, so that the same recipe on the same card sums in the same order. None,
    the operation's own choice, on a CPU and beside a live sampler, which takes what there is.
    """
    if device.type != "cuda" or isinstance(job.data, LiveData):
        return None
    training = Training(job.config.micro_batch_tokens, job.precision, job.fp8 is not None)
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MIN)  # ranks must meet as often
    return logit_rows(architecture, job.parallel, ranks.world_size, training, int(memory))


def _total_steps(config: TrainingConfig, plan: BatchPlan) -> int:
    if config.epochs is not None:
        return plan.steps_for(config.epochs)
    assert config.steps is not None  # TrainingConfig holds exactly one of the two
    return config.steps
