"""AdamW on Megatron-Core's distributed optimizer: data-parallel wrapping, schedule, and one guarded step.

The distributed optimizer is used at every size, data-parallel 1 included: it alone writes checkpoints
that can be read at another layout. Weight decay spares biases and norms (Megatron-Core's default).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lopd.config import OptimizerConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore.model import PackedGPTModel


@dataclass(frozen=True)
class Optimization:
    """What a step works on: the model's chunks on this rank, wrapped, their optimizer and its schedule."""

    chunks: list[DistributedDataParallel]
    optimizer: Any  # megatron.core.optimizer.ChainedOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def learning_rate(self) -> float:
        """The rate the next step will use."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate


def build_optimization(
    model: Sequence[PackedGPTModel],
    config: OptimizerConfig,
    precision: Literal["fp32", "bf16"],
    total_steps: int,
) -> Optimization:
    """Wrap `model`'s chunks, whose weights must be loaded already: the fp32 master weights are copies.

    Raises ConfigError when the warm-up is not shorter than the run.
    """
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} is not below the run's {total_steps} steps: "
            f"set it to at most {total_steps - 1}"
        )
    chunks = _wrap(model)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16",
            params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:
        _allocate_moments(part)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    return Optimization(chunks, optimizer, scheduler)


def _wrap(model: Sequence[PackedGPTModel]) -> list[DistributedDataParallel]:
    """Data-parallel wrapping. Between several ranks, gradients are reduced while the last micro-batch's
    backward still runs, and updated weights are gathered while the next step's forward already does."""
    config = model[0].config  # one object, which the chunks share
    overlap = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    # One bucket for all but the first chunk: the schedule overlaps the others' communication as it is.
    chunks = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    ]
    # With calculate_per_token_loss it divides the summed gradients by the global batch's loss count.
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        config.grad_sync_func = grad_sync if len(chunks) > 1 else grad_sync[0]
        _gather_output_weight(chunks[-1])
        _report_output_gradient(chunks[-1])
    return chunks


def _gather_output_weight(chunk: DistributedDataParallel) -> None:
    """Have the final norm wait for the output layer's weight, which is read without calling that layer."""
    model = chunk.module
    if model.post_process:
        buckets = chunk.param_to_bucket_group[model.output_weight()]
        model.decoder.final_layernorm.register_forward_pre_hook(lambda *unused: buckets.finish_param_sync())


def _report_output_gradient(chunk: DistributedDataParallel) -> None:
    """Have the output layer's weight counted as ready to be reduced where autograd does not see its gradient.

    A weight that is this chunk's embedding as well is counted when the embedding's gradient is added, later.
    """
    model = chunk.module
    if model.post_process and not (model.pre_process and model.share_embeddings_and_output_weights):
        weight = model.output_weight()
        buckets = chunk.param_to_bucket_group[weight]
        model.output_grad_ready = lambda: buckets.register_grad_ready(weight)


def finish_gathering(optimization: Optimization) -> None:
    """Make the chunks' weights those of the last step on every rank, which the next forward would do."""
    for chunk in optimization.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def zero_gradients(optimization: Optimization) -> None:
    """Clear the gradient buffers before a step."""
    for chunk in optimization.chunks:
        chunk.zero_grad_buffer()
    optimization.optimizer.zero_grad()


@torch.no_grad()
def guarded_step(optimization: Optimization) -> tuple[float, bool]:
    """Clip and apply the finalized gradients: (global norm before clipping, whether it was applied).

    A norm that is not finite leaves weights and moments untouched. The norm is reduced over every rank
    (`get_grad_norm`), so all of them skip together. `MegatronOptimizer.step` would clip by that norm and
    go on, which is why its parts are called here. The schedule advances either way: the learning rate
    is a function of the step alone.
    """
    optimizer = optimization.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    finite = math.isfinite(norm)
    if finite:
        for part in optimizer.chained_optimizers:
            if part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()
    optimization.scheduler.step(1)
    return norm, finite


def common_state(optimizer: Any) -> dict[Any, Any]:
    """What Adam keeps that is not of single parameters, in Megatron-Core's form for its "fully reshardable"
    checkpoints: parameter groups, with the number of steps done in each."""
    states = {
        index: part.state_dict() | {"param_state_sharding_type": "fully_reshardable"}
        for index, part in enumerate(optimizer.chained_optimizers)
    }
    return states if len(states) > 1 else states[0]


def load_common_state(optimizer: Any, state: dict[Any, Any]) -> None:
    """Go on counting steps where `common_state` was. The rest of it is the schedule's and the recipe's.

    Whichever Adam saved it: torch's keeps a float beside each parameter's moments, Transformer Engine's and
    Apex's an integer a parameter group, and their groups have settings that the other does not know.
    """
    parts = optimizer.chained_optimizers
    for index, part in enumerate(parts):
        groups = (state if len(parts) == 1 else state[index])["optimizer"]["param_groups"]
        # A group without parameters on the rank that saved it may have none.
        step = max(int(group.get("step") or 0) for group in groups)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for moments in part.optimizer.state.values():
                moments["step"] = torch.tensor(float(step))  # not shared: each update counts its own up
        else:
            for group in part.optimizer.param_groups:
                group["step"] = step


def _allocate_moments(part: Any) -> None:
    """Give Adam its moments now: a fresh one has none, and its state cannot be saved or loaded.

    Transformer Engine's and Apex's Adam keep one `step` a parameter group, from the first step on; torch's
    keeps one beside each parameter's moments, and takes moments without it for a broken state.
    """
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state["step"] = torch.zeros(())
