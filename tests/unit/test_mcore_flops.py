from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_lopd.families.architecture import Experts, read_architecture
from megatron_lopd.families.flops import peak_flops, step_flops
from tests.model_zoo import make_config, make_model_dir


def test_the_formula_is_what_torch_counts(tmp_path: Path) -> None:
    """One document, whole, against torch's own counter on the transformers model."""
    make_model_dir(tmp_path, "qwen3")
    arch = read_architecture(tmp_path)
    model = AutoModelForCausalLM.from_config(make_config("qwen3"), attn_implementation="eager")
    tokens = torch.arange(1, 65)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    inner = arch.num_heads * arch.head_dim
    causal_half = 6 * arch.num_layers * inner * 64 * 64  # eager attention computes what causality hides
    expected = step_flops(arch, [64], 64) + causal_half
    # The rotary angles are a product too, of no parameters: less than a thousandth.
    assert abs(counter.get_total_flops() / expected - 1) < 2e-3


def test_documents_experts_and_peaks(tmp_path: Path) -> None:
    make_model_dir(tmp_path, "qwen3")
    arch = read_architecture(tmp_path)
    whole, halves = step_flops(arch, [64], 10), step_flops(arch, [32, 32], 10)
    inner = arch.num_heads * arch.head_dim
    assert whole - halves == 6 * arch.num_layers * inner * (64**2 - 2 * 32**2)
    of_experts = replace(arch, experts=Experts(count=8, top_k=2, ffn_size=24, normalize_top_k=True))
    router = 6 * arch.num_layers * arch.hidden_size * 8 * 64
    assert step_flops(of_experts, [64], 10) - whole == router  # two of 24 are as one of 48
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 5090") is peak_flops(None) is None
