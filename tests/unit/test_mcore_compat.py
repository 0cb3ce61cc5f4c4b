"""Patches: each has its reason in the installed Megatron-Core, and says so when it has lost it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat

PATCHES = (*compat.WITHOUT_CUDA, *compat.WITHOUT_TRANSFORMER_ENGINE)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_patch_that_lost_its_reason_is_refused(patch: compat.Patch) -> None:
    patch.check()
    for needed_by in (f"{patch.needed_by}_renamed", "megatron.core.no_such_module:call"):
        with pytest.raises(ConfigError, match=r"megatron-core [\d.]+ does not fit .* is gone"):
            replace(patch, needed_by=needed_by).check()
    with pytest.raises(ConfigError, match=r"no longer uses torch\.cuda\.other") as refusal:
        replace(patch, mention="torch.cuda.other").check()
    assert "\n" not in str(refusal.value)
    assert patch.target in str(refusal.value)


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
