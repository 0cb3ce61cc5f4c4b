"""Reads a Hugging Face checkpoint into a Megatron model: each rank its own slices, at any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_lopd.convert.hf_checkpoint import HFWeights
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.weight_rules import Split, TensorMap, merge_parts, tensor_maps
from megatron_lopd.mcore.experts import tensor_split
from megatron_lopd.mcore.model import PackedGPTModel
from megatron_lopd.mcore.names import parameters_by_name


@torch.no_grad()
def load_hf_weights(model: PackedGPTModel, arch: Architecture, hf_dir: str | Path) -> None:
    """Fill every parameter of this rank's part of `model`, cast to the parameter's dtype.

    Padded vocabulary rows are set to zero. Raises DataError naming tensor and file when a tensor is
    missing, surplus, malformed or of the wrong shape, or when the weights are not safetensors.
    """
    parameters = parameters_by_name(model, arch)
    maps = tensor_maps(arch)
    with HFWeights(hf_dir) as weights:
        weights.check(maps, arch)
        for item in maps:
            parameter = parameters.pop(item.megatron, None)
            if parameter is None:
                continue  # another pipeline stage's, or another rank's expert
            tensor = _read(item, weights, arch, parameter)
            if tensor.shape != parameter.shape:
                raise DataError(
                    f"{weights.file(item.parts[0])}: {', '.join(item.parts)} make up {tuple(tensor.shape)}, "
                    f"and {item.megatron} is {tuple(parameter.shape)}: config.json is of another model"
                )
            parameter.copy_(tensor)
    if parameters:
        raise ConfigError(f"no rule of the {arch.family} weight mapping fills {min(parameters)}")


def _read(item: TensorMap, weights: HFWeights, arch: Architecture, parameter: Parameter) -> Tensor:
    """This rank's slice of a Megatron tensor."""
    rank, size = tensor_split(parameter)
    if item.split is Split.VOCAB:
        return _read_vocabulary(item.parts[0], weights, arch, parameter, rank)
    axis = item.split.split_axis
    if axis is None:
        return weights.read(item.parts[0])
    parts = []
    for name, first, rows in weights.parts(item, arch):
        width = (rows if axis == 0 else weights.shape(name)[axis]) // size
        start = (first if axis == 0 else 0) + rank * width
        parts.append(weights.read(name, axis, start, start + width))
    return merge_parts(item.split, parts, arch.num_kv_heads // size)


def _read_vocabulary(
    name: str, weights: HFWeights, arch: Architecture, parameter: Parameter, rank: int
) -> Tensor:
    entries, *features = weights.shape(name)
    if entries != arch.vocab_size:
        raise DataError(
            f"{weights.file(name)}: tensor {name} has {entries} rows, and config.json says "
            f"vocab_size={arch.vocab_size}: make them agree"
        )
    start = rank * len(parameter)
    rows = weights.read(name, 0, start, min(start + len(parameter), entries))
    padding = torch.zeros(len(parameter) - len(rows), *features, dtype=rows.dtype)
    return torch.cat([rows, padding]) if len(padding) else rows
