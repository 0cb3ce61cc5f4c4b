"""Whole checkpoints, Hugging Face <-> Megatron, in one process and never whole in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedObject

from megatron_lopd.checkpoint.torch_dist import TorchDistReader
from megatron_lopd.convert.hf_checkpoint import HFWeights, HFWriter, carry_over, new_directory
from megatron_lopd.convert.torch_dist_reader import TensorChunk, save_chunks
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.weight_rules import (
    Split,
    TensorMap,
    as_stored,
    merge_parts,
    split_parts,
    tensor_maps,
)

HF_SUBDIRECTORY = "hf"  # of a Megatron checkpoint: config, tokenizer, ... for the way back


def hf_to_megatron(hf_dir: str | Path, out_dir: str | Path) -> None:
    """Write a Hugging Face checkpoint as a Megatron distributed checkpoint, dtypes unchanged.

    `out_dir` appears when it is complete; its `hf/` holds the config and tokenizer files. Raises
    ConfigError for an unsupported architecture or an `out_dir` that is not empty, DataError for
    weights that are missing, surplus, malformed or of mixed dtypes.
    """
    source, target = Path(hf_dir), Path(out_dir)
    arch = read_architecture(source)
    maps = tensor_maps(arch)
    with HFWeights(source) as weights, new_directory(target) as directory:
        weights.check(maps, arch)
        save_chunks(_chunks(maps, weights, arch), _module_states(maps), directory)
        (directory / HF_SUBDIRECTORY).mkdir()
        carry_over(source, directory / HF_SUBDIRECTORY, None)


def megatron_to_hf(
    megatron_dir: str | Path, out_dir: str | Path, max_shard_bytes: int, hf_dir: str | Path | None = None
) -> None:
    """Write the model in a Megatron distributed checkpoint as a Hugging Face checkpoint.

    Config and tokenizer files come from `hf_dir`, by default the checkpoint's own `hf/`. Dtypes are
    unchanged; config.json's is corrected where `hf_dir` declares another. Optimizer state in the
    checkpoint is left alone. Raises ConfigError for an `out_dir` that is not empty or a missing
    `hf_dir`, DataError for tensors that are missing, surplus or damaged.
    """
    source = Path(megatron_dir)
    reader = TorchDistReader(source)
    files = source / HF_SUBDIRECTORY if hf_dir is None else Path(hf_dir)
    if not (files / "config.json").is_file():
        raise ConfigError(f"{files}: no config.json: name the model's Hugging Face directory with --hf-dir")
    arch = read_architecture(files)
    maps = tensor_maps(arch)
    _check(reader, maps)
    with new_directory(Path(out_dir)) as directory:
        writer = HFWriter(directory, max_shard_bytes)
        for item in maps:
            tensor = reader.read(item.key, item.offset)
            if item.split is Split.VOCAB:
                tensor = tensor[: arch.vocab_size]  # a checkpoint of a TP layout has padding rows
            heads_per_group = arch.num_heads // arch.num_kv_heads
            parts = split_parts(item.split, tensor, arch.num_kv_heads, heads_per_group)
            for name, part in zip(item.parts, as_stored(item, parts), strict=True):
                writer.add(name, part)
        writer.close()
        embedding = reader.tensors[maps[0].key].properties.dtype
        carry_over(files, directory, None if hf_dir is None else embedding)


def _chunks(maps: list[TensorMap], weights: HFWeights, arch: Architecture) -> list[TensorChunk]:
    chunks: list[TensorChunk] = []
    form: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}  # of each key: its first layer's decides
    for item in maps:
        chunk = _chunk(item, weights, arch)
        if form.setdefault(item.key, (chunk.dtype, chunk.size)) != (chunk.dtype, chunk.size):
            raise DataError(
                f"{weights.file(item.parts[0])}: {', '.join(item.parts)} differ in shape or dtype from those "
                "of other layers, and Megatron stacks them: the checkpoint is damaged or of mixed dtypes"
            )
        chunks.append(chunk)
    return chunks


def _chunk(item: TensorMap, weights: HFWeights, arch: Architecture) -> TensorChunk:
    dtypes = {weights.dtype(name) for name in item.parts}
    if len(dtypes) > 1:
        raise DataError(
            f"{weights.file(item.parts[0])}: {', '.join(item.parts)} become one Megatron tensor and "
            "must have one dtype: cast the checkpoint"
        )
    parts = weights.parts(item, arch)
    shape = (sum(rows for _, _, rows in parts), *weights.shape(item.parts[0])[1:])
    lead = (1,) * len(item.stack)
    return TensorChunk(
        key=item.key,
        dtype=dtypes.pop(),
        size=(*item.stack, *shape),
        offset=(*item.offset, *(0 for _ in shape)),
        shape=(*lead, *shape),
        make=lambda: merge_parts(
            item.split,
            [weights.read(name, 0, first, first + rows) for name, first, rows in parts],
            arch.num_kv_heads,
        ).view(*lead, *shape),
    )


def _module_states(maps: list[TensorMap]) -> list[str]:
    """Keys of the FP8 state that modules have in a checkpoint, and that a model asks for on loading.

    Megatron's own linear layers have one that is empty; Transformer Engine's have theirs on every
    module with a weight and on the attention, and take None for none.
    """
    weights = [item for item in maps if item.split is not Split.VOCAB and item.key.endswith(".weight")]
    modules = [(item.key.removesuffix(".weight"), item) for item in weights]
    modules += [
        (item.key.replace("linear_qkv.weight", "core_attention"), item)
        for item in weights
        if item.split is Split.QKV
    ]
    return [
        ShardedObject(f"{name}._extra_state", None, item.stack or (1,), item.offset or (0,)).unique_key
        for name, item in modules
    ]


def _check(reader: TorchDistReader, maps: list[TensorMap]) -> None:
    stored = reader.tensors
    for item in maps:
        if item.key not in stored or stored[item.key].size[: len(item.stack)] != torch.Size(item.stack):
            raise DataError(
                f"{reader.directory}: tensor {item.key} stacked {list(item.stack)} is missing: "
                "config.json is not that of this checkpoint"
            )
    surplus = sorted(key for key in stored.keys() - {item.key for item in maps} if "optimizer" not in key)
    if surplus:
        raise DataError(
            f"{reader.directory}: tensor {surplus[0]} is not part of the model that config.json describes"
        )
