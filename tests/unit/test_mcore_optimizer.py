"""The optimizer with an Adam that keeps its state as TE and Apex do: a fake, without their kernels."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.mcore.norm import RMSNorm
from tests.training_zoo import make_root, train

pytestmark = pytest.mark.release

STEPS = 4


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW with one integer `step` a parameter group, absent before the first; moments beside parameters."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,  # megatron-core 0.19 says: not within a CUDA graph
    ) -> None:
        assert adam_w_mode
        assert not capturable
        # As FusedAdam's, with a setting that torch's AdamW has not.
        defaults = {
            "lr": lr,
            "bias_correction": True,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int), "its kernel takes `const int step`"
            for param in group["params"]:
                assert set(self.state[param]) == {"exp_avg", "exp_avg_sq"}
                self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), step, state = group["betas"], group["step"], self.state[param]
        state["exp_avg"].lerp_(param.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(state["exp_avg"] / (1 - beta1**step), scale, value=-group["lr"])


def test_an_adam_with_one_step_a_group_trains_saves_and_resumes(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    options = {"steps": STEPS, "checkpoint_every": 2}
    ((_, expected, _),) = run_ranks(1, _train, root, options | {"work": "torch"})
    ((_, steps, weights),) = run_ranks(1, _train_fused, root, options | {"work": "fused"})
    for step, reference in zip(steps, expected, strict=True):
        # The same formula in another order of operations, in fp32.
        assert step["loss"] == pytest.approx(reference["loss"], rel=1e-5)

    shutil.copytree(root / "fused", root / "resumed")
    shutil.rmtree(root / "resumed" / "checkpoints" / f"step_{STEPS:08d}")
    ((_, resumed, same_weights),) = run_ranks(1, _train_fused, root, options | {"work": "resumed"})
    assert resumed == steps
    assert same_weights == weights


@pytest.mark.slow
def test_a_run_goes_on_under_the_other_kind_of_layers_and_of_adam(tmp_path: Path) -> None:
    """Norms with a state beside their weights, and one integer step a group, against neither."""
    root = make_root(tmp_path)
    options = {"steps": STEPS, "checkpoint_every": 2}
    kinds = {"native": _train, "none": _train_with_none, "te": _train_te_like}
    results = {
        kind: run_ranks(1, function, root, options | {"work": kind})[0] for kind, function in kinds.items()
    }
    for before, after in (("native", "te"), ("none", "te"), ("te", "native"), ("te", "te")):
        work = f"{before}-then-{after}"
        shutil.copytree(root / before, root / work)
        shutil.rmtree(root / work / "checkpoints" / f"step_{STEPS:08d}")
        (result,) = run_ranks(1, kinds[after], root, options | {"work": work})
        for step, reference in zip(result[1], results["native"][1], strict=True):
            # The two Adams compute one formula in another order of operations, in fp32.
            assert step["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        if after == "te":
            # A norm's history counts its forward passes: its own kind's checkpoint brings it along.
            whole = results["te"][-1]
            assert result[-1] == (
                whole if before == "te" else {name: each // 2 for name, each in whole.items()}
            )


def _train(root: Path, options: dict[str, Any]) -> Any:
    return train(root, **options)


class NormWithHistory(RMSNorm):
    """A fake of Transformer Engine's norm: the native one, with a history in `_extra_state`, pickled."""

    history = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.history += 1
        return super().forward(hidden)

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(self.history)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert isinstance(state, torch.Tensor), "what it cannot read must not be handed over"
        self.history = pickle.loads(state.numpy().tobytes())


class NormWithNone(RMSNorm):
    """A fake of what Megatron-Core's native linear layers do: an `_extra_state` that is None."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def _train_te_like(root: Path, options: dict[str, Any]) -> Any:
    """As `train`, and what the norms' histories came to, by name."""
    norms = _replace_norms(NormWithHistory)
    result = _train_fused(root, options)
    return *result, {name: module.history for name, module in norms.items()}


def _train_with_none(root: Path, options: dict[str, Any]) -> Any:
    _replace_norms(NormWithNone)
    return train(root, **options)


def _replace_norms(kind: type[RMSNorm]) -> dict[str, Any]:
    """Have models built with norms of `kind`; those of the first chunk, once it is built."""
    from megatron_lopd.training import loop

    build, norms = loop.build_model, {}

    def build_with_kind(*arguments: Any) -> Any:
        chunks = build(*arguments)
        for name, module in chunks[0].named_modules():
            if type(module) is RMSNorm:
                module.__class__ = kind
                norms[name] = module
        return chunks

    loop.build_model = build_with_kind
    return norms


def _train_fused(root: Path, options: dict[str, Any]) -> Any:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    return train(root, **options)
