"""Initial weights that do not depend on the layout: each is drawn whole, and this rank's slice kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_lopd.mcore.architecture import Architecture

VOCABULARY_MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def draw_weights(model: GPTModel, arch: Architecture, seed: int) -> None:
    """Fill every matrix of `model` from N(0, init_std^2), by `seed` and its name in the whole model.

    Norm weights stay ones and biases zeros, as their modules made them; padded vocabulary rows are zeros.
    """
    for name, weight in _named_matrices(model):
        if name == "output_layer.weight" and arch.tied:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy of it
        own_seed = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())
        generator = torch.Generator(weight.device).manual_seed(own_seed)
        whole = torch.zeros(_whole_shape(weight), device=weight.device)
        rows = arch.vocab_size if name in VOCABULARY_MATRICES else len(whole)
        whole[:rows].normal_(std=arch.init_std, generator=generator)
        weight.copy_(_slice_of(whole, weight))


def _named_matrices(model: GPTModel) -> Iterator[tuple[str, Any]]:
    """Parameters with two axes, their layer numbered from the first pipeline stage's.

    Typed Any for the attributes by which Megatron-Core says how they are split.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            number = model.decoder.layers[int(layer[1])].layer_number
            name = f"decoder.layers.{number - 1}.{name[layer.end() :]}"
        yield name, weight


def _whole_shape(weight: Any) -> list[int]:
    shape = list(weight.shape)
    if getattr(weight, "tensor_model_parallel", False):
        shape[weight.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def _slice_of(whole: torch.Tensor, weight: Any) -> torch.Tensor:
    """This tensor parallel rank's part: one contiguous part of each of `partition_stride` blocks."""
    if not getattr(weight, "tensor_model_parallel", False):
        return whole
    dim: int = weight.partition_dim
    blocks = whole.chunk(weight.partition_stride, dim)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return torch.cat([block.chunk(size, dim)[rank] for block in blocks], dim)
