"""A step of the optimizer this machine chooses, and the state that a checkpoint brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, Work, training

from megatron_lopd.config import Fp8Config
from megatron_lopd.mcore.checkpoint import load_state, save_state
from megatron_lopd.mcore.optimizer import guarded_step

on_engine = pytest.mark.needs("gpu", "engine")


@pytest.mark.parametrize("layers", ["native", pytest.param("engine", marks=on_engine)])
def test_the_machines_adam_takes_torchs_step(bench: Bench, layers: str) -> None:
    """Master weights after a step, against torch's AdamW on copies of them (where TE is, its fused Adam)."""
    with training(bench.checkpoints["qwen3"], layers, "bf16") as work:
        for _ in range(3):
            work.one_pass()
            optimizer = work.optimization.optimizer
            optimizer.prepare_grads()
            groups = [group for part in optimizer.chained_optimizers for group in part.optimizer.param_groups]
            expected = [_torch_step(group, work) for group in groups]
            optimizer.step_with_ready_grads()
            for group, copies in zip(groups, expected, strict=True):
                for param, copy in zip(group["params"], copies, strict=True):
                    # fp32 in another order: a few units in the last place of weights of 0.1, and of the step.
                    torch.testing.assert_close(param.data, copy, rtol=1e-5, atol=1e-7)


_known: dict[int, tuple[torch.optim.AdamW, list[torch.Tensor]]] = {}


def _torch_step(group: dict[str, Any], work: Work) -> list[torch.Tensor]:
    """The group's weights after torch's AdamW, with moments of its own from one call to the next."""
    if id(group) not in _known:
        copies = [param.detach().clone() for param in group["params"]]
        adam = torch.optim.AdamW(copies, betas=(0.9, 0.98), eps=1e-8) if copies else None
        _known[id(group)] = (adam, copies)  # type: ignore[assignment]
    adam, copies = _known[id(group)]
    if adam is not None:
        adam.param_groups[0] |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for copy, param in zip(copies, group["params"], strict=True):
            copy.grad = param.grad.clone()
        adam.step()
    return copies


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
        save_state(tmp_path, work.optimization, work.ranks)
        saved = _state(work)
        after = work.one_pass()
    assert any("amax" in name for name in saved) == (fp8 is not None and fp8.recipe == "delayed")
    with training(model_dir, layers, "bf16", fp8) as work:
        load_state(tmp_path, work.optimization, work.ranks, same_layout=True)
        loaded = _state(work)
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name
        # The same weights and scales; a GPU's attention may sum gradients, not these, in any order.
        assert work.one_pass().nats_from(after) < 1e-6


def _state(work: Work) -> dict[str, torch.Tensor]:
    """Copies of the weights, the optimizer's moments and, under delayed scaling, scales and amax history."""
    state = {name: value.detach().cpu().clone() for name, value in _chunk(work).named_parameters()}
    for part in work.optimization.optimizer.chained_optimizers:
        for number, moments in enumerate(part.optimizer.state.values()):
            for name in ("exp_avg", "exp_avg_sq"):
                state[f"{number}.{name}"] = moments[name].cpu().clone()
    for name, module in _chunk(work).named_modules():
        for direction in ("scaling_fwd", "scaling_bwd"):
            scaling = getattr(module, "fp8_meta", {}).get(direction)
            if hasattr(scaling, "amax_history"):
                state[f"{name}.{direction}.amax"] = scaling.amax_history.cpu().clone()
                state[f"{name}.{direction}.scale"] = scaling.scale.cpu().clone()
    return state


def _chunk(work: Work) -> torch.nn.Module:
    chunk: torch.nn.Module = work.optimization.chunks[0].module
    return chunk
