"""Model FLOPs of a training step, for utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of

# Dense bf16 peak of one GPU, FLOP/s, without sparsity: NVIDIA's data sheets, SXM where there are several.
PEAK_BF16 = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def step_flops(arch: Architecture, lengths: Iterable[int], response_tokens: int) -> float:
    """FLOPs of one forward and backward over documents of `lengths` tokens, padding left out.

    The count of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), which is 6 a parameter and
    token (2 forward, 4 backward) and 12 x heads x head_dim x length a layer and token for attention, with
    two differences: attention is causal within a document, so half of it; and the output layer is
    counted for the `response_tokens` that it is computed for, and not for prompts. Recomputed activations
    are not counted: they are no use to the model. A token counts `top_k` experts and the router.
    """
    tokens, squares = 0, 0
    for length in lengths:
        tokens += length
        squares += length * length
    linear = 6 * arch.num_layers * family_of(arch).layer_sizes(arch).products * tokens
    attention = 6 * arch.num_layers * arch.num_heads * arch.head_dim * squares
    output = 6 * arch.hidden_size * arch.vocab_size * response_tokens
    return float(linear + attention + output)


def peak_flops(gpu: str | None) -> float | None:
    """PEAK_BF16 of the GPU torch calls `gpu`; None for one that is not in the table, or none."""
    words = [] if gpu is None else gpu.replace("-", " ").split()
    return next((PEAK_BF16[word] for word in words if word in PEAK_BF16), None)
