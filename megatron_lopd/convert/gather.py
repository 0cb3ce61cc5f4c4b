"""The weights being trained, as Hugging Face tensors, in memory, on every rank; from any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.weight_rules import Split, TensorMap, as_stored, split_parts, tensor_maps
from megatron_lopd.mcore.experts import tensor_split
from megatron_lopd.mcore.names import parameters_by_name
from megatron_lopd.mcore.optimizer import Optimization, finish_gathering


@dataclass(frozen=True)
class _Form:
    """What every rank must know of a Megatron tensor: its parts' whole shapes, and their dtype."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


class WeightGatherer:
    """Brings the model of `optimization` together on every rank, as often as it is asked to.

    Every rank makes one and goes through `weights()` to its end alike. Raises ConfigError when no rank has a
    tensor that the mapping names.
    """

    def __init__(self, optimization: Optimization, arch: Architecture) -> None:
        self._optimization, self._arch = optimization, arch
        self._maps = tensor_maps(arch)
        self._device = next(optimization.chunks[0].module.parameters()).device
        here: dict[str, Any] = {}
        for chunk in optimization.chunks:
            here |= parameters_by_name(chunk.module, arch)
        self._parameters = {
            item.megatron: here[item.megatron]
            for item in self._maps
            if item.megatron in here and _is_main_replica(here[item.megatron], item)
        }
        self._forms = self._agree_on_forms()

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every weight, as the last step left them.

        On the model's device, in the trainer's dtype, without the rows that pad the vocabulary. A tensor may
        be the trainer's own memory: copy it before the next step. One Megatron tensor is held at a time.
        """
        finish_gathering(self._optimization)
        for item in self._maps:
            yield from zip(item.parts, as_stored(item, self._whole_parts(item)), strict=True)

    def _whole_parts(self, item: TensorMap) -> list[Tensor]:
        form = self._forms[item.megatron]
        own = self._own_parts(item)
        if dist.get_world_size() == 1:
            return [part for _, part in own]
        sizes = [torch.Size(shape).numel() for shape in form.shapes]
        packed = torch.zeros(sum(sizes), dtype=form.dtype, device=self._device)
        wholes = [
            part.view(shape) for part, shape in zip(torch.split(packed, sizes), form.shapes, strict=True)
        ]
        for whole, (place, part) in zip(wholes, own, strict=False):  # of a rank without it, none
            whole[place].copy_(part)
        # Each byte is 0 on all ranks but one: their sum is the tensor to the bit, a negative zero too.
        dist.all_reduce(packed.view(torch.uint8))
        return wholes

    def _own_parts(self, item: TensorMap) -> list[tuple[tuple[slice, ...], Tensor]]:
        """This rank's slice of each part and where in the whole it goes; none where others contribute it."""
        parameter = self._parameters.get(item.megatron)
        if parameter is None:
            return []
        rank, size = tensor_split(parameter)
        heads_per_group = self._arch.num_heads // self._arch.num_kv_heads
        parts = split_parts(item.split, parameter.detach(), self._arch.num_kv_heads // size, heads_per_group)
        axis = item.split.split_axis
        if axis is None:
            return [(tuple(slice(None) for _ in part.shape), part) for part in parts]
        own = []
        for part in parts:
            start = rank * part.shape[axis]
            if item.split is Split.VOCAB:
                part = part[: max(0, self._arch.vocab_size - start)]
            place = [slice(None) for _ in part.shape]
            place[axis] = slice(start, start + part.shape[axis])
            own.append((tuple(place), part))
        return own

    def _agree_on_forms(self) -> dict[str, _Form]:
        known: dict[str, _Form] = {}
        for item in self._maps:
            if item.megatron in self._parameters:
                parameter = self._parameters[item.megatron]
                _, size = tensor_split(parameter)
                shapes = [self._whole_shape(item, part.shape, size) for _, part in self._own_parts(item)]
                known[item.megatron] = _Form(tuple(shapes), parameter.dtype)
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, known)
        forms = {name: form for each in everyones for name, form in each.items()}
        for item in self._maps:
            if item.megatron not in forms:
                raise ConfigError(
                    f"the model has no {item.megatron}, which the {self._arch.family} mapping names"
                )
        return forms

    def _whole_shape(self, item: TensorMap, shape: torch.Size, size: int) -> tuple[int, ...]:
        axis = item.split.split_axis
        if axis is None:
            return tuple(shape)
        whole = self._arch.vocab_size if item.split is Split.VOCAB else shape[axis] * size
        return (*shape[:axis], whole, *shape[axis + 1 :])


def _is_main_replica(parameter: Any, item: TensorMap) -> bool:
    """Whether this rank is the one that contributes its slice of `parameter`, or the whole of it."""
    if getattr(parameter, "allreduce", True):
        replica: int = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        replica = parallel_state.get_expert_data_parallel_rank()
    if replica or (item.split is Split.REPLICATED and tensor_split(parameter)[0]):
        return False
    # With tied embeddings the last stage has a copy, under the embedding's name.
    is_embedding = item.megatron.startswith("embedding.")
    return not is_embedding or parallel_state.get_pipeline_model_parallel_rank() == 0
