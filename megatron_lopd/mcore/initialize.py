"""Initial weights that do not depend on the layout: each is drawn whole, and this rank's slice kept."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from megatron.core.models.gpt import GPTModel

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of
from megatron_lopd.families.weight_rules import EMBEDDING, OUTPUT
from megatron_lopd.mcore.experts import tensor_split
from megatron_lopd.mcore.names import parameters_by_name


@torch.no_grad()
def draw_weights(model: GPTModel, arch: Architecture, seed: int) -> None:
    """Fill every matrix of `model` from N(0, std^2), by `seed` and its name in the whole model.

    The family says the std of each, most of them config.json's initializer_range.
    Norm weights stay ones and biases zeros, as their modules made them; padded vocabulary rows are zeros.
    """
    initial_std = family_of(arch).initial_std
    for name, weight in parameters_by_name(model, arch).items():
        if weight.dim() < 2:
            continue
        own_seed = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())
        generator = torch.Generator(weight.device).manual_seed(own_seed)
        whole = torch.zeros(_whole_shape(weight), device=weight.device)
        rows = arch.vocab_size if name in (EMBEDDING, OUTPUT) else len(whole)
        whole[:rows].normal_(std=initial_std(arch, name), generator=generator)
        weight.copy_(_slice_of(whole, weight))


def _whole_shape(weight: Any) -> list[int]:
    shape = list(weight.shape)
    if getattr(weight, "tensor_model_parallel", False):
        _, size = tensor_split(weight)
        shape[weight.partition_dim] *= size
    return shape


def _slice_of(whole: torch.Tensor, weight: Any) -> torch.Tensor:
    """This tensor parallel rank's part: one contiguous part of each of `partition_stride` blocks."""
    if not getattr(weight, "tensor_model_parallel", False):
        return whole
    dim: int = weight.partition_dim
    blocks = whole.chunk(weight.partition_stride, dim)
    rank, size = tensor_split(weight)
    return torch.cat([block.chunk(size, dim)[rank] for block in blocks], dim)
