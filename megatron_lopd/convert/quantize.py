"""A Hugging Face checkpoint to NVIDIA modelopt's FP8, which vLLM loads, in a process of its own.

Weights of the decoder's linear layers become e4m3 with one fp32 scale each: weight = scale * stored, scale
= max |weight| / 448, the maximum over gate and up where they are an expert's. Activations get a static scale
from calibration samples. Embedding, output layer, router and norms stay as they are. The process is
`python -m megatron_lopd.convert.quantize`: importing modelopt patches torch and Megatron-Core.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.convert.hf_checkpoint import copy_companions
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.errors import ConfigError, EngineError, NotInstalled

REFUSED = 2  # exit code of a process that has said why in its last line


def require_modelopt() -> None:
    """Raise NotInstalled unless NVIDIA modelopt is installed."""
    if find_spec("modelopt") is None:
        raise NotInstalled(
            "export.quantization=fp8 needs NVIDIA modelopt, which is not installed: install nvidia-modelopt, "
            "or set export.quantization=none"
        )


def quantize_fp8(model_dir: Path, out_dir: Path, rollout_dir: Path, samples: int) -> None:
    """Write the model in `model_dir` to `out_dir` in FP8, calibrated on `samples` rollouts of `rollout_dir`.

    Raises ConfigError when modelopt leaves a linear layer of the model unquantized, EngineError when its
    process fails otherwise.
    """
    command = [sys.executable, "-m", "megatron_lopd.convert.quantize"]
    done = subprocess.run(
        [*command, str(model_dir), str(out_dir), str(rollout_dir), str(samples)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == REFUSED:
        raise ConfigError(last)
    if done.returncode != 0:
        raise EngineError(f"{model_dir}: modelopt ended with exit code {done.returncode}: {last}")


def _quantize(model_dir: Path, out_dir: Path, rollout_dir: Path, samples: int) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sequences = _calibration(rollout_dir, samples)

    def calibrate(model: Any) -> None:
        for tokens in sequences:
            model(input_ids=tokens.to(model.device))

    with torch.no_grad():
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, calibrate)
        export_hf_checkpoint(model, dtype=model.dtype, export_dir=out_dir)
    _require_quantized(model_dir, out_dir)
    copy_companions(model_dir, out_dir)


def _calibration(rollout_dir: Path, samples: int) -> list[torch.Tensor]:
    """`samples` rollouts spread evenly over all of them (or all): int64 [1, prompt + response] each."""
    reader = open_shards(ROLLOUTS, rollout_dir)
    total = len(reader)
    chosen = [number * total // min(samples, total) for number in range(min(samples, total))]
    rollouts = [reader.record(index) for index in chosen]
    return [
        torch.tensor([[*each.prompt_tokens.tolist(), *each.response_tokens.tolist()]]) for each in rollouts
    ]


def _require_quantized(model_dir: Path, out_dir: Path) -> None:
    """Raise ConfigError unless every projection is FP8: modelopt passes over what it does not know."""
    places = model_files(out_dir).tensors()
    projections = [place for place in places if place.name.endswith("_proj.weight")]
    left = sorted(place.name for place in projections if place.dtype != "F8_E4M3")
    if left or not projections:
        raise ConfigError(
            f"{model_dir}: modelopt does not quantize {left[0] if left else 'any layer'} of this "
            "architecture: set export.quantization=none"
        )


if __name__ == "__main__":
    try:
        _quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
