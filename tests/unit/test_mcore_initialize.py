"""Initial weights are drawn where they are kept, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lopd.mcore import model as model_module
from megatron_lopd.training import job
from tests.training_zoo import make_root, train


def test_no_weight_is_drawn_that_a_checkpoint_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To draw a matrix takes seconds a billion weights, in each rank the whole of what it keeps a part of."""
    drawn: list[int] = []
    draw = model_module.draw_weights
    monkeypatch.setattr(
        model_module, "draw_weights", lambda chunk, arch, seed: (drawn.append(seed), draw(chunk, arch, seed))
    )
    # What is not drawn is whatever the memory held: NaN, so that a weight left unread shows.
    monkeypatch.setattr(model_module, "_leave", lambda weight: weight.data.fill_(torch.nan))
    root = make_root(tmp_path, samples=16)
    _, steps, _ = train(root, steps=2)  # from the model's own weights
    assert drawn == []
    assert torch.isfinite(torch.tensor([step["loss"] for step in steps])).all()
    train(root, steps=2)  # from its last checkpoint
    assert drawn == []

    setup: Any = job.ModelSetup
    monkeypatch.setattr(job, "ModelSetup", lambda *given, **more: setup(*given, **more, init="random"))
    train(root, "random", steps=2)
    assert drawn == [0]  # the job's seed
    train(root, "random", steps=2)
    assert drawn == [0]
