"""What can run here is run; what cannot is left out, and a line says for want of what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import Bench, make_checkpoint

NEEDED = {
    "gpu": "an NVIDIA GPU",
    "engine": "Transformer Engine",
    "blockwise": "FP8 blockwise",
    "tensorwise": "FP8 tensorwise",
    "delayed": "FP8 delayed",
    "mxfp8": "FP8 mxfp8",
}
_left_out: dict[str, int] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(what, ...): what of NEEDED a test cannot do without")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "tests/gpu needs an NVIDIA GPU, and torch sees none: nothing was run. "
            "`--device cpu` runs the part that needs none"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    possible = _possible(config.getoption("--device"))
    kept, dropped = [], []
    for item in items:
        wanted = [name for mark in item.iter_markers("needs") for name in mark.args]
        missing = [name for name in wanted if name not in possible]
        (dropped if missing else kept).append(item)
        if missing:
            _left_out[missing[0]] = _left_out.get(missing[0], 0) + 1
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in _left_out.items():
        terminalreporter.write_line(f"left out for want of {NEEDED[name]}: {count}")


def _possible(device: str) -> set[str]:
    if device == "cpu":
        return set()
    from megatron_lopd.mcore.capabilities import capabilities

    machine = capabilities()
    recipes = {recipe for recipe, reason in machine.fp8.items() if not reason}
    return {"gpu", *(["engine"] if machine.transformer_engine else []), *recipes}


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Checkpoints of tiny models and their fp64 oracle."""
    root: Path = tmp_path_factory.mktemp("gpu")
    quick = request.config.getoption("--device") == "cpu"
    return Bench({family: make_checkpoint(root, family) for family in ("qwen3", "qwen3_moe")}, quick)
