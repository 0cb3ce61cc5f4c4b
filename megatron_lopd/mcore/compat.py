"""Megatron-Core without CUDA, and from one release to the next: every choice by device or version.

Megatron-Core runs its collectives on gloo (gloo.py), but names CUDA devices, streams and random
states directly. `prepare()` redirects those to the CPU when `torch.cuda` is not available. Each
`Patch`, and each `Reliance` of other modules on Megatron-Core's inner workings, names the code it was
made for, and the release since which there is such code. When an installed Megatron-Core does not
have it, newer than `NEWEST` or not, `prepare()` refuses, since what has lost its reason may be hiding
a new behaviour.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import gloo, transformer_engine
from megatron_lopd.mcore.reliance import NEWEST, OLDEST, Patch, Reliance, installed
from megatron_lopd.ops.products import without_tf32


class CpuForCuda(TorchFunctionMode):
    """Turns a request for the CUDA device into one for the CPU, for every torch function.

    A mode and not replaced functions: replacing `torch.arange`, `torch.empty` and their like breaks
    libraries that compare or wrap them (rotary frequencies of transformers models turn to garbage).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer and clip_grads tell parameters apart by the CUDA type's name.
            return "torch.cuda." + func(*args).rpartition(".")[2]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _splits_on_host(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """The token counts are on the host already; what is left is to make them arrays, as gloo wants them."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(dispatcher, name)
            if splits is not None:  # one expert parallel rank exchanges nothing
                setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


_LAYERS = "megatron.core.tensor_parallel.layers:ColumnParallelLinear.__init__"
_P2P = "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate"
_RNG = "megatron.core.tensor_parallel.random"
_MOE = "megatron.core.transformer.moe.moe_utils"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher"

WITHOUT_CUDA = (
    Patch(
        "torch.cuda:current_device",
        _cpu_device,
        _LAYERS,
        "device=torch.cuda.current_device()",
        "where weights live",
    ),
    Patch(
        "torch.cuda:synchronize", _nothing, _P2P, "torch.cuda.synchronize()", "waits for a pipeline receive"
    ),
    Patch(
        "torch.cuda:current_stream",
        _nothing,
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "current_stream = torch.cuda.current_stream()",
        "would wait there for replayed CUDA graphs",
        since="0.19.0",
    ),
    Patch(
        "torch.cuda:get_rng_state",
        _get_rng_state,
        f"{_RNG}:CudaRNGStatesTracker.add",
        "torch.cuda.get_rng_state()",
        "keeps one random state a name",
    ),
    Patch(
        "torch.cuda:manual_seed",
        _manual_seed,
        f"{_RNG}:CudaRNGStatesTracker.add",
        "torch.cuda.manual_seed(seed)",
        "seeds the state of a name",
    ),
    Patch(
        "torch.cuda.random:get_rng_state",
        _get_rng_state,
        f"{_RNG}:_get_cuda_rng_state",
        "torch.cuda.random.get_rng_state(",
        "leaves a random state",
    ),
    Patch(
        f"{_RNG}:_set_cuda_rng_state",
        _set_rng_state,
        f"{_RNG}:CudaRNGStatesTracker.fork",
        "_set_cuda_rng_state(",
        "enters a random state",
    ),
    Patch(
        f"{_DISPATCHER}.cuda_dtoh_stream",
        "no stream",
        f"{_DISPATCHER}.__init__",
        "cuda_dtoh_stream = torch.cuda.Stream()",
        "copies token counts to the host on a stream of its own, made unless there is one",
    ),
    Patch(
        f"{_DISPATCHER}._maybe_dtoh_and_synchronize",
        _splits_on_host,
        _DISPATCHER,
        "with torch.cuda.stream(self.cuda_dtoh_stream)",
        "copies token counts to the host on that stream, and makes arrays of them",
    ),
    Patch(
        "torch.distributed:all_gather",
        gloo.all_gather_unequal,
        f"{_MAPPINGS}:_gather_along_first_dim",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        "gathers an expert's tokens, of which ranks have unequal numbers: gloo wants equal ones",
    ),
    Patch(
        "torch.distributed:reduce_scatter",
        gloo.reduce_scatter_unequal,
        f"{_MAPPINGS}:_reduce_scatter_along_first_dim",
        "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
        "gives the results back, in unequal numbers",
    ),
)
WITHOUT_TRANSFORMER_ENGINE = (
    Patch(
        f"{_MOE}:te_general_gemm",
        None,
        f"{_MOE}:RouterGatingLinearFunction.forward",
        "if te_general_gemm is not None",
        "tests a name that is only imported where Transformer Engine is",
    ),
)


RELIANCES = (
    Reliance(
        "mcore/jit.py",
        "megatron.core.fusions.fused_bias_dropout:bias_dropout_add_fused_train",
        "@jit_fuser",
        "puts off the compilation of what is decorated so",
    ),
    Reliance(
        "mcore/model.py",
        "megatron.core.models.gpt:GPTModel.forward",
        "return self._postprocess(",
        "ends the forward pass at the hidden states",
    ),
    Reliance(
        "mcore/private.py",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map",
        'gbuf_range_map["param_map"][param]',
        "asks for the run of a parameter's elements whose state this rank has",
    ),
    Reliance(
        "mcore/private.py",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_main_param_and_optimizer_states",
        '"param": main_param',
        "asks for that state",
    ),
    Reliance(
        "mcore/private.py",
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding._apply_scaling",
        "original_max_position_embeddings",
        "stretches rotary frequencies as config.json says",
    ),
    Reliance(
        "mcore/process_groups.py",
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",
        "@lru_cache",
        "empties a cache that keeps what has been trained before",
    ),
    Reliance(
        "mcore/gloo.py",
        "torch.distributed.distributed_c10d:_new_process_group_helper",
        "ProcessGroupGloo(",
        "has torch make gloo groups of one worker",
    ),
    Reliance(
        "mcore/optimizer.py",
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
        "self.param_to_bucket_group[param].register_grad_ready(",
        "says so itself when it has added the output weight's gradient to main_grad",
    ),
    Reliance(
        "mcore/experts.py",
        "megatron.core.optimizer:_get_param_groups",
        "is_expert_parallel = not getattr(param, 'allreduce', True)",
        "has experts trained by an optimizer of their own at every layout",
    ),
    Reliance(
        "mcore/experts.py",
        f"{_MOE}:RouterGatingLinearFunction.forward",
        "if te_general_gemm is not None and router_dtype != torch.float64",
        "routes fp32 models in fp64 where Transformer Engine's product would be one of TF32",
    ),
)


@functools.cache
def prepare() -> None:
    """Make Megatron-Core run on what this machine has. Does its work once; later calls do nothing.

    Raises ConfigError when the installed Megatron-Core is not what a patch or our code was made for.
    """
    if installed() < Version(OLDEST).release:
        raise ConfigError(
            f"megatron-core {version('megatron-core')} is too old: install one from {OLDEST} to {NEWEST}"
        )
    without_tf32()
    patches: list[Patch] = []
    if not has_transformer_engine():
        patches += WITHOUT_TRANSFORMER_ENGINE
    if not torch.cuda.is_available():
        patches += WITHOUT_CUDA
    else:
        # Triton may be absent, or fail to be imported in any way: kernel_trial.py says so, and nothing of
        # these is called.
        with suppress(Exception):
            from megatron_lopd.mcore.swiglu_patches import PATCHES

            patches += PATCHES  # Megatron-Core calls them where model.py has it
    patches = [patch for patch in patches if patch.reliance.applies]
    for reliance in (*RELIANCES, *(patch.reliance for patch in patches)):
        if reliance.applies:
            reliance.check()
    for patch in patches:
        patch.apply()
    if not torch.cuda.is_available():
        gloo.use_one_worker()
        CpuForCuda().__enter__()  # type: ignore[no-untyped-call]


def device() -> torch.device:
    """This process's device: its current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of `device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is loaded, which takes a GPU (mcore/transformer_engine.py)."""
    return transformer_engine.load().version is not None


def takes_transformer_engine(precision: Literal["fp32", "bf16"]) -> bool:
    """Whether a model's layers are Transformer Engine's: in bf16, where it is loaded.

    In fp32 it multiplies in TF32, of 10 bits, and has no attention but the one that makes [S, S] matrices.
    """
    return precision == "bf16" and has_transformer_engine()


PackedFlash = Callable[..., torch.Tensor]


def variable_length_attention(dtype: torch.dtype) -> PackedFlash | None:
    """torch's own causal packed flash attention (torch >= 2.11, CUDA, 16-bit), or None where it cannot run.

    Called as f(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale); k and v may have fewer heads.
    """
    if not torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return None
    return _packed_flash()


@functools.cache
def _packed_flash() -> PackedFlash | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepted = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(accepted):  # torch 2.10
        return None
    takes_groups = "enable_gqa" in accepted  # torch 2.11 does not say what it makes of fewer heads

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *where: Any, scale: float) -> Any:
        if takes_groups:
            return varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0), enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0))

    return causal
