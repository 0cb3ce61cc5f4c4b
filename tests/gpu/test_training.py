"""A step of the optimizer this machine chooses, and the state that a checkpoint brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, Work, training

from megatron_lopd.checkpoint.sharded import load_state
from megatron_lopd.config import Fp8Config, OptimizerConfig
from megatron_lopd.mcore.optimizer import guarded_step
from tests.training_zoo import save_now

on_engine = pytest.mark.needs("gpu", "engine")


@pytest.mark.parametrize("layers", ["native", pytest.param("engine", marks=on_engine)])
def test_the_machines_adam_takes_torchs_step(bench: Bench, layers: Any) -> None:
    """Master weights after three steps, against torch's AdamW on copies; where TE is, Adam is TE's."""
    with training(bench.checkpoints["qwen3"], layers, "bf16") as work:
        optimizer = work.optimization.optimizer
        parts = [part.optimizer for part in optimizer.chained_optimizers]
        groups = [group for part in parts for group in part.param_groups if group["params"]]
        twins = [_twin(group) for group in groups]
        for _ in range(3):
            work.one_pass()
            optimizer.prepare_grads()
            for group, (copies, adam) in zip(groups, twins, strict=True):
                for copy, param in zip(copies, group["params"], strict=True):
                    copy.grad = param.grad.clone()
                adam.step()
            optimizer.step_with_ready_grads()
        for group, (copies, _) in zip(groups, twins, strict=True):
            for param, copy in zip(group["params"], copies, strict=True):
                # fp32 in another order: some units in the last place of weights of 0.1 and steps of 1e-3.
                torch.testing.assert_close(param.data, copy, rtol=1e-5, atol=1e-7)


def _twin(group: dict[str, Any]) -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    """Copies of a group's weights, and torch's optimizer of them."""
    copies = [param.detach().clone() for param in group["params"]]
    config = OptimizerConfig()
    adam = torch.optim.AdamW(
        copies,
        lr=group["lr"],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=group["weight_decay"],
    )
    return copies, adam


KINDS = [
    pytest.param("native", None, id="native"),
    pytest.param("engine", None, id="engine", marks=on_engine),
    *(
        pytest.param("engine", Fp8Config(recipe), id=recipe, marks=pytest.mark.needs("gpu", "engine", recipe))
        for recipe in ("delayed", "tensorwise", "blockwise")
    ),
]


@pytest.mark.parametrize(("layers", "fp8"), KINDS)
def test_a_checkpoint_brings_back_weights_moments_and_fp8_scales(
    bench: Bench, tmp_path: Path, layers: Any, fp8: Fp8Config | None
) -> None:
    model_dir = bench.checkpoints["qwen3"]
    with training(model_dir, layers, "bf16", fp8) as work:
        for _ in range(3):
            work.one_pass()
            guarded_step(work.optimization)
        save_now(tmp_path, work.optimization, work.ranks)
        saved = _state(work)
        after = work.one_pass()
    assert any("amax" in name for name in saved) == (fp8 is not None and fp8.recipe == "delayed")
    with training(model_dir, layers, "bf16", fp8) as work:
        load_state(tmp_path, work.optimization, work.ranks, same_layout=True)
        loaded = _state(work)
        assert saved.keys() <= loaded.keys()
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name
        # The same weights and scales; a GPU's attention may sum gradients, not these, in any order.
        assert work.one_pass().nats_from(after) < 1e-6


@pytest.mark.needs("gpu", "engine", "delayed")
def test_the_first_step_of_delayed_scaling_has_scales_both_ways(bench: Bench) -> None:
    with training(bench.checkpoints["qwen3"], "engine", "bf16", Fp8Config("delayed")) as work:
        before = _state(work)
        work.find_scales()
        after = _state(work)
        assert not any(chunk_grad.any() for chunk_grad in _gradients(work)), "thrown away"
    scales = [name for name in after if name.endswith("_bwd.scale")]
    assert scales
    # The first of a layer's is its output gradient's; others stand for products that it does not have.
    assert all(after[name][0] != 1 for name in scales), [name for name in scales if after[name][0] == 1]
    for name in before.keys() & after.keys():
        assert "scaling" in name or torch.equal(before[name], after[name]), name


def _gradients(work: Work) -> list[torch.Tensor]:
    return [buffer.grad_data for buffer in work.optimization.chunks[0].buffers]


def _state(work: Work) -> dict[str, torch.Tensor]:
    """Copies of the weights, the optimizer's moments and, under delayed scaling, scales and amax history.

    Attention has scales too, and uses none, for it is not in FP8: Megatron-Core saves none of them.
    """
    state = {name: value.detach().cpu().clone() for name, value in _chunk(work).named_parameters()}
    for part in work.optimization.optimizer.chained_optimizers:
        for number, moments in enumerate(part.optimizer.state.values()):
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{number}.{name}"] = moments[name].cpu().clone()
    for name, module in _chunk(work).named_modules():
        if name.endswith("core_attention"):
            continue
        for direction in ("scaling_fwd", "scaling_bwd"):
            scaling = getattr(module, "fp8_meta", {}).get(direction)
            if hasattr(scaling, "amax_history"):  # it has them under delayed scaling alone
                state[f"{name}.{direction}.amax"] = scaling.amax_history.cpu().clone()
                state[f"{name}.{direction}.scale"] = scaling.scale.cpu().clone()
    return state


def _chunk(work: Work) -> torch.nn.Module:
    chunk: torch.nn.Module = work.optimization.chunks[0].module
    return chunk
