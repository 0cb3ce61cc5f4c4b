"""Fakes: what `capabilities()` would say on machines that are not here, from the code it asks there.

And Transformer Engine as far as Megatron-Core's configuration looks at it: whether its kernels are there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import FP8_RECIPES, Capabilities

CPU = Capabilities(
    gpu=None,
    compute_capability=None,
    transformer_engine=None,
    lacking="there is no NVIDIA GPU here",
    fp8=dict.fromkeys(FP8_RECIPES, "there is no NVIDIA GPU here"),
    adam="torch",
    gradient_accumulation_fusion=False,
    activation_fusion=False,
    rope_fusion=False,
    variable_length_attention=False,
)
GPU_ALONE = replace(
    CPU,
    gpu="NVIDIA H100",
    compute_capability=(9, 0),
    lacking="Transformer Engine is not installed",
    fp8=dict.fromkeys(FP8_RECIPES, "Transformer Engine is not installed"),
    activation_fusion=True,
    variable_length_attention=True,
)
H100 = replace(
    GPU_ALONE,
    transformer_engine="2.11.0",
    lacking="",
    fp8={
        "delayed": "",
        "tensorwise": "",
        "blockwise": "",
        "mxfp8": "Device compute capability 10.0 or higher required for MXFP8 execution",
    },
    adam="Transformer Engine",
    gradient_accumulation_fusion=True,
    rope_fusion=True,
)
BLACKWELL = replace(H100, gpu="NVIDIA B200", compute_capability=(10, 0), fp8=dict.fromkeys(FP8_RECIPES, ""))


def fake_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Megatron-Core take options that need Transformer Engine. Nothing can be built with them."""
    compat.prepare()
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(compat, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print)
    sort = "sort_chunks_by_index"
    for name in ("permute", "permute_with_probs", "unpermute", sort, f"{sort}_with_probs"):
        monkeypatch.setattr(moe_utils, f"fused_{name}", print, raising=False)
