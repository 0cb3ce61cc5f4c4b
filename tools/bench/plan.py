"""What `lopd plan` predicts beside what is measured or was published.

    python tools/bench/plan.py

On this machine, for tiny random models: bytes of weights, gradients and optimizer, by the tensors of a real
Megatron-Core model with its optimizer; bytes a layer keeps for the backward pass, by autograd's own saved
tensors; and FLOPs, by torch's counter. Of published runs: GPU-hours, in sample for Lightning OPD, whose two
figures the one fitted constant is from, out of sample for standard OPD. The last line is one JSON object of
predicted over measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.estimate.hours import (
    PUBLISHED_HOURS,
    Published,
    TokenWork,
    published_hours,
    training_flops,
)
from megatron_lopd.estimate.memory import Training, layer_activations, training_memory
from megatron_lopd.families.architecture import Architecture, Experts
from megatron_lopd.families.memory_shapes import published
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.model import PackedGPTModel, build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization
from megatron_lopd.mcore.process_groups import model_parallel

PUBLISHED = published()

TOKENS = 256
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
# Qwen3-0.6B with a quarter of its widths and a seventh of its layers.
DENSE = replace(
    PUBLISHED["Qwen3-0.6B"],
    num_layers=4,
    hidden_size=256,
    ffn_size=768,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=997,
)
EXPERTS = replace(
    DENSE,
    family="qwen3_moe",
    tied=False,
    experts=Experts(count=8, top_k=2, ffn_size=96, normalize_top_k=True),
)


def main() -> None:
    """Print a line for each figure, and the JSON object."""
    results: dict[str, float] = {}
    for name, arch in (("dense", DENSE), ("experts", EXPERTS)):
        for precision in PRECISIONS:
            for part, (predicted, measured) in compare_memory(arch, precision).items():
                title = f"{name} {precision} {part}"
                results[title] = show(f"{title}, bytes", predicted, measured)
    results["activations"] = show("dense fp32 activations of a layer, bytes", *compare_activations(DENSE))
    results["dense FLOPs"] = show("dense FLOPs", *compare_flops(DENSE))
    for case in PUBLISHED_HOURS:
        hours = published_hours(case)
        by_stage = ", ".join(f"{stage} {value:.1f}" for stage, value in hours.items())
        name = f"{case.student} <- {case.teacher}"
        results[name] = show(f"{name}, GPU-hours, in sample ({by_stage})", sum(hours.values()), case.hours)
        online = f"{name}, online"
        results[online] = show(f"{online}, GPU-hours, out of sample", online_hours(case), case.online)
    print(json.dumps(results))


def show(name: str, predicted: float, measured: float) -> float:
    """Print the two; returns predicted over measured."""
    print(f"{name}: predicted {predicted:,.6g}, measured {measured:,.6g}, {predicted / measured:.4f}")
    return round(predicted / measured, 4)


def online_hours(case: Published) -> float:
    """GPU-hours of standard OPD, if half of the GPUs are the teacher's and half the student's, and each half
    idles while the other works. Nothing is fitted to it, and the halves are an assumption."""
    return 2 * sum(published_hours(case).values())


def compare_memory(arch: Architecture, precision: Literal["fp32", "bf16"]) -> dict[str, tuple[float, float]]:
    """(predicted, measured) bytes by part, on one process."""
    parallel, training = ParallelConfig(), Training(TOKENS, precision, fp8=False)
    predicted = training_memory(arch, parallel, 1, training)
    with model_parallel(parallel, seed=0):
        model = build_model(arch, parallel, precision)
        optimization = build_optimization(model, OptimizerConfig(), precision, total_steps=10)
        weights, gradients, optimizer = state_bytes(optimization)
    return {
        "weights": (predicted.weights, weights),
        "gradients": (predicted.gradients, gradients),
        "optimizer": (predicted.optimizer, optimizer),
    }


def compare_activations(arch: Architecture) -> tuple[float, float]:
    """(predicted, measured) bytes that a dense fp32 layer keeps of TOKENS tokens.

    Measured on native layers, the only ones a CPU runs, less `native_extra`; by the difference that two more
    layers make, which leaves embedding and final norm out.
    """
    kept = []
    for layers in (2, 4):
        with model_parallel(ParallelConfig(), seed=0):
            (model,) = build_model(replace(arch, num_layers=layers), ParallelConfig(), "fp32")
            kept.append(saved_bytes(model, TOKENS))
    predicted = layer_activations(arch, ParallelConfig(), Training(TOKENS, "fp32", fp8=False)) * TOKENS
    return predicted, (kept[1] - kept[0]) / 2 - native_extra(arch) * TOKENS


def native_extra(arch: Architecture) -> int:
    """Bytes a token and dense fp32 layer that native layers keep and Transformer Engine's fused ones do not.

    Of each norm the normed input before the weight, of q and k too, which are copied out of their common
    projection; q, k and v put in order for attention, and its output put back; the rotary cosines and
    sines of q and k; and SwiGLU's gate, before and after its activation, as tensors of their own. The list
    was read off what autograd kept: with it, the comparison checks the rest of the formula, and not
    Transformer Engine.
    """
    inner, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    rotary = 4 * arch.head_dim
    return 4 * (2 * arch.hidden_size + 3 * inner + 2 * groups + rotary + 2 * arch.ffn_size)


def state_bytes(optimization: Optimization) -> tuple[int, int, int]:
    """Bytes of this rank's weights, of their main gradients, and of its part of the optimizer.

    That is both moments, and the master weights where they are not the weights themselves. Padding between
    tensors is not counted.
    """
    chunks = optimization.chunks
    parameters = [weight for chunk in chunks for weight in chunk.parameters()]
    weights = sum(weight.numel() * weight.element_size() for weight in parameters)
    gradients = sum(weight.main_grad.numel() * weight.main_grad.element_size() for weight in parameters)
    own = {weight.untyped_storage().data_ptr() for weight in parameters}
    state = 0
    for part in optimization.optimizer.chained_optimizers:
        for master, moments in part.optimizer.state.items():
            copies = [moments["exp_avg"], moments["exp_avg_sq"]]
            if master.untyped_storage().data_ptr() not in own:
                copies.append(master)
            state += sum(copy.numel() * copy.element_size() for copy in copies)
    return weights, gradients, state


def saved_bytes(model: PackedGPTModel, tokens: int) -> int:
    """Bytes that autograd keeps of a forward pass over one document of `tokens`, weights left out.

    Storages are counted once, however many tensors see them.
    """
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage()
        )  # held: no address is used twice
        return tensor

    ids = torch.arange(tokens) % model.arch.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(ids, torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens)
        assert hidden.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)


def compare_flops(arch: Architecture) -> tuple[float, float]:
    """(predicted, counted) FLOPs of forward and backward over one document, every token a response."""
    with model_parallel(ParallelConfig(), seed=0):
        (model,) = build_model(arch, ParallelConfig(), "fp32")
        ids = (torch.arange(TOKENS) % arch.vocab_size).to(compat.device())
        # The only kernel of a CPU whose attention torch counts.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            places = torch.tensor([0, TOKENS], dtype=torch.int32)
            hidden = model(ids, torch.arange(TOKENS), places, TOKENS)
            (hidden.squeeze(1) @ model.output_weight().t()).sum().backward()
    # torch counts the half of the attention that causality hides, and our formula does not.
    hidden_half = 6 * arch.num_layers * arch.num_heads * arch.head_dim * TOKENS**2
    predicted = training_flops(arch, TokenWork(1, 0, TOKENS), ParallelConfig()) + hidden_half
    return predicted, float(counter.get_total_flops())


if __name__ == "__main__":
    main()
