"""Runs in a rank: some layouts of the matrix, and digests of what they end with."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import matrix
import torch
from steps import Trained

Layouts = dict[int, dict[str, tuple[str, ...]]]

# By the number of processes: layouts, and which of their models. Nothing is split.
LAYOUTS: Layouts = {1: {"one process": ("tied", "experts")}}
# A vocabulary, a pipeline, samples, a sequence and experts.
NIGHTLY: Layouts = {
    2: {
        "TP2 + SP": ("tied", "experts"),
        "PP2 + VPP2": ("tied",),
        "DP2, distributed optimizer": ("untied, with bias", "experts"),
        "CP2 x EP2": ("experts",),
    }
}


def record_layouts(root: Path, layouts: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """{layout: {"model, loss": losses, norms, digests of this rank's first gradients and last weights}}."""
    weights: list[str] = []
    train_steps = matrix.train_steps

    def train_and_keep(model: Any, *args: Any) -> Trained:
        trained = train_steps(model, *args)
        weights.append(_digest(weight for chunk in model for weight in chunk.parameters()))
        return trained

    matrix.train_steps = train_and_keep
    for name, models in layouts.items():
        matrix.LAYOUTS[name] = replace(matrix.LAYOUTS[name], models=models)
    record: dict[str, Any] = {name: {} for name in layouts}
    for (name, model, loss), trained in matrix.train_layouts(root, list(layouts)).items():
        gradients = [trained.gradients[key][3] for key in sorted(trained.gradients)]
        record[name][f"{model}, {loss}"] = {
            "losses": trained.losses,
            "norms": trained.norms,
            "clipped": trained.clipped,
            "gradients": _digest(gradients),
            "weights": weights.pop(0),
        }
    return record


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
