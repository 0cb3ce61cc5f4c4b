"""How much memory and time the conversion tools take on a random model of a few hundred MB.

    python tools/bench/convert.py [--layers N] [--dir DIR]

Each conversion runs in a process of its own; its growth is the peak resident set, file mappings
included, less what was resident after the imports. The last line is one JSON object, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, Qwen3Config

from megatron_lopd.convert.hf_checkpoint import HFWriter
from megatron_lopd.convert.offline import hf_to_megatron, megatron_to_hf
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.weight_rules import tensor_maps

SHARD_BYTES = 10_000_000


def main() -> None:
    """Make the model, convert it there and back, and print what it took."""
    parser = argparse.ArgumentParser(description="memory and time of the conversion tools")
    parser.add_argument("--layers", type=int, default=16, help="layers of 25 MB (16)")
    parser.add_argument("--dir", help="where to work; needs three times the model (default: temporary)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        root = Path(name)
        model_bytes, largest = make_model(root / "hf", arguments.layers)
        there = measure(hf_to_megatron, root / "hf", root / "megatron")
        back = measure(megatron_to_hf, root / "megatron", root / "back", SHARD_BYTES)
    sizes = {"model_bytes": model_bytes, "largest_tensor_bytes": largest, "shard_bytes": SHARD_BYTES}
    print(json.dumps({**sizes, "hf_to_megatron": there, "megatron_to_hf": back}))


def make_model(directory: Path, layers: int) -> tuple[int, int]:
    """Write a random bf16 Qwen3; returns its bytes and its largest tensor's."""
    directory.mkdir()
    Qwen3Config(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    arch = read_architecture(directory)
    writer = HFWriter(directory, SHARD_BYTES)
    sizes = []
    for item in tensor_maps(arch):
        for name in item.parts:
            tensor = torch.randn(shape(name, arch)).bfloat16()
            sizes.append(tensor.nbytes)
            writer.add(name, tensor)
    writer.close()
    return sum(sizes), max(sizes)


def shape(name: str, arch: Architecture) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor, by the last words of its name."""
    hidden, queries, keys = (
        arch.hidden_size,
        arch.num_heads * arch.head_dim,
        arch.num_kv_heads * arch.head_dim,
    )
    module = name.split(".")[-2]
    matrices = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (arch.ffn_size, hidden),
        "up_proj": (arch.ffn_size, hidden),
        "down_proj": (hidden, arch.ffn_size),
        "q_norm": (arch.head_dim,),
        "k_norm": (arch.head_dim,),
    }
    return matrices.get(module, (hidden,))


def measure(function: Any, source: Path, *arguments: Any) -> dict[str, float]:
    """Run a conversion in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (function, source, *arguments))


def run(function: Any, source: Path, *arguments: Any) -> dict[str, float]:
    """In the process: seconds, and bytes by which the resident set grew at its peak."""
    config = source if (source / "config.json").is_file() else source / "hf"
    AutoConfig.from_pretrained(config)  # what it imports is not the conversion's
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    function(source, *arguments)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": round(seconds, 2), "peak_growth_bytes": max(0, peak - before)}


if __name__ == "__main__":
    main()
