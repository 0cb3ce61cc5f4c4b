"""The `vllm` engine's kind, and what it asks of vLLM in another Python's environment."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_lopd.config import Count, EngineConfig, FilePath, Share, key
from megatron_lopd.engines.kind import EngineKind, EngineOptions
from megatron_lopd.errors import NotInstalled

if TYPE_CHECKING:
    from megatron_lopd.engines.protocol import Engine

ALONE = 0.85  # of a GPU's memory, where nothing else is on it
SECONDS = 60.0
# By what is installed under the name: its CPU build is another distribution. Importing it takes seconds, so
# whether the layer that makes logits looks at `head_dtype` is read in its source.
_ASK = """
import importlib.metadata, importlib.util, json, pathlib
names = importlib.metadata.packages_distributions().get("vllm", [])
found = importlib.util.find_spec("vllm") if names else None
if found:
    layer = pathlib.Path(found.origin).parent / "model_executor" / "layers" / "logits_processor.py"
    has_fp32_head = layer.is_file() and "head_dtype" in layer.read_text()
print(json.dumps([importlib.metadata.version(names[0]), has_fp32_head] if found else None))
"""


@dataclass(frozen=True)
class VllmOptions(EngineOptions):
    python: FilePath = key("the Python that has it; empty: this one", "", operational=True)
    tensor: Count = key("GPUs that hold one copy of the model", 1, operational=True)
    memory_fraction: Share | None = key(
        "share of a GPU's memory it takes; empty: 0.85, or as online's teacher half of what is free beside "
        "the trainer",
        None,
        operational=True,
    )

    @property
    def devices(self) -> int:
        return self.tensor

    @property
    def memory_share(self) -> float:
        """`memory_fraction`, or its default where the engine has the GPU to itself."""
        return ALONE if self.memory_fraction is None else self.memory_fraction


class Vllm(EngineKind):
    """For speed: paged attention and continuous batching."""

    name = "vllm"
    caption = "vLLM, in a process of its own, on the GPUs that one copy takes"
    Options = VllmOptions
    own_process = True

    def open(self, config: EngineConfig, model_dir: str) -> Engine:
        from megatron_lopd.engines.vllm_engine import VllmEngine

        return VllmEngine(config, model_dir)

    def python(self, config: EngineConfig) -> str:
        return config.options.python or sys.executable

    def require(self, config: EngineConfig, section: str) -> None:
        python = config.options.python
        try:
            found = vllm_version(python)
        except NotInstalled as error:
            raise NotInstalled(f"{section}.{error}") from None
        if found is None:
            raise NotInstalled(
                f"{section}.engine.name=vllm: {python or 'this Python'} has no vllm: install it there, set "
                f"{section}.engine.vllm.python to the Python of an environment that has it, or "
                f"{section}.engine.name=transformers"
            )

    def versions(self, config: EngineConfig) -> dict[str, str]:
        """And in what precision it multiplies by the output layer: how exact its log-probs are."""
        python = config.options.python
        version = vllm_version(python) or "absent"
        return {"vllm": version, "vllm output layer": head_precision(config, python)}

    def here(self) -> str:
        return f"{self.caption}: {vllm_version('') or 'absent from this Python'}"

    def score_advice(self, config: EngineConfig) -> list[str]:
        python = config.options.python
        if head_precision(config, python) == "fp32":
            return []
        return [
            f"vllm {vllm_version(python)} multiplies by the output layer in bf16: log-probs are off by up to "
            "0.06 nats and the top k has ties: set score.engine.name=megatron, or have them compared "
            "(score.agreement)"
        ]

    def beside_trainer(self, config: EngineConfig) -> EngineConfig:
        """With half of what is free, unless it is told its share.

        The other half is for what the trainer takes later: the sampler, the optimizer's moments, activations.
        """
        import torch

        if config.options.memory_fraction is not None or not torch.cuda.is_available():
            return config
        free, total = torch.cuda.mem_get_info()
        return replace(config, options=replace(config.options, memory_fraction=free / total / 2))

    def sizes(self, config: EngineConfig, node: int) -> list[int]:
        return [min(config.options.tensor, node)]

    def memory_share(self, config: EngineConfig) -> float:
        share: float = config.options.memory_share
        return share

    def assumption(self) -> None:
        return None

    def too_large(self, section: str) -> list[str]:
        return [f"raise {section}.engine.vllm.tensor"]


def vllm_version(python: str) -> str | None:
    """The version that a Python interpreter (empty: this one) has; None where it has none.

    Raises NotInstalled when the interpreter does not run.
    """
    found = _vllm(python)
    return None if found is None else found[0]


def head_precision(config: EngineConfig, python: str) -> str:
    """In what the vLLM of an interpreter multiplies by the output layer: "fp32", or "bf16" where it is older.

    vLLM keeps the model's own dtype unless it is asked, and could not be asked for models that generate
    before the middle of 2026.
    """
    found = _vllm(python)
    return "fp32" if config.dtype == "fp32" or (found is not None and found[1]) else "bf16"


@functools.cache
def _vllm(python: str) -> tuple[str, bool] | None:
    """The version, and whether the output layer can be in fp32; None where there is none."""
    try:
        answer = subprocess.run(
            [python or sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NotInstalled(
            f"engine.vllm.python: {python} does not run: {error}: give a Python interpreter"
        ) from None
    found: tuple[str, bool] | None = json.loads(answer.stdout)
    return found
