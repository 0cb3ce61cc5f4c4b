"""Fakes: an engine's process that hangs, what it has started, vLLM's failures, and memory given back."""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch

from megatron_lopd import engines
from megatron_lopd.config import EngineConfig
from megatron_lopd.engines import kind_of, open_engine, process, vllm
from megatron_lopd.engines.process import EngineProcess
from megatron_lopd.engines.vllm import VllmOptions
from megatron_lopd.errors import EngineDied, EngineError
from tests.model_zoo import make_model_dir, unsampled

PROMPT = np.array([1, 2, 3], dtype=np.int32)
# In the place of a Python. $3 is the pipe: a byte is read before it closes, or sending would fail. What is
# started in the background stands for vLLM's workers.
READ = '#!/bin/bash\nhead -c 1 <&"$3" > /dev/null\n'
LINGERS = READ + 'eval "exec $3>&-"\nsleep 300 &\nsleep 300\n'
ENDS = READ + '(eval "exec $3>&-"; exec sleep 300) &\nexit 3\n'
WORKS = "#!/bin/bash\nsleep 300 &\nwait\n"
HANGS = "#!/bin/bash\nexec sleep 300\n"
# An answer is its length, in four bytes, and a pickle, which does not come.
HALTS = READ + "printf '\\0\\0\\4\\0\\200\\4N' >&\"$3\"\nkill -STOP $$\n"
UNANSWERED = r"not answered in \d+s \(engine.patience_minutes\), and was killed"


def parameters() -> list[torch.nn.Parameter]:
    return [each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter) and len(each)]


def interpreter(path: Path, script: str) -> EngineConfig:
    path.write_text(script)
    path.chmod(0o755)
    return EngineConfig(name="vllm", options=VllmOptions(str(path)))


def group(leader: int) -> list[psutil.Process]:
    """The live processes of a group, but for those that wait to be collected."""
    found = []
    for each in psutil.process_iter():
        try:
            fields = Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(each)
    return found


def test_a_process_that_hangs_with_its_pipe_closed_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "EXIT_SECONDS", 0.3)
    with EngineProcess("vLLM", interpreter(tmp_path / "python", LINGERS), "model", threads=1) as engine:
        with pytest.raises(EngineDied, match=rf"vLLM's process \(pid {engine.pid}\) stopped answering"):
            engine.ready()
        assert group(engine.pid) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("script", [HANGS, HALTS], ids=["at nothing", "in the midst of an answer"])
def test_a_process_that_stops_answering_has_died_when_patience_is_at_its_end(
    tmp_path: Path, script: str
) -> None:
    config = replace(interpreter(tmp_path / "python", script), patience_minutes=0.005)
    with EngineProcess("vLLM", config, "model", threads=1) as engine:
        with pytest.raises(EngineDied, match=UNANSWERED):
            engine.ready()
        assert group(engine.pid) == []


@pytest.mark.timeout(60)
def test_a_process_that_is_stopped_before_it_has_read_a_request_has_died_too(tmp_path: Path) -> None:
    """The request is above what a pipe holds."""
    config = replace(interpreter(tmp_path / "python", HANGS), patience_minutes=0.005)
    many = np.zeros(1 << 20, dtype=np.int32)
    with EngineProcess("vLLM", config, "model", threads=1) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineDied, match=UNANSWERED):
            engine.score([unsampled("a", PROMPT, many)])
        assert group(engine.pid) == []


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    with EngineProcess("vLLM", interpreter(tmp_path / "ends", ENDS), "model", threads=1) as engine:
        with pytest.raises(EngineError, match="ended with exit code 3") as caught:
            engine.ready()
        assert type(caught.value) is EngineError
        assert group(engine.pid) == []
    working = EngineProcess("vLLM", interpreter(tmp_path / "works", WORKS), "model", threads=1)
    while len(group(working.pid)) < 2:
        assert working._process.poll() is None
    working.close()
    assert group(working.pid) == []


class EngineDeadError(Exception):
    """As vLLM's own before it had a family of errors."""


class FakeLLM:
    """Keeps what it is given, and fails as it is told to."""

    given: ClassVar[dict[str, Any]] = {}
    failure: BaseException | None = None

    def __init__(self, **options: Any) -> None:
        type(self).given = options

    def generate(self, *unused: Any, **options: Any) -> list[Any]:
        assert self.failure is not None
        raise self.failure


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Opens the engine in this process, with modules in the place of vLLM's."""
    names = ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.exceptions")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("SamplingParams", "TokensPrompt"):
        setattr(sys.modules["vllm"], name, lambda **options: options)
    sys.modules["vllm"].LLM = FakeLLM  # type: ignore[attr-defined]
    sys.modules[names[-1]].EngineDeadError = EngineDeadError  # type: ignore[attr-defined]
    from megatron_lopd.engines.vllm_engine import VllmEngine

    model = str(make_model_dir(tmp_path / "model"))
    return lambda **options: VllmEngine(EngineConfig(name="vllm", **options), model)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("Worker failed with error 'unspecified launch failure'"), EngineDied),
        (RuntimeError("Executor failed."), EngineDied),
        (TimeoutError("RPC call to sample_tokens timed out."), EngineDied),
        (EngineDeadError("EngineCore encountered an issue."), EngineDied),
        (RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 2 GiB'"), EngineError),
        (torch.OutOfMemoryError("CUDA out of memory."), EngineError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EngineError),
        (MemoryError(), EngineError),
        (ValueError("The prompt is too long"), EngineError),
    ],
)
def test_a_crash_is_tried_again_and_full_memory_and_bad_input_are_not(
    fake_vllm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    kind: type[EngineError],
) -> None:
    monkeypatch.setattr(vllm, "_vllm", lambda python: ("0.0", True))
    monkeypatch.setattr(FakeLLM, "failure", failure)
    with pytest.raises(EngineError) as caught:
        list(fake_vllm().score([unsampled("a", PROMPT, PROMPT)]))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    is_memory = "memory" in str(failure).lower() or isinstance(failure, MemoryError)
    assert ("lower engine.batch_size" in str(caught.value)) == is_memory


@pytest.mark.parametrize(
    ("dtype", "has_fp32_head", "overrides", "precision"),
    [
        ("bf16", True, {"head_dtype": "float32"}, "fp32"),
        ("bf16", False, None, "bf16"),
        ("fp32", False, None, "fp32"),
    ],
)
def test_the_output_layer_is_asked_for_in_fp32_where_vllm_can_and_is_named(
    fake_vllm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    has_fp32_head: bool,
    overrides: dict[str, str] | None,
    precision: str,
) -> None:
    monkeypatch.setattr(vllm, "_vllm", lambda python: ("0.20.1", has_fp32_head))
    fake_vllm(dtype=dtype)
    assert FakeLLM.given["hf_overrides"] == overrides
    assert FakeLLM.given["gpu_memory_utilization"] == 0.85
    config = EngineConfig(name="vllm", dtype=dtype)
    kind = kind_of(config)
    assert kind.versions(config) == {"vllm": "0.20.1", "vllm output layer": precision}
    advice = kind.score_advice(config)
    assert len(advice) == (precision == "bf16")
    assert all("score.engine.name=megatron" in line and "score.agreement" in line for line in advice)


def test_a_teacher_beside_a_trainer_takes_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU of 80 GB, of which the trainer has 50."""
    beside = kind_of(EngineConfig(name="vllm")).beside_trainer
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 10**9, 80 * 10**9))
    assert beside(EngineConfig(name="vllm")).options.memory_share == pytest.approx(15 / 80)
    told = EngineConfig(name="vllm", options=VllmOptions(memory_fraction=0.3))
    assert beside(told) is told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert beside(EngineConfig(name="vllm")).options.memory_share == 0.85


@pytest.mark.parametrize("name", ["transformers", "megatron"])
def test_a_closed_engine_has_dropped_its_model_before_the_cache_is_emptied(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake GPU: what torch's allocator holds can then be given back, whoever still has the engine."""
    model = str(make_model_dir(tmp_path / "model"))
    others = parameters()  # of tests before this one: they may go on holding theirs
    engine = open_engine(EngineConfig(name=name), model)
    list(engine.score([unsampled("a", PROMPT, PROMPT)], 3))
    known = {id(each) for each in others}
    weights = [weakref.ref(each) for each in parameters() if id(each) not in known]
    assert len(weights) > 10
    left: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: left.append(sum(each() is not None for each in weights))
    )
    engine.close()
    assert left == [0]


def test_an_engine_multiplies_fp32_in_fp32_whatever_the_image_has_set(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # as NVIDIA's environment has it
    try:
        open_engine(EngineConfig(), str(make_model_dir(tmp_path / "model"))).close()
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_the_cache_is_emptied_before_an_engine_is_opened_and_without_a_gpu_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(make_model_dir(tmp_path / "model"))
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(engines, "load_engine", lambda *unused: done.append("loaded"))
    open_engine(EngineConfig(), model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    open_engine(EngineConfig(), model)
    assert done == ["loaded", "emptied", "loaded"]
