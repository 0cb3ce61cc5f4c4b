"""The GPUs that can be planned for, and `h100:32` as a person writes it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.errors import ConfigError
from megatron_lopd.families.flops import PEAK_BF16

GPUS_PER_NODE = 8  # of every SXM machine below: NVIDIA's HGX and DGX


@dataclass(frozen=True)
class Gpu:
    """`flops`: dense bf16 peak, FLOP/s; `bandwidth`: bytes/s of its memory; `fp8`: whether it has FP8."""

    name: str
    flops: float
    memory_bytes: float
    bandwidth: float
    fp8: bool


# NVIDIA's data sheets, SXM: "A100 Tensor Core GPU" (80 GB), "H100 Tensor Core GPU", "H200 Tensor Core GPU"
# and "DGX B200" (an eighth of it). Memory is theirs too, in 10^9 bytes; the driver's own share is in
# memory.RESERVED.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80g", PEAK_BF16["A100"], 80e9, 2.04e12, fp8=False),
        Gpu("h100", PEAK_BF16["H100"], 80e9, 3.35e12, fp8=True),
        Gpu("h200", PEAK_BF16["H200"], 141e9, 4.8e12, fp8=True),
        Gpu("b200", PEAK_BF16["B200"], 180e9, 8.0e12, fp8=True),
    )
}


@dataclass(frozen=True)
class GpuCluster:
    """`count` GPUs of one kind, in nodes of eight."""

    gpu: Gpu
    count: int

    @property
    def node_size(self) -> int:
        """GPUs that NVLink joins: what tensor parallelism may span."""
        return min(self.count, GPUS_PER_NODE)


def parse_cluster(text: str) -> GpuCluster:
    """`name:count`, as `h100:32`. Raises ConfigError for an unknown GPU, or a count that makes no nodes."""
    name, colon, number = text.partition(":")
    if name not in GPUS:
        raise ConfigError(f"--gpus {text}: unknown GPU {name!r}: use one of {', '.join(GPUS)}")
    if not colon or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise ConfigError(
            f"--gpus {text}: write the number of GPUs after a colon, as in {name}:{GPUS_PER_NODE}"
        )
    count = int(number)
    whole = count % GPUS_PER_NODE == 0 if count > GPUS_PER_NODE else GPUS_PER_NODE % count == 0
    if not whole:
        below = count // GPUS_PER_NODE * GPUS_PER_NODE or 1 << (count.bit_length() - 1)
        raise ConfigError(
            f"--gpus {text}: {count} GPUs are not whole nodes of {GPUS_PER_NODE}, nor 1, 2, 4 or 8: "
            f"use {name}:{below} or {name}:{-(-count // GPUS_PER_NODE) * GPUS_PER_NODE}"
        )
    return GpuCluster(GPUS[name], count)
