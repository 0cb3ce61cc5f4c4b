"""The library behind an engine, maybe in another Python's environment: is it there, and which version."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from megatron_lopd.config import EngineConfig
from megatron_lopd.errors import NotInstalled

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


def library_versions(config: EngineConfig) -> dict[str, str]:
    """{library: version} of an engine, for manifests; of what `base_versions` does not tell already.

    And in what precision vLLM multiplies by the output layer, which decides how exact its log-probs are.
    """
    if config.name != "vllm":
        return {}
    version = vllm_version(config.options.python) or "absent"
    return {"vllm": version, "vllm output layer": head_precision(config, config.options.python)}


def require_library(config: EngineConfig, section: str) -> None:
    """Raise NotInstalled unless the engine's library is where `config` says. `section` is its key."""
    if config.name == "vllm" and vllm_version(config.options.python) is None:
        where = config.options.python or "this Python"
        raise NotInstalled(
            f"{section}.engine.name=vllm: {where} has no vllm: install it there, set "
            f"{section}.engine.vllm.python to the Python of an environment that has it, or "
            f"{section}.engine.name=transformers"
        )


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


def score_advice(config: EngineConfig) -> list[str]:
    """A line for scores that will be coarser than they look; none otherwise."""
    if config.name != "vllm" or head_precision(config, config.options.python) == "fp32":
        return []
    return [
        f"vllm {vllm_version(config.options.python)} multiplies by the output layer in bf16: log-probs are "
        "off by up to 0.06 nats and the top k has ties: set score.engine.name=megatron, or have them "
        "compared (score.agreement)"
    ]


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
