"""What a checkpoint costs: how fast it is staged, written and read, how long a step waits, and what it holds.

    python tools/bench/checkpoint.py [--quick] [--layers N] [--saves N] [--precision fp32|bf16] [--dir DIR]

One process, a random Qwen3, AdamW, on the GPU where there is one. No training steps are run beside the
saves, so that only saving is timed. The last line is one JSON object: medians, GB/s of the bytes staged, and
what this machine does at best: memory copied, hashed by as many threads as write, and written to the disk,
each alone. `blocked_s` is how long a step waits for a save in the background, `whole_save_s` until it is
committed. Bytes: `host_bytes` are kept from one save to the next; `host_peak_bytes` is what saves add to the
resident set, those included, and `gpu_peak_bytes` to what torch has allocated on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from blake3 import blake3
from transformers import Qwen3Config

from megatron_lopd.checkpoint.sharded import FILES, finish_state, load_state, stage_state
from megatron_lopd.checkpoint.staging import HostBuffer
from megatron_lopd.checkpoint.tensor_shards import ShardedModel
from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.training.checkpoints import Checkpoints, Progress
from megatron_lopd.training.saving import Saver

QUICK_LAYERS, QUICK_SAVES = 2, 3
SAMPLE_SECONDS = 0.005
FLOOR_BYTES = 1 << 28
GB = 1e9
Precision = Literal["fp32", "bf16"]


def main() -> None:
    """Save and load, and print what it took."""
    parser = argparse.ArgumentParser(description="what a checkpoint costs")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer saves, within 50 s")
    parser.add_argument("--layers", type=int, default=24, help="layers of 50 MB a checkpoint (24)")
    parser.add_argument("--saves", type=int, default=5, help="saves (5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    parser.add_argument("--dir", help="where to save; needs three checkpoints' room (default: temporary)")
    arguments = parser.parse_args()
    layers = QUICK_LAYERS if arguments.quick else arguments.layers
    saves = QUICK_SAVES if arguments.quick else arguments.saves
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        architecture = make_architecture(Path(name), layers)
        measured = measure(architecture, Path(name), saves, arguments.precision)
        print(json.dumps(measured | floors(Path(name))))


def make_architecture(directory: Path, layers: int) -> Architecture:
    """A Qwen3 of `layers` layers of 3.1 million parameters; 16 bytes each in a checkpoint."""
    Qwen3Config(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    ).save_pretrained(directory)
    return read_architecture(directory)


def measure(
    architecture: Architecture, directory: Path, saves: int, precision: Precision
) -> dict[str, float]:
    """Build the model in a world of this process alone, save it `saves` times, and load it once."""
    parallel = ParallelConfig()
    with model_parallel(parallel, seed=0) as ranks:
        model = build_model(architecture, parallel, precision, seed=0)
        optimization = build_optimization(model, OptimizerConfig(), precision, total_steps=1)
        return measure_saves(optimization, ranks, architecture, directory, saves)


def measure_saves(
    optimization: Optimization, ranks: Ranks, architecture: Architecture, directory: Path, saves: int
) -> dict[str, float]:
    """Medians over `saves` saves of the state, below `directory`; and a load of it, into where it was."""
    boxes = list(ShardedModel(optimization).own_boxes())
    staged_bytes = sum(box.elements.nbytes for box in boxes)
    before, gpu_before = resident(), _gpu_bytes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with peak_resident() as peak:
        host = HostBuffer(boxes)
        host_bytes = host.nbytes
        parts = _parts(optimization, ranks, directory / "parts", host, saves)
        del host  # or the saver's would stand beside it
        blocked, whole = _through_saver(optimization, ranks, architecture, directory, saves)
    gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "staged_bytes": staged_bytes,
        "staging_gb_s": round(staged_bytes / parts["stage"] / GB, 3),
        "writing_gb_s": round(staged_bytes / parts["write"] / GB, 3),
        "loading_gb_s": round(staged_bytes / parts["load"] / GB, 3),
        "blocked_s": round(blocked, 3),
        "whole_save_s": round(whole, 3),
        "host_bytes": host_bytes,
        "host_peak_bytes": peak[0] - before,
        "gpu_peak_bytes": gpu_peak - gpu_before,
    }


def _parts(
    optimization: Optimization, ranks: Ranks, directory: Path, host: HostBuffer, saves: int
) -> dict[str, float]:
    """Median seconds to stage, and to write and hash; seconds to load."""
    directory.mkdir()
    seconds: dict[str, list[float]] = {"stage": [], "write": []}
    for number in range(saves + 1):
        staged, staging = _timed(lambda: stage_state(directory, optimization, ranks, host))
        part, writing = _timed(staged.write)
        finish_state(directory, [part])
        if number:  # the first touches the memory
            seconds["stage"].append(staging)
            seconds["write"].append(writing)
    _, loading = _timed(lambda: load_state(directory, optimization, ranks, same_layout=True))
    return {name: statistics.median(each) for name, each in seconds.items()} | {"load": loading}


def _through_saver(
    optimization: Optimization, ranks: Ranks, architecture: Architecture, directory: Path, saves: int
) -> tuple[float, float]:
    """Median seconds that a step waits, and until the checkpoint is committed."""
    checkpoints = Checkpoints(directory / "checkpoints", "bench", architecture, "proved", keep=1)
    saver = Saver(checkpoints, optimization, ranks, compat.device())
    blocked, whole = [], []
    for number in range(saves + 1):
        began = time.perf_counter()
        saver.start(Progress(step=number + 1))
        blocked.append(time.perf_counter() - began)
        saver.finish()
        whole.append(time.perf_counter() - began)
    return statistics.median(blocked[1:]), statistics.median(whole[1:])


def floors(directory: Path) -> dict[str, float]:
    """What this machine does at best, in GB/s: copying, hashing in as many threads as write, the disk."""
    source, target = torch.ones(FLOOR_BYTES // 4), torch.ones(FLOOR_BYTES // 4)
    data = target.view(torch.uint8).numpy().data

    def hash_in_threads() -> None:
        with ThreadPoolExecutor(FILES) as pool:
            for _ in pool.map(lambda _: blake3(data).digest(), range(FILES)):
                pass

    def write() -> None:
        with (directory / "floor").open("wb", buffering=0) as stream:
            stream.write(data)
            os.fsync(stream.fileno())

    rates = {
        "copy": FLOOR_BYTES / _timed(lambda: target.copy_(source))[1],
        "hashing": FILES * FLOOR_BYTES / _timed(hash_in_threads)[1],
        "disk": FLOOR_BYTES / _timed(write)[1],
    }
    return {f"floor_{name}_gb_s": round(rate / GB, 2) for name, rate in rates.items()}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _gpu_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def resident() -> int:
    """This process's resident set, in bytes."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak_resident() -> Iterator[list[int]]:
    """The highest resident set seen in the block, in the list when it ends."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
