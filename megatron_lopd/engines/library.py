"""The library behind an engine, maybe in another Python's environment: is it there, and which version."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from megatron_lopd.config import EngineConfig
from megatron_lopd.errors import NotInstalled

SECONDS = 60.0
# By what is installed under the name: its CPU build is another distribution. Importing it takes seconds.
_ASK = """
import importlib.metadata, json
names = importlib.metadata.packages_distributions().get("vllm", [])
print(json.dumps(importlib.metadata.version(names[0]) if names else None))
"""


def library_versions(config: EngineConfig) -> dict[str, str]:
    """{library: version} of an engine, for manifests; of what `base_versions` does not tell already."""
    return {"vllm": vllm_version(config.python) or "absent"} if config.name == "vllm" else {}


def require_library(config: EngineConfig, section: str) -> None:
    """Raise NotInstalled unless the engine's library is where `config` says. `section` is its key."""
    if config.name == "vllm" and vllm_version(config.python) is None:
        where = config.python or "this Python"
        raise NotInstalled(
            f"{section}.engine.name=vllm: {where} has no vllm: install it there, set {section}.engine.python "
            f"to the Python of an environment that has it, or {section}.engine.name=transformers"
        )


@functools.cache
def vllm_version(python: str) -> str | None:
    """The version that a Python interpreter (empty: this one) has; None where it has none.

    Raises NotInstalled when the interpreter does not run.
    """
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
            f"engine.python: {python} does not run: {error}: give a Python interpreter"
        ) from None
    version: str | None = json.loads(answer.stdout)
    return version
