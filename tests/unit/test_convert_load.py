"""What reading into a model refuses; in a process of its own, as it patches torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gloo import run_ranks
from safetensors.torch import load_file, save_file

from tests.model_zoo import make_model_dir


def edit_config(directory: Path, **keys: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return directory


def test_refusals_name_the_tensor_the_file_and_the_way_out(tmp_path: Path) -> None:
    rows = edit_config(make_model_dir(tmp_path / "rows"), vocab_size=130)
    width = edit_config(make_model_dir(tmp_path / "width"), intermediate_size=40)
    surplus = make_model_dir(tmp_path / "surplus")
    tensors = load_file(surplus / "model.safetensors")
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(64),
    }
    save_file({**tensors, **buffers}, surplus / "model.safetensors")
    tied = make_model_dir(tmp_path / "tied", tied=True)
    tensors = load_file(tied / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tied / "model.safetensors")
    head[-1, -1] += 1
    other = make_model_dir(tmp_path / "other", tied=True)
    save_file({**tensors, "lm_head.weight": head}, other / "model.safetensors")
    errors = run_ranks(1, collect_errors, [rows, width, surplus, tied, other])[0]
    assert errors == [
        f"DataError: {rows}/model.safetensors: tensor model.embed_tokens.weight has 131 rows, and "
        "config.json says vocab_size=130: make them agree",
        f"DataError: {width}/model.safetensors: model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight make up (96, 32), and decoder.layers.0.mlp.linear_fc1.weight is "
        "(80, 32): config.json is of another model",
        f"DataError: {surplus}/model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is not part of "
        "the model that config.json describes",
        f"DataError: {other}/model.safetensors: lm_head.weight is not the embedding, and config.json ties "
        "the two: training would drop it: set tie_word_embeddings to false, or remove the tensor",
    ]


def collect_errors(directories: list[Path]) -> list[str]:
    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.errors import LopdError
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.process_groups import model_parallel

    errors = []
    parallel = ParallelConfig()
    with model_parallel(parallel, seed=0):
        for directory in directories:
            arch = read_architecture(directory)
            try:
                load_hf_weights(build_model(arch, parallel, "fp32")[0], arch, directory)
            except LopdError as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors
