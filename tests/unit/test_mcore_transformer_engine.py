"""Transformer Engine that is absent, broken or loaded too late: fake packages, in processes of their own.

The processes believe that torch has a GPU, and go no further than importing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.mcore import compat, transformer_engine
from megatron_lopd.mcore.transformer_engine import TransformerEngine
from tests.training_zoo import make_root, train

pytestmark = pytest.mark.slow

BELIEVES = """
import json, sys, torch
torch.cuda.is_available = lambda: True
torch.backends.cudnn.version = lambda: setattr(torch.backends.cudnn, "asked", True)  # as if it loaded cuDNN
"""
# The package itself, which needs a cuDNN that torch has not taken.
PACKAGE = """
import sys, torch
assert "megatron.core" not in sys.modules, "Megatron-Core came first"
if getattr(torch.backends.cudnn, "asked", False):
    raise OSError("libcudnn_heuristic.so.9: undefined symbol")
"""


def make_fake(folder: Path, pytorch: str) -> Path:
    """A folder for PYTHONPATH with a `transformer_engine` whose `pytorch` is this code, and its metadata."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "pytorch" / "__init__.py").write_text(pytorch)
    (folder / "transformer_engine-2.11.0.dist-info").mkdir()
    (folder / "transformer_engine-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.11.0\n"
    )
    return folder


def run(folder: Path, code: str) -> Any:
    """What `code` prints last, as JSON, with `folder` before all other packages."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", BELIEVES + code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.release
def test_where_it_cannot_be_loaded_megatron_core_goes_on_without(tmp_path: Path) -> None:
    code = """
import megatron_lopd
from megatron.core.models.gpt import gpt_layer_specs  # whoever comes first
from megatron_lopd.mcore.transformer_engine import load
from megatron_lopd.mcore import compat
print(json.dumps([load().lacking, gpt_layer_specs.HAVE_TE, compat.takes_transformer_engine("bf16")]))
"""
    folder = make_fake(tmp_path, "raise OSError('libcudnn.so.9:\\n undefined symbol')")
    lacking = (
        "Transformer Engine 2.11.0 cannot be loaded, because of OSError: libcudnn.so.9: undefined symbol"
    )
    assert run(folder, code) == [lacking, False, False]


@pytest.mark.parametrize(
    "kind", [OSError, RuntimeError, AssertionError, ImportError, AttributeError, SystemError, SystemExit]
)
def test_any_failure_to_load_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    def fail(name: str) -> None:
        sys.modules["transformer_engine.common"] = sys  # a part that came in before the failure
        raise kind("no\n  such symbol")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", sys)  # it came in as well
    monkeypatch.setattr(transformer_engine, "find_spec", lambda name: object())
    monkeypatch.setattr(transformer_engine, "importlib", SimpleNamespace(import_module=fail))
    engine = transformer_engine.load.__wrapped__()
    assert engine.lacking.endswith(f" cannot be loaded, because of {kind.__name__}: no such symbol")
    assert engine.broken
    assert "transformer_engine.common" not in sys.modules
    with pytest.raises(ImportError, match=r"halted; None in sys\.modules"):
        importlib.import_module("transformer_engine")


@pytest.mark.parametrize("first", ["megatron_lopd.training.loop", "megatron_lopd.convert.gather"])
def test_it_is_loaded_before_megatron_core_and_before_torch_asks_for_cudnn(
    tmp_path: Path, first: str
) -> None:
    """The fake fails as the real one does when it comes late, and otherwise in words of its own."""
    folder = make_fake(tmp_path, "raise RuntimeError('first of all')")
    late = "import megatron_lopd\ntorch.backends.cudnn.version()\n"
    said = "from megatron_lopd.mcore.transformer_engine import load\nprint(json.dumps(load().lacking))"
    assert run(folder, late + said).endswith("OSError: libcudnn_heuristic.so.9: undefined symbol")
    early = f"import {first}\ntorch.backends.cudnn.version()\n"
    assert run(folder, early + said).endswith("RuntimeError: first of all")


def test_absent_is_not_broken(tmp_path: Path) -> None:
    code = "from megatron_lopd.mcore.transformer_engine import load\nprint(json.dumps(vars(load())))"
    lacking = "Transformer Engine is not installed"
    assert run(tmp_path, code) == {"version": None, "lacking": lacking, "broken": False}


def test_training_says_once_that_it_goes_on_with_native_layers(tmp_path: Path) -> None:
    root = make_root(tmp_path, samples=8)
    notes = run_ranks(2, _notes_of_training, root)
    assert [sum("cannot be loaded, because of OSError" in note for note in rank) for rank in notes] == [1, 0]


def _notes_of_training(root: Path) -> list[str]:
    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.mcore import capabilities
    from megatron_lopd.runtime.display import ProgressDisplay
    from megatron_lopd.training import loop

    notes: list[str] = []
    ProgressDisplay.note = lambda self, text: notes.append(text)  # type: ignore[method-assign]
    lacking = "Transformer Engine 2.11.0 cannot be loaded, because of OSError: libcudnn"
    transformer_engine.load = lambda: TransformerEngine(None, lacking, broken=True)
    assert capabilities.notices("fp32") == [], "torch's layers are what fp32 takes anywhere"
    loop.notices = lambda precision: capabilities.notices("bf16")
    train(root, parallel=ParallelConfig(processes=2), steps=1, global_batch_size=4)
    return notes


def test_leaving_model_parallel_lets_go_of_fp8_state() -> None:
    assert run_ranks(1, _resets) == [1]


def _resets() -> int:
    from megatron_lopd.config import ParallelConfig
    from megatron_lopd.mcore.process_groups import model_parallel

    resets: list[None] = []
    compat.prepare()
    transformer_engine.load = lambda: TransformerEngine("2.11.0")
    manager = SimpleNamespace(reset=lambda: resets.append(None))
    transformer_engine.quantization = lambda: SimpleNamespace(FP8GlobalStateManager=manager)
    with model_parallel(ParallelConfig(), seed=0):
        assert not resets
    return len(resets)
