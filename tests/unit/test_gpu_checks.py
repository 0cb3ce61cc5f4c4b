"""tools/gpu/check.sh at toy sizes: each check's steps run without a GPU, lest they rot until there is one."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_lopd.families.architecture import Architecture
from tools.gpu import device
from tools.gpu.checks import machine
from tools.gpu.checks.profiles import kernel_class, read_kernels
from tools.gpu.context import CheckFailed, LeftOut, Part
from tools.gpu.registry import CHECKS
from tools.gpu.run import BUDGET
from tools.gpu.training import EXPERTS_CUT, QWEN3_8B_CUT, Job, training

ROOT = Path(__file__).parents[2]
# What a CPU cannot do even at toy sizes, and why.
LEFT_OUT = {"recipe-fp8": "needs FP8 tensorwise"}
# Of each check what cannot be missing: it is told at its end.
LAST = {
    "machine": "gemm 256^3 bf16",
    "log-probs": "timed, R 32, h 64, V 1,187, k 64, torch",
    "tests": "test_layers.py::test_bf16_is_near_the_oracle[native]",
    "quickstart": "accuracy",
    "steps": "MoE of 32 experts, bf16",
    "profile": "GEMM",
    "swiglu": "ours",
    "checkpoint": "this machine at best",
    "recipe-bf16": "whole run",
    "stage-change": "evaluate",
    "imports": "two at once, warm, 2",
}


# All take two minutes by themselves; on a machine whose cores others use as well, many times that.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "names",
    [("machine", "log-probs"), pytest.param([check.name for check in CHECKS], marks=pytest.mark.nightly)],
    ids=["two", "all"],
)
def test_every_check_runs_at_toy_sizes(tmp_path: Path, names: Sequence[str]) -> None:
    command = [ROOT / "tools" / "gpu" / "check.sh", "--toy", "--out", tmp_path / "out", "--budget", "1700"]
    command += ["--only", *names]
    environment = {**os.environ, "PYTHON": sys.executable}
    # From a folder that has a package of the same name, which must not be taken for ours.
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise ImportError('not ours')")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    _, *endings = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {each["name"]: each for each in endings}
    assert found.keys() == set(names)
    for name, each in found.items():
        if name in LEFT_OUT:
            assert each["status"] == "left out"
            assert each["reason"].startswith(LEFT_OUT[name])
            continue
        assert each["status"] == "ok"
        assert LAST[name] in [figure["figure"] for figure in each["figures"]]
    if "tests" in names:
        assert "left out for want of an NVIDIA GPU" in Path(found["tests"]["log"]).read_text()


def test_the_checks_fit_the_budget_by_their_own_estimates_and_so_do_the_long_recipes() -> None:
    short = [check for check in CHECKS if not check.name.startswith("recipe-")]
    assert CHECKS[: len(short)] == tuple(short)
    for checks in (short, CHECKS[len(short) :]):
        seconds = 0.0
        for alone, together in itertools.groupby(checks, key=lambda check: not check.shared):
            each = [check.seconds for check in together]
            seconds += sum(each) if alone else max(each)
        assert seconds <= BUDGET


def test_a_gpu_too_small_is_told_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 24e9
    monkeypatch.setattr(device, "free_bytes", lambda: free)
    job = Job("8 layers of Qwen3-8B", QWEN3_8B_CUT)
    with pytest.raises(LeftOut) as left_out:
        device.need_memory(job.planned_bytes, job.largest_fitting(free))
    words = str(left_out.value)
    found = re.fullmatch(
        r"needs 6\d\.\d GB, this has 24\.0 free; the largest cut that fits: (\d) of 8 layers, "
        r"16,384 tokens a micro-batch",
        words,
    )
    assert found, words
    cuts = [replace(job, arch=replace(job.arch, num_layers=int(found[1]) + more)) for more in (0, 1)]
    fits = [cut.planned_bytes <= free for cut in cuts]
    assert fits == [True, False]
    assert re.search(r"1 of 8 layers, [248],\d{3} tokens", job.largest_fitting(22e9))
    assert job.largest_fitting(8e9) == "no cut of it fits"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [QWEN3_8B_CUT, EXPERTS_CUT], ids=["dense", "experts"])
def test_a_model_is_gone_when_its_steps_are(arch: Architecture) -> None:
    """What one kind of step leaves behind would be counted in the memory of the next."""
    with training(Job("toy", arch).toy()) as steps:
        steps.step()
        weights = [weakref.ref(each) for chunk in steps.optimization.chunks for each in chunk.parameters()]
    del steps
    gc.collect()
    assert weights
    assert not [each for each in weights if each() is not None]


def test_a_torch_that_cannot_use_the_gpu_says_so_itself(tmp_path: Path) -> None:
    """This one was built without CUDA; a driver that is too old is said in the same way."""
    with pytest.raises(CheckFailed, match=r"torch \S+ cannot use the GPU: Torch not compiled with CUDA"):
        device.open_device(Part(toy=False, scratch=tmp_path, told=tmp_path / "told"))


@pytest.mark.slow
def test_gpu_tests_need_no_more_than_pytest() -> None:
    """A GPU machine's Python may have neither hypothesis nor any plugin of pytest."""
    code = (
        "import sys; sys.modules['hypothesis'] = None; import pytest; "
        "sys.exit(pytest.main(['tests/gpu', '--device', 'cpu', '--collect-only', '-p', 'no:cacheprovider']))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_without_a_version_of_its_own_has_that_of_its_metadata(tmp_path: Path) -> None:
    """As transformer_engine.pytorch, and here a part of numpy."""
    part = Part(toy=True, scratch=tmp_path, told=tmp_path / "told")
    machine._importing(part, "numpy", "numpy.linalg")()
    assert json.loads((tmp_path / "told").read_text()) == {"figure": "numpy", "version": version("numpy")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("_statistics", "log-probs"),
        ("triton_poi_fused_mul_silu_0", "SwiGLU"),
        ("void transformer_engine::multi_tensor_adam::kernel<float>", "optimizer"),
        ("void transformer_engine::cast_transpose_kernel", "FP8 casts"),
        ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >",
            "the rest",
        ),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kernel_class(name) == kind


def test_a_trace_is_read_by_kernel(tmp_path: Path) -> None:
    events = [
        {"cat": "kernel", "name": "a", "dur": 1500},
        {"cat": "kernel", "name": "a", "dur": 500},
        {"cat": "gpu_memcpy", "name": "b", "dur": 100},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9},
        {"cat": "kernel", "name": "an instant"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = read_kernels(tmp_path / "trace.json", ("kernel", "gpu_memcpy"))
    assert found == {"a": [1.5, 0.5], "b": [0.1]}
