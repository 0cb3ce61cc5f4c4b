"""An engine given other weights is the engine of the model they came from; and one in another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.engines import Prompted, open_engine
from megatron_lopd.engines.process import EngineProcess
from megatron_lopd.errors import EngineDied, EngineError
from tests.model_zoo import Family, make_model_dir, unsampled

PROMPT = np.array([3, 14, 15, 92], dtype=np.int32)
RESPONSE = np.array([6, 53, 58, 97, 93], dtype=np.int32)
ASKED = [unsampled("a", PROMPT, RESPONSE)]


def numbers(engine: Any) -> tuple[list[int], NDArray[np.float32]]:
    sampling = Sampling(max_new_tokens=8)
    (sampled,) = engine.generate([Prompted("a", PROMPT, 7)], sampling, frozenset({1}))
    (scored,) = engine.score(ASKED)
    return sampled.response_tokens.tolist(), np.concatenate([sampled.log_probs, scored.log_probs])


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("qwen3", True, "fp32"),
        ("qwen3", True, "bf16"),
        ("qwen2", False, "bf16"),
        ("qwen3_moe", False, "fp32"),
    ],
)
def test_an_engine_takes_the_weights_of_another_model(
    tmp_path: Path, family: Family, tied: bool, dtype: Literal["fp32", "bf16"]
) -> None:
    first = make_model_dir(tmp_path / "first", family, tied=tied, seed=1)
    second = make_model_dir(tmp_path / "second", family, tied=tied, seed=2)
    config = EngineConfig(dtype=dtype)
    engine = open_engine(config, str(first))
    before = numbers(engine)
    engine.load_weights(load_file(second / "model.safetensors").items())
    tokens, log_probs = numbers(engine)
    expected_tokens, expected = numbers(open_engine(config, str(second)))
    assert tokens == expected_tokens != before[0]
    np.testing.assert_array_equal(log_probs, expected)


def test_weights_of_another_shape_are_refused_in_a_line(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", tied=True)
    weights = load_file(model / "model.safetensors")
    engine = open_engine(EngineConfig(), str(model))
    norm = "model.norm.weight"
    with pytest.raises(EngineError, match=r"1 weights are not given, the first is model\.norm\.weight"):
        engine.load_weights((name, value) for name, value in weights.items() if name != norm)
    with pytest.raises(EngineError, match=r"weight lm_head\.weight is given, and the model has none such"):
        engine.load_weights({**weights, "lm_head.weight": torch.zeros(131, 32)}.items())
    with pytest.raises(EngineError, match=r"is given as \(31,\), and the model's is \(32,\)"):
        engine.load_weights({**weights, norm: torch.zeros(31)}.items())


def test_a_process_scores_as_the_engine_here_and_says_how_it_died(tmp_path: Path) -> None:
    model = str(make_model_dir(tmp_path / "model"))
    expected = next(iter(open_engine(EngineConfig(), model).score(ASKED, 3)))
    with EngineProcess("the teacher", EngineConfig(), model, threads=1) as teacher:
        teacher.ready()
        with pytest.raises(EngineError, match=r"score\.top_k=200 leaves none"):
            teacher.score(ASKED, 200)
        (found,) = teacher.score(ASKED, 3)
        np.testing.assert_array_equal(found.log_probs, expected.log_probs)
        assert found.top_k is not None
        assert expected.top_k is not None
        np.testing.assert_array_equal(found.top_k.tail_log_probs, expected.top_k.tail_log_probs)
        os.kill(teacher.pid, signal.SIGTERM)  # to a whole group of processes: not its business
        assert len(list(teacher.score(ASKED))) == 1
        os.kill(teacher.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match=rf"the teacher's process \(pid {teacher.pid}\) .* SIGKILL"):
            teacher.score(ASKED)


def test_a_model_that_does_not_load_there_is_an_error_here(tmp_path: Path) -> None:
    with (
        EngineProcess("the teacher", EngineConfig(), str(tmp_path), threads=1) as teacher,
        pytest.raises(EngineError, match="not a Hugging Face checkpoint") as caught,
    ):
        teacher.ready()
    assert type(caught.value) is EngineError


PARENT = """
import sys, time
from megatron_lopd.config import EngineConfig
from megatron_lopd.engines.process import EngineProcess
teacher = EngineProcess("the teacher", EngineConfig(), sys.argv[1], threads=1)
teacher.ready()
print(teacher.pid, flush=True)
time.sleep(60)
"""


def test_a_process_does_not_outlive_its_parent(tmp_path: Path) -> None:
    model = str(make_model_dir(tmp_path / "model"))
    command = [sys.executable, "-c", PARENT, model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
