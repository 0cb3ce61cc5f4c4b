"""SwiGLU and its gradient by themselves: our kernels, Megatron-Core's compiled ones, Transformer Engine's.

    python tools/bench/swiglu.py [--quick] [--rows N] [--ffn N] [--rounds N]

bf16 rows of a feed-forward's two halves, the size of Qwen3-8B's at a micro-batch of 16,384 tokens. The paths
take turns, each timed by CUDA events; figures are medians. The floor is the bytes that have to move, 3 of
bf16 an output forward and 5 backward, over the bandwidth of a large copy measured beside. The last line is
one JSON object: ms, and the floor's share of them. Without a GPU only --quick runs: torch's operations, and
our kernels where TRITON_INTERPRET=1 is set, at a size that says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lopd.mcore import compat
from megatron_lopd.ops.kernel_trial import usable

FORWARD_MOVES, BACKWARD_MOVES = 3, 5  # elements a column of the output: g, u -> y and dy, g, u -> dg, du
COPIED = 2**28  # elements of the copy that gives the bandwidth


@dataclass(frozen=True)
class Path:
    """One way: x [S, 2 f] -> y [S, f], and (dy, x) -> dx."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def paths() -> dict[str, Path]:
    """Those that this machine has."""
    found = {"torch": Path(_by_torch, _gradient_by_torch)}
    if usable(compat.device()):
        ours = importlib.import_module("megatron_lopd.ops.swiglu")
        found["ours"] = Path(ours.swiglu, ours.swiglu_back)
        if torch.cuda.is_available():
            theirs = _unpatched()
            found["megatron-core"] = Path(theirs.swiglu, theirs.swiglu_back)
    if compat.has_transformer_engine():
        te = importlib.import_module("transformer_engine_torch")
        found["transformer engine"] = Path(
            lambda x: te.swiglu(x, None),
            lambda dy, x: te.dswiglu(dy, x, None),
        )
    return found


def measure(rows: int, f: int, rounds: int = 20) -> dict[str, dict[str, float]]:
    """{path: {forward_ms, backward_ms, of_floor}} at [rows, 2 f], medians of `rounds`, in turn."""
    device = compat.device()
    x = torch.randn(rows, 2 * f, device=device, dtype=torch.bfloat16)
    dy = torch.randn(rows, f, device=device, dtype=torch.bfloat16)
    found = paths()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for path in found.values():
        path.backward(dy, x)  # compiled untimed, as is the next
        path.forward(x)
    for _ in range(rounds):
        for name, path in found.items():
            times[name][0].append(milliseconds(lambda path=path: path.forward(x)))  # type: ignore[misc]
            times[name][1].append(milliseconds(lambda path=path: path.backward(dy, x)))  # type: ignore[misc]
    moved = (FORWARD_MOVES + BACKWARD_MOVES) * rows * f * x.element_size()
    floor = moved / bandwidth(min(COPIED, 8 * x.numel())) * 1e3
    figures = {}
    for name, (forward, backward) in times.items():
        values = statistics.median(forward), statistics.median(backward)
        figures[name] = {
            "forward_ms": round(values[0], 3),
            "backward_ms": round(values[1], 3),
            "of_floor": round(floor / sum(values), 3),
        }
    return figures


def bandwidth(elements: int) -> float:
    """Bytes a second of a copy of so many bf16, read and written: the median of ten."""
    source = torch.zeros(elements, device=compat.device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    target.copy_(source)
    return (
        2
        * source.nbytes
        / statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(10))
        * 1e3
    )


def milliseconds(work: Callable[[], object]) -> float:
    """Of the GPU, or by the clock without one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _by_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _gradient_by_torch(dy: Tensor, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(_by_torch(x), x, dy)
    return dx


def _unpatched() -> ModuleType:
    """Megatron-Core's own functions, though `compat.prepare` may have put others in their places."""
    spec = find_spec("megatron.core.fusions.fused_bias_swiglu")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Measure, print a line for each path, and the JSON object."""
    parser = argparse.ArgumentParser(description="SwiGLU: ours, Megatron-Core's and Transformer Engine's")
    parser.add_argument("--quick", action="store_true", help="a size for a CPU")
    parser.add_argument("--rows", type=int, help="tokens (16384; 64 with --quick)")
    parser.add_argument("--ffn", type=int, help="columns of a half (12288; 96 with --quick)")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each path")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("there is no GPU here: use --quick")
    rows = arguments.rows or (64 if arguments.quick else 16384)
    f = arguments.ffn or (96 if arguments.quick else 12288)
    figures = measure(rows, f, arguments.rounds)
    for name, values in figures.items():
        print(f"{name:20}" + "".join(f"{key} {value:<12}" for key, value in values.items()), flush=True)
    print(json.dumps({"rows": rows, "ffn": f, "device": str(compat.device()), "paths": figures}))


if __name__ == "__main__":
    main()
