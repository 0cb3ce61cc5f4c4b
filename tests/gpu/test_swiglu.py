"""The SwiGLU kernels, compiled."""

from __future__ import annotations

import pytest
import torch

from megatron_lopd.ops.kernel_trial import trial
from tests.unit.test_mcore_swiglu import compare_with_fp64


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_fp64(dtype: torch.dtype) -> None:
    assert trial("cuda") == ""
    compare_with_fp64(dtype, "cuda")
