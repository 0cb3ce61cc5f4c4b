"""Delayed scaling's first scales. Nothing here is in FP8 but a fake of some products, in torch's e5m2."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.training.fp8_scales import PASSES
from tests.training_zoo import make_root, train

pytestmark = pytest.mark.slow

E5M2_MAX = 57344.0


class DelayedLinear(torch.autograd.Function):
    """A fake of Transformer Engine's: the gradient of its output goes through e5m2, at the scale of before.

    What it sees decides the next scale, unless it is 0 (its quantization.py, `_default_sf_compute`).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.scale = scale
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,), scale = ctx.saved_tensors, ctx.scale
        quantized = (gradients[0] * scale).to(torch.float8_e5m2).to(torch.float32) / scale
        largest = gradients[0].abs().max()
        if largest > 0:
            scale.copy_(E5M2_MAX / largest)
        return quantized @ weight, None, None


def test_every_product_has_found_its_scale_after_the_passes() -> None:
    """Two products between additions to the residual stream, as in attention and in the feed-forward."""
    generator = torch.Generator().manual_seed(0)
    layers = [[torch.randn(16, 16, generator=generator) / 4 for _ in range(2)] for _ in range(3)]
    scales = [[torch.ones(()) for _ in layer] for layer in layers]
    x = torch.randn(8, 16, generator=generator, requires_grad=True)

    def unfound() -> int:
        hidden = x
        for layer, own in zip(layers, scales, strict=True):
            inner = hidden
            for weight, scale in zip(layer, own, strict=True):
                inner = DelayedLinear.apply(inner, weight, scale)
            hidden = hidden + inner
        (hidden.sum() * 1e-7).backward()  # a mean over many tokens, below e5m2's least 1.5e-5
        return sum(float(scale) == 1 for own in scales for scale in own)

    assert [unfound() for _ in range(PASSES)] == [3, 0]


LAYOUTS = {
    "one process": ParallelConfig(),
    "data parallel": ParallelConfig(processes=2),
    "interleaved pipeline": ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_looking_for_scales_leaves_no_other_trace(tmp_path: Path, name: str) -> None:
    parallel = LAYOUTS[name]
    root = make_root(tmp_path, layers=4)
    looked, plain = (
        run_ranks(parallel.processes, _train_as_if_delayed, root, work, parallel) for work in WORK
    )
    few = 2 if parallel.virtual_pipeline > 1 else 1
    for (calls, weights), (steps, reference) in zip(looked, plain, strict=True):
        # Forward and backward over a micro-batch, or as few as the pipeline takes, before all else.
        assert calls == [(few, True)] * PASSES + steps
        assert weights == reference
    shutil.rmtree(root / "looked" / "checkpoints" / "step_00000002")  # as if cut off in the second step
    for calls, weights in run_ranks(parallel.processes, _train_as_if_delayed, root, "looked", parallel):
        assert len(calls) == 1, "a checkpoint brings its own scales"
        assert weights == plain[0][1]


WORK = ("looked", "plain")


def _train_as_if_delayed(root: Path, work: str, parallel: ParallelConfig) -> Any:
    """(micro-batches of each pass, and whether with gradients; weights). "plain" looks for no scales."""
    from megatron_lopd.mcore import model
    from megatron_lopd.training import fp8_scales, loop, trainer

    for module in (model, loop):
        module.check_precision = lambda *unused: None  # type: ignore[attr-defined]
    model.fp8_options = lambda fp8: {}
    if work == "plain":
        trainer.find_scales = lambda *unused: None
    calls: list[tuple[int, bool]] = []
    run = loop.run_micro_batches

    def watched(chunks: Any, objective: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        calls.append((len(batches), torch.is_grad_enabled() and not options))
        return run(chunks, objective, batches, *rest, **options)

    loop.run_micro_batches = fp8_scales.run_micro_batches = watched
    fp8 = Fp8Config("delayed")
    return calls, train(root, work, parallel=parallel, fp8=fp8, steps=2, checkpoint_every=1)[2]
