"""Whether the Triton kernels can be used here: found by trying them, once, and agreed on by all ranks."""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lopd.ops.softmax import LOG_ZERO, WIDTH_MULTIPLE, Sums
from megatron_lopd.runtime.display import say

NO_GPU = "there is no GPU"
_agreed: dict[str, str] = {}  # by type of device: why not, "" if they can


def usable(device: torch.device) -> bool:
    """Whether the kernels run on `device`: as the ranks agreed, or where they did not, as `trial` says."""
    return not (_agreed[device.type] if device.type in _agreed else trial(device.type))


def agree(device: torch.device) -> None:
    """Use the kernels only if every rank can, and say on rank 0, once, why not; every rank calls.

    Called before the model is built: ranks that went different ways would wait for each other's collectives
    for ever.
    """
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, trial(device.type))
    why = next(filter(None, reasons), "")
    if dist.get_rank() == 0 and why not in ("", NO_GPU, _agreed.get(device.type)):
        say(
            "lopd: log-probs and SwiGLU are made by torch's own operations, which takes longer, as Triton's "
            f"kernels cannot be used: {why}",
            error=True,
        )
    _agreed[device.type] = why


@functools.cache
def trial(device_type: str) -> str:
    """Why the kernels cannot be used on this process's device, in one line; "" when they can.

    Compiles them and compares a few numbers with torch's. Call it with the GPU chosen
    (`torch.cuda.set_device`): it makes that one's CUDA context. On a CPU they run in Triton's interpreter
    alone.
    """
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return NO_GPU
    try:
        device = torch.device(device_type)
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller does
            agree = _log_probs_agree(device) and _swiglu_agrees(device)
    except Exception as error:  # noqa: BLE001 - a compiler, a driver and a cache folder fail in any way
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no more is said'}"[:300]
    return "" if agree else "compiled, they give wrong numbers"


def _log_probs_agree(device: torch.device) -> bool:
    """Of rows of more than one block, whose gradient is narrower than the logits."""
    from megatron_lopd.ops.log_prob_kernels import BLOCK, gradient_in_place, statistics

    row = torch.arange(2 * BLOCK + WIDTH_MULTIPLE, device=device, dtype=torch.float32)
    logits = torch.stack([torch.sin(row * scale) * 8 for scale in (0.1, 0.7, 1.3)])
    logits[1, 5] = LOG_ZERO
    expected = Sums.of(logits.clone())
    found = statistics(logits)
    scaled = torch.exp(logits - expected.largest[:, None]) * expected.total[:, None]
    gradient = gradient_in_place(logits, found.largest, expected.total, torch.bfloat16)
    # fp32 sums of 8,208 terms of one sign each; then bf16, which keeps 8 bits, and which Triton's interpreter
    # cuts off instead of rounding.
    sums_agree = all(
        torch.allclose(a, b, rtol=1e-4, atol=0)
        for a, b in zip(vars(found).values(), vars(expected).values(), strict=True)
    )
    return sums_agree and torch.allclose(gradient.float(), scaled, rtol=2**-7, atol=0)


def _swiglu_agrees(device: torch.device) -> bool:
    """Of rows of more than one pass."""
    from megatron_lopd.ops.swiglu import COLUMNS, swiglu, swiglu_back

    whole = torch.sin(torch.arange(3 * 2 * (COLUMNS + 8), device=device, dtype=torch.float32)).view(3, -1) * 4
    whole.requires_grad_()
    gate, up = whole.chunk(2, dim=1)
    expected = F.silu(gate) * up
    weights = torch.cos(expected.detach())
    (gradient,) = torch.autograd.grad(expected, whole, weights)
    # fp32: some roundings of values up to 16, which at a zero of the sine leave no digit.
    return torch.allclose(swiglu(whole.detach()), expected, rtol=1e-4, atol=1e-4) and torch.allclose(
        swiglu_back(weights, whole.detach()), gradient, rtol=1e-4, atol=1e-4
    )
