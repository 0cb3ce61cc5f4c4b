"""`python -m tests.kernel_ptx`: the Triton kernels compiled for an H100, which takes no GPU."""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Print each kernel's name after `KERNEL `, then its PTX."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_lopd.ops.log_prob_kernels import BLOCK, WARPS, _gradient, _statistics

    fp32, integer = "*fp32", "i32"
    arguments: list[tuple[Any, dict[str, str]]] = [
        (
            _statistics,
            {"logits": fp32, "stride": integer, "width": integer}
            | dict.fromkeys(("largest_out", "total_out", "weighted_out"), fp32),
        ),
        (
            _gradient,
            {"logits": fp32, "stride": integer, "width": integer, "largest": fp32, "factor": fp32}
            | {"gradient": "*bf16", "gradient_stride": integer},
        ),
    ]
    for kernel, signature in arguments:
        assert [parameter.name for parameter in kernel.params if parameter.is_constexpr] == ["BLOCK"]
        # What a launch knows of aligned rows: that pointers and numbers are multiples of 16.
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}
        source = ASTSource(kernel, signature | {"BLOCK": "constexpr"}, {"BLOCK": BLOCK}, aligned)
        compiled = build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
        print("KERNEL", kernel.__name__)
        print(compiled.asm["ptx"])


if __name__ == "__main__":
    main()
