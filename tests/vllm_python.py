"""The Python that has vLLM's CPU build: `make test` makes it beside the project's own environment."""

from __future__ import annotations

from pathlib import Path

VLLM_PYTHON = Path(__file__).parents[1] / ".venv" / "vllm" / "bin" / "python"
