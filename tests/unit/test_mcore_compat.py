"""Patches: each has its reason in the installed Megatron-Core, and says so when it has lost it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat, reliance, swiglu_patches
from megatron_lopd.mcore.reliance import Reliance

pytestmark = pytest.mark.release

PATCHES = (*compat.WITHOUT_CUDA, *compat.WITHOUT_TRANSFORMER_ENGINE, *swiglu_patches.PATCHES)
RELIANCES = (*compat.RELIANCES, *(patch.reliance for patch in PATCHES))


@pytest.mark.parametrize(
    "reliance", [reliance for reliance in RELIANCES if reliance.applies], ids=lambda reliance: reliance.ours
)
def test_what_lost_its_reason_is_refused(reliance: Reliance) -> None:
    reliance.check()
    for place in (f"{reliance.place}_renamed", "megatron.core.no_such_module:call"):
        with pytest.raises(ConfigError, match=r"(megatron-core|torch) \S+ does not fit .* is gone"):
            replace(reliance, place=place).check()
    with pytest.raises(ConfigError, match=r"no longer uses torch\.cuda\.other") as refusal:
        replace(reliance, mention="torch.cuda.other").check()
    assert "\n" not in str(refusal.value)
    assert reliance.ours in str(refusal.value)


def test_a_reason_that_came_with_a_release_holds_from_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(compat.RELIANCES[0], since="0.19.0")
    for installed, applies in {"0.18.9": False, "0.19.0rc1+image": True, "0.19.2": True, "1.0": True}.items():
        monkeypatch.setattr(reliance, "version", lambda package, installed=installed: installed)
        assert later.applies is applies, installed
        assert compat.RELIANCES[0].applies
    for module in (reliance, compat):
        monkeypatch.setattr(module, "version", lambda package: "0.15.3")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.15\.3 is too old: install one from 0\.16\.1"):
        compat.prepare.__wrapped__()


def test_a_request_for_cuda_is_met_on_the_cpu() -> None:
    with compat.CpuForCuda():
        made = (
            torch.empty(2, device="cuda"),
            torch.zeros(2, device=torch.device("cuda", 1)),
            torch.tensor([1.0], device="cuda:0", pin_memory=True),
            torch.ones(1).cuda(),
            torch.ones(1).to(device="cuda"),
        )
        assert {tensor.device.type for tensor in made} == {"cpu"}
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64
        assert torch.arange(3.0).tolist() == [0.0, 1.0, 2.0]
