"""A GPU that torch cannot use, and GPUs of two kinds: device nodes and torch's answers are faked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lopd.cli import main
from megatron_lopd.config import EngineConfig
from megatron_lopd.engines import open_engine
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import gpus
from tests.pipeline import write_recipe
from tests.training_zoo import make_root, train

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\n Please update your GPU driver"


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's device node, and a torch that finds the driver too old."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(torch.cuda, "init", lambda: _raise(RuntimeError(TOO_OLD)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("unusable")
def test_the_cpu_does_not_do_a_gpu_s_work_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for command in (["run", recipe], ["sft", recipe, "--dry-run"], ["doctor", recipe]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "torch cannot use it: The NVIDIA driver on your system is too old (found version" in said.err
        assert "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU" in said.err
    assert main(["doctor"]) == 0
    assert "GPU               torch cannot use it: The NVIDIA driver" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has an NVIDIA GPU and torch cannot use it"):
        open_engine(EngineConfig(), str(tmp_path / "student"))
    with pytest.raises(ConfigError, match="has an NVIDIA GPU and torch cannot use it"):
        train(make_root(tmp_path / "job", samples=2))
    assert not (tmp_path / "job" / "run").exists(), "nothing was allocated or written"


@pytest.mark.usefixtures("unusable")
def test_only_a_gpu_that_is_there_and_wanted_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus.why_unusable().endswith("Please update your GPU driver")
    monkeypatch.setattr(
        torch.cuda, "init", lambda: _raise(AssertionError("Torch not compiled with CUDA enabled"))
    )
    assert gpus.why_unusable() == "Torch not compiled with CUDA enabled"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        gpus.require_usable()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert gpus.why_unusable()
    (tmp_path / "dev" / "nvidia0").rename(tmp_path / "dev" / "nvidiactl")
    gpus.require_usable()


def test_ranks_are_refused_on_gpus_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA A100", "NVIDIA A100", "NVIDIA H100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    gpus.require_one_kind(1)
    gpus.require_one_kind(2)
    with pytest.raises(ConfigError, match=r"3 ranks .* \(2 x NVIDIA A100, 1 x NVIDIA H100\)") as refusal:
        gpus.require_one_kind(3)
    assert "CUDA_VISIBLE_DEVICES to those of one kind (0,1 for NVIDIA A100; 2 for NVIDIA H100)" in str(
        refusal.value
    )
