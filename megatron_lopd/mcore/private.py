"""What torch and Megatron-Core keep for themselves and this project uses: imported and called here alone.

NAMES are looked up before they are imported, so that a release without one of them is refused in one line
that names it. What is called by a private name on an object has its Reliance in compat.py, for it needs
modules that take long to import.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from megatron_lopd.mcore.reliance import Reliance

_FORMAT = "torch.distributed.checkpoint"
_SHARDS = "megatron.core.dist_checkpointing"
_READS = "reads and writes checkpoints in torch's format"
_SAVES = "writes checkpoints that megatron-core reads"

NAMES = (
    Reliance("checkpoint/torch_dist.py", f"{_FORMAT}.filesystem:_StorageInfo", "", _READS),
    Reliance("checkpoint/torch_dist.py", f"{_FORMAT}.metadata:MetadataIndex", "", _READS),
    Reliance("checkpoint/torch_dist.py", f"{_FORMAT}.metadata:TensorProperties", "", _READS),
    Reliance("checkpoint/torch_dist.py", f"{_FORMAT}.planner:SavePlan", "", _READS),
    Reliance("checkpoint/torch_dist.py", "torch.serialization:_get_layout", "", _READS),
    Reliance("checkpoint/layer_states.py", "torch._utils:_rebuild_tensor_v2", "", _READS),
    Reliance("checkpoint/layer_states.py", "torch._utils:_rebuild_tensor_v3", "", _READS),
    Reliance("checkpoint/sharded.py", f"{_SHARDS}.core:CONFIG_FNAME", "", _SAVES),
    Reliance("checkpoint/sharded.py", f"{_SHARDS}.core:CheckpointingConfig", "", _SAVES),
    Reliance("convert/torch_dist_reader.py", f"{_SHARDS}.core:save_config", "", _SAVES),
    Reliance("checkpoint/sharded.py", f"{_SHARDS}.strategies.common:COMMON_STATE_FNAME", "", _SAVES),
    Reliance("checkpoint/tensor_shards.py", f"{_SHARDS}.dict_utils:nested_values", "", _SAVES),
    Reliance("checkpoint/tensor_shards.py", f"{_SHARDS}.mapping:ShardedTensorFactory", "", _SAVES),
    Reliance("checkpoint/tensor_shards.py", f"{_SHARDS}.mapping:is_main_replica", "", _SAVES),
)
for _name in NAMES:
    _name.check()

from megatron.core.dist_checkpointing.core import (  # noqa: E402
    CONFIG_FNAME,
    CheckpointingConfig,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME  # noqa: E402
from torch.distributed.checkpoint import filesystem, metadata, planner  # noqa: E402
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # noqa: E402
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties  # noqa: E402

__all__ = [
    "COMMON_STATE_FNAME",
    "CONFIG_FNAME",
    "INDEX_MODULES",
    "CheckpointingConfig",
    "MetadataIndex",
    "ShardedTensorFactory",
    "StorageInfo",
    "TensorProperties",
    "get_layout",
    "gloo_options",
    "is_main_replica",
    "nested_values",
    "save_config",
    "state_of",
    "state_range",
    "stretch_rotary",
    "tensor_rebuilders",
]

INDEX_MODULES = (metadata, planner, filesystem)
"""Whose dataclasses and enums a checkpoint's index is made of."""

get_layout = torch.serialization._get_layout
"""By which an index names a tensor's layout."""


tensor_rebuilders = {
    name: getattr(torch._utils, name) for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
}
"""What the pickle of a tensor names, of torch._utils."""


def state_range(optimizer: Any, parameter: Tensor) -> Any:
    """The run of a parameter's elements whose state a DistributedOptimizer of this rank has."""
    return optimizer._get_model_param_range_map(parameter)["param"]


def state_of(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """That state: the master weights and the moments, by name."""
    state: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    return state


def stretch_rotary(rotary: Any, **scaling: float) -> None:
    """Stretch a RotaryEmbedding's frequencies as Llama 3; GPTModel's own option fixes all but the factor."""
    rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)


def gloo_options(timeout: timedelta, interfaces: list[str]) -> Any:
    """Of a gloo group with one worker thread, over these network interfaces; none: the default one."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(interface=name) for name in interfaces] or [
        ProcessGroupGloo.create_default_device()
    ]
    return options
