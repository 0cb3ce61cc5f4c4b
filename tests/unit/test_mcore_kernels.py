"""The Triton kernels as an H100 would run them, compiled and read; and what happens where they cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gloo import run_ranks

from tests.interpreter import interpret

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each kernel, for sm_90, in a process of its own, which has not met the interpreter."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_ptx"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    _, *parts = done.stdout.split("KERNEL ")
    return dict(part.split("\n", 1) for part in parts)  # type: ignore[misc]


def test_a_block_is_read_by_all_threads_before_any_writes_over_it(ptx: dict[str, str]) -> None:
    steps = re.findall(r"ld\.global\.v\d|bar\.sync|st\.global", ptx["_gradient"])
    last_load = max(place for place, step in enumerate(steps) if step.startswith("ld"))
    first_store = steps.index("st.global")
    assert "bar.sync" in steps[last_load:first_store]


def test_logits_are_read_16_bytes_at_a_time(ptx: dict[str, str]) -> None:
    for name in ("_statistics", "_gradient"):
        assert set(re.findall(r"@%p\d+ ld\.global\.(\S+)", ptx[name])) == {"v4.b32"}, name


def test_rows_are_found_beyond_two_to_the_31_elements(ptx: dict[str, str]) -> None:
    for name in ("_statistics", "_gradient"):
        assert "mul.lo.s32" not in ptx[name], f"{name}: a row's number times its stride, in 32 bits"


def test_a_triton_that_cannot_run_is_one_line_and_the_torch_operation() -> None:
    """On all ranks, though one alone has the trouble, and said once."""
    results = run_ranks(2, ranks_that_differ)
    said = results[0][0]
    assert said.count("\n") == 1
    assert "torch's own operations" in said
    assert "PermissionError: [Errno 13] Permission denied: '/nowhere'" in said
    assert results[1][0] == ""
    assert [usable for _, usable, _ in results] == [False, False]
    assert [close for _, _, close in results] == [True, True]


def ranks_that_differ() -> tuple[str, bool, bool]:
    """(what was said, whether the kernels are used, whether a loss is as the torch operation has it)."""
    import contextlib
    import io

    import torch
    import torch.distributed as dist

    from megatron_lopd.ops import kernel_trial, token_loss
    from megatron_lopd.ops.log_probs import vocab_parallel_log_probs
    from tests.log_prob_oracle import inputs

    interpret()
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        from megatron_lopd.ops import log_prob_kernels

        def unwritable(logits: torch.Tensor) -> None:
            raise PermissionError(13, "Permission denied", "/nowhere")

        log_prob_kernels.statistics = unwritable  # type: ignore[assignment]
        kernel_trial.trial.cache_clear()
    cpu = torch.device("cpu")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        kernel_trial.agree(cpu)
        kernel_trial.agree(cpu)  # as in a process that trains and scores
    hidden, weight, tokens, ids = inputs(5, 40, 2, torch.float32)
    mine = weight.detach().chunk(2)[dist.get_rank()][:20]
    options: dict[str, Any] = {"vocab_size": 40, "group": dist.group.WORLD}
    summed = token_loss.vocab_parallel_loss(
        hidden, mine, tokens, ids, lambda scored, rows: -scored.log_probs, torch.ones(5), **options
    )
    expected = vocab_parallel_log_probs(hidden, mine, tokens, ids, **options).log_probs
    return said.getvalue(), kernel_trial.usable(cpu), torch.equal(summed.token_loss, -expected)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "there is no GPU"),
        ({"TRITON_INTERPRET": "1"}, ""),
    ],
)
def test_a_cpu_runs_the_kernels_in_the_interpreter_alone(environment: dict[str, str], why: str) -> None:
    code = "from megatron_lopd.ops.kernel_trial import trial; print(trial('cpu'))"
    assert _run(code, environment) == why


def test_a_compiler_without_a_gpu_is_a_reason(tmp_path: Path) -> None:
    """Triton's own error, as it comes out of a launch that it cannot make."""
    code = (
        "import os; from megatron_lopd.ops import kernel_trial, log_prob_kernels;"
        "os.environ['TRITON_INTERPRET'] = '1'; print(kernel_trial.trial('cpu'))"
    )
    assert _run(code, {}).startswith("RuntimeError: 0 active drivers")


def test_a_triton_that_cannot_be_imported_is_a_reason_too() -> None:
    """A GPU is believed in while Megatron-Core is made ready; some releases of it need Triton first."""
    code = """
import sys, types
import torch, megatron.core.optimizer
from megatron_lopd.mcore import compat

from megatron_lopd.ops import kernel_trial
class Broken(types.ModuleType):
    def __getattr__(self, name):
        raise ImportError("libtriton.so: no such file")

for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = Broken("triton")
torch.cuda.is_available = lambda: True
compat.prepare()
print(kernel_trial.trial("cuda"))
"""
    assert _run(code, {}) == "ImportError: libtriton.so: no such file"


def _run(code: str, environment: dict[str, str]) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
