"""SwiGLU's kernels: to fp64 in Triton's interpreter, in Megatron-Core's layers, and compiled for a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model_zoo import Family, make_config

# (rows, f): none, one, odd, and more columns than a pass has, by one and by a whole pass and more.
SHAPES = ((0, 8), (1, 1), (3, 5), (2, 2048), (3, 2049), (2, 4104))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., object]]:
    """Runs a function in one process where Triton interprets: it decides that as kernels are decorated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # started, with this environment
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_fp64(
    interpreter: Callable[..., object], dtype: torch.dtype
) -> None:
    interpreter(compare_with_fp64, dtype)


def compare_with_fp64(dtype: torch.dtype, device: str = "cpu") -> None:
    """Also of tests/gpu."""
    from megatron_lopd.ops import swiglu

    # bf16 one, to 8 bits, which Triton's interpreter makes by cutting off.
    few = 2e-6 if device == "cpu" else 1e-5
    error = few if dtype == torch.float32 else 2**-7
    torch.manual_seed(0)
    for rows, f in SHAPES:
        x, dy = (3 * torch.randn(rows, 2 * f)).to(device, dtype), torch.randn(rows, f).to(device, dtype)
        x[:, :1] = 100.0  # a sigmoid of 1 and, below, of 0: no overflow of its exponential
        x[1:2, :1] = -100.0
        weights = torch.rand(rows, 1).to(device)
        exact, exact_weights = x.double().requires_grad_(), weights.double().requires_grad_()
        gate, up = exact.chunk(2, -1)
        y = F.silu(gate) * up
        (dx,) = torch.autograd.grad(y, exact, dy.double(), retain_graph=True)
        scaled = y * exact_weights
        expected = (y, dx, scaled, *torch.autograd.grad(scaled, (exact, exact_weights), dy.double()))
        got = (
            swiglu.swiglu(x),
            swiglu.swiglu_back(dy, x),
            swiglu.weighted_swiglu(x, weights),
            *swiglu.weighted_swiglu_back(dy, x, weights),
        )
        for number, (ours, truth) in enumerate(zip(got, expected, strict=True)):
            assert ours.dtype == (torch.float32 if number == 4 else dtype)
            scale = truth.abs().amax().item() if number == 4 and truth.numel() else 1.0  # a sum over f
            torch.testing.assert_close(
                ours.double(), truth, rtol=error, atol=few * scale, msg=f"{rows} x {f}: result {number}"
            )


def test_rows_and_gradients_that_are_strided_are_read_as_they_stand(
    interpreter: Callable[..., object],
) -> None:
    interpreter(compare_strided)


def compare_strided() -> None:
    from megatron_lopd.ops import swiglu

    wide, column = torch.randn(4, 40), torch.randn(4, 3)
    x, dy, weights = wide[:, 8:26], wide[:, 20:29], column[:, 1:2]
    assert not x.is_contiguous()
    for strided, whole in zip(
        (swiglu.weighted_swiglu(x, weights), *swiglu.weighted_swiglu_back(dy, x, weights)),
        (
            swiglu.weighted_swiglu(x.clone(), weights.clone()),
            *swiglu.weighted_swiglu_back(dy.clone(), x.clone(), weights.clone()),
        ),
        strict=True,
    ):
        assert torch.equal(strided, whole)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_megatron_cores_layers_compute_the_same_with_them(
    interpreter: Callable[..., object], tmp_path: Path, family: Family
) -> None:
    make_config(family).save_pretrained(tmp_path)
    interpreter(compare_in_layers, tmp_path)


def compare_in_layers(model_dir: Path) -> None:
    """Outputs and every gradient: Megatron-Core's unfused operations, the kernels, and these recomputed."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.ops import swiglu

    alone = ParallelConfig()
    with model_parallel(alone, seed=0):
        arch = read_architecture(model_dir)
        (model,) = build_model(arch, alone, "fp32")
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]

        def run() -> list[Tensor]:
            documents = torch.tensor([0, 5, 12], dtype=torch.int32)
            hidden = model(torch.arange(12) % 7, torch.arange(12), documents, 7)
            model.zero_grad()
            (hidden * torch.arange(hidden.numel()).view_as(hidden).cos()).sum().backward()
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            assert len(gradients) > 4 * len(layers)
            return [hidden.detach(), *gradients]

        expected = run()
        from megatron_lopd.mcore import swiglu_patches

        for patch in swiglu_patches.PATCHES:
            patch.apply()
        calls: list[int] = []
        count = swiglu._forward.run
        swiglu._forward.run = lambda *args, **kwargs: (calls.append(1), count(*args, **kwargs))
        for module in model.modules():
            if hasattr(module, "config"):  # experts have a copy of it
                module.config.bias_activation_fusion = True
        for recompute in (False,) if arch.experts else (False, True):
            for layer in layers:
                layer.recompute_mlp = recompute
            calls.clear()
            got = run()
            assert len(calls) >= len(layers) * (2 if recompute else 1)
            for ours, theirs in zip(got, expected, strict=True):
                # fp32, and the sums through the layers in another order
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().amax().item())


def test_the_experts_activation_can_be_recomputed(interpreter: Callable[..., object]) -> None:
    interpreter(compare_recomputed_experts)


def compare_recomputed_experts() -> None:
    """By Megatron-Core's own checkpoint; the one by which TEGroupedMLP does it wants Transformer Engine."""
    from megatron.core import tensor_parallel
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.mcore import swiglu_patches
    from megatron_lopd.mcore.process_groups import model_parallel

    for patch in swiglu_patches.PATCHES:
        patch.apply()
    with model_parallel(ParallelConfig(), seed=0):
        results = []
        for recompute in (False, True):
            torch.manual_seed(0)
            x, weights = torch.randn(6, 18).requires_grad_(), torch.rand(6, 1).requires_grad_()
            if recompute:
                y = tensor_parallel.checkpoint(weighted_bias_swiglu_impl, False, x, None, weights)
            else:
                y = weighted_bias_swiglu_impl(x, None, weights)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, weights.grad))
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("f", [12288, 768])
def test_they_compile_for_an_h100_and_move_sixteen_bytes_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, f: int, weighted: bool
) -> None:
    """Triton's compiler needs no GPU. What is not as wide as a thread's widest load runs below its speed."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_lopd.ops import swiglu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = swiglu._shape(f)
    for kernel, loads, stores in ((swiglu._forward, 2, 1), (swiglu._backward, 3, 2)):
        names = kernel.arg_names
        types = {name: "*fp32" if "weight" in name else "*bf16" for name in names}
        types |= {"f": "i32", "WEIGHTED": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs={"WEIGHTED": weighted, "BLOCK": shape["BLOCK"]},
            # What Triton finds of the arguments at a call: all are multiples of 16.
            attrs={(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name.islower()},
        )
        target = GPUTarget("cuda", 90, 32)
        ptx = compile_kernel(source, target=target, options={"num_warps": shape["num_warps"]}).asm["ptx"]
        # One of 16 bytes for each stream of a pass: a thread's 8 columns of bf16.
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == loads
        assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == stores
        assert not re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)
        # A row's number times its width: 90,000 tokens of 2 x 12,288 columns are beyond 32 bits.
        assert "mul.lo.s32" not in ptx


def test_triton_is_tried_where_the_model_is_built_and_not_before_a_rank_has_chosen_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake GPU. Trying makes a CUDA context, and before the choice that would be every rank's on GPU 0."""
    import megatron.core.optimizer  # noqa: F401  before there seems to be a GPU

    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore import compat, model
    from megatron_lopd.mcore.capabilities import capabilities
    from megatron_lopd.ops import kernel_trial

    tried: list[str] = []
    why = ""

    def trial(device_type: str) -> str:
        tried.append(device_type)
        return why

    monkeypatch.setattr(kernel_trial, "trial", trial)
    monkeypatch.setattr(kernel_trial, "_agreed", {})
    monkeypatch.setattr(compat, "has_transformer_engine", lambda: False)
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
        gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        machine = capabilities.__wrapped__()
    assert machine.activation_fusion
    assert not tried
    monkeypatch.setattr(model, "capabilities", lambda: machine)
    arch = read_architecture("tools/bench/qwen3_0.6b")
    assert model.transformer_config(arch, ParallelConfig(), "bf16").bias_activation_fusion
    why = "a fake one does not compile"
    assert not model.transformer_config(arch, ParallelConfig(), "bf16").bias_activation_fusion
    assert tried == ["cpu", "cpu"]
