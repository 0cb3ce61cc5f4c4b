"""How long a checkpoint holds a step up: written in the background against waited for, in alternation.

    python tools/bench/checkpoint.py [--quick] [--layers N] [--saves N] [--dir DIR]

One process, a random fp32 Qwen3, AdamW. Saves alternate, and no training steps are run beside them, so
that only saving is timed. The last line is one JSON object: medians in seconds, sizes in bytes.
`blocked_ratio` is blocked when waited for over blocked in the background. Host memory, over the checkpoint's
bytes: `held_copies` while a thread writes, `peak_copies` at the highest, Megatron-Core's gathering included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from transformers import Qwen3Config

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.architecture import Architecture, read_architecture
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import build_optimization
from megatron_lopd.mcore.parallel import model_parallel
from megatron_lopd.training.checkpoints import Checkpoints, Progress
from megatron_lopd.training.saving import Saver

QUICK_LAYERS, QUICK_SAVES = 2, 3
SAMPLE_SECONDS = 0.005


def main() -> None:
    """Save by turns in both ways, and print what each took."""
    parser = argparse.ArgumentParser(description="how long a checkpoint holds up training")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer saves, within 50 s")
    parser.add_argument("--layers", type=int, default=24, help="layers of 50 MB a checkpoint (24)")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind (5)")
    parser.add_argument("--dir", help="where to save; needs three checkpoints' room (default: temporary)")
    arguments = parser.parse_args()
    layers = QUICK_LAYERS if arguments.quick else arguments.layers
    saves = QUICK_SAVES if arguments.quick else arguments.saves
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        print(json.dumps(measure(make_architecture(Path(name), layers), Path(name), saves)))


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


def measure(architecture: Architecture, directory: Path, saves: int) -> dict[str, float]:
    """Medians over `saves` of each kind."""
    parallel = ParallelConfig()
    blocked: dict[str, list[float]] = {"waited": [], "background": []}
    whole: list[float] = []
    held: list[int] = []
    with model_parallel(parallel, seed=0) as ranks:
        model = build_model(architecture, parallel, "fp32", seed=0)
        optimization = build_optimization(model, OptimizerConfig(), "fp32", total_steps=1)
        checkpoints = Checkpoints(directory / "checkpoints", "bench", architecture, "proved", keep=1)
        saver = Saver(checkpoints, ranks, compat.device())
        saver.start(optimization, Progress(step=1))  # what is imported on first use
        saver.finish()
        before = resident()
        with peak_resident() as peak:
            for number in range(2 * saves):
                kind = list(blocked)[number % 2]
                began = time.perf_counter()
                saver.start(optimization, Progress(step=number + 2))
                held.append(resident() - before)
                if kind == "waited":
                    saver.finish()
                blocked[kind].append(time.perf_counter() - began)
                saver.finish()
                whole.append(time.perf_counter() - began)
    files = directory.glob("checkpoints/step_*/*")
    size = sum(path.stat().st_size for path in files)
    medians = {kind: statistics.median(seconds) for kind, seconds in blocked.items()}
    return {
        "checkpoint_bytes": size,
        "blocked_waited_s": round(medians["waited"], 3),
        "blocked_background_s": round(medians["background"], 3),
        "blocked_ratio": round(medians["waited"] / medians["background"], 2),
        "whole_save_s": round(statistics.median(whole), 3),
        "held_copies": round(statistics.median(held) / size, 2),
        "peak_copies": round((peak[0] - before) / size, 2),
    }


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
