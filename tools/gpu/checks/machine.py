"""What is here, and the ceilings that other figures are read against."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from importlib.metadata import version

import torch

from megatron_lopd.families.flops import peak_flops
from tools.gpu import device
from tools.gpu.context import LeftOut, Part


def run(part: Part) -> None:
    """Versions, then bandwidth of a copy and FLOP/s of a large product."""
    here = device.open_device(part)
    # In this order: where Transformer Engine is broken, Megatron-Core has it put aside.
    part.attempt("transformer-engine", _importing(part, "transformer-engine", "transformer_engine.pytorch"))
    part.attempt("megatron-core", _importing(part, "megatron-core", "megatron.core"))
    part.figure("torch", version=torch.__version__, cuda=torch.version.cuda, gpu=device.gpu_name())
    part.attempt("driver", lambda: _driver(part))
    part.attempt("copy", lambda: _copy(part, here))
    part.attempt("gemm", lambda: _gemm(part, here))


def _importing(part: Part, name: str, module: str) -> Callable[[], None]:
    """A package that may be absent, which is told, or broken, which fails the check with its own words."""

    def load() -> None:
        try:
            package = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise LeftOut(f"not installed: {error}") from error
        part.figure(name, version=getattr(package, "__version__", None) or version(name))

    return load


def _driver(part: Part) -> None:
    if part.toy:
        raise LeftOut("needs an NVIDIA GPU")
    fields = "clocks.max.sm,clocks.sm,power.limit,temperature.gpu,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    subprocess.run(["nvidia-smi", "-q"], check=False)  # into the log
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    names = fields.replace(".", "_").split(",")
    part.figure("driver", **dict(zip(names, told, strict=False)))


def _copy(part: Part, here: torch.device) -> None:
    size = 2**20 if part.toy else 2**32
    device.need_memory(2 * size, "no smaller copy says what the memory can")
    source = torch.empty(size, dtype=torch.uint8, device=here)
    target = torch.empty_like(source)
    seconds = device.median_seconds(lambda: target.copy_(source), 10)
    part.figure("copy", tb_per_s=2 * size / seconds / 1e12)


def _gemm(part: Part, here: torch.device) -> None:
    size = 256 if part.toy else 8192
    flops = device.gemm_flops(size, here)
    peak = peak_flops(device.gpu_name())
    share = {} if peak is None else {"of_peak": flops / peak}
    part.figure(f"gemm {size}^3 bf16", tflops=flops / 1e12, **share)
