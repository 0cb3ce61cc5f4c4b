"""A checkpoint takes next to nothing of the GPU's memory."""

from __future__ import annotations

from pathlib import Path

from tools.bench.checkpoint import make_architecture, measure


def test_saving_and_loading_take_no_copy_of_the_state_on_the_gpu(tmp_path: Path) -> None:
    measured = measure(make_architecture(tmp_path, layers=24), tmp_path, saves=1, precision="bf16")
    # A box on its way to where it is not contiguous has a copy: the largest is the embedding's, of 33 MB.
    assert measured["gpu_peak_bytes"] < measured["staged_bytes"] / 8
