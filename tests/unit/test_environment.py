"""The environment that ranks, engines and nameless users start with: in real processes, as they see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_lopd.cli import main
from megatron_lopd.commands import run
from megatron_lopd.config import EngineConfig, ParallelConfig
from megatron_lopd.engines.process import EngineProcess
from megatron_lopd.errors import ConfigError
from megatron_lopd.runtime import environment
from megatron_lopd.runtime.launch import in_own_process, launch
from tests.model_zoo import make_model_dir
from tests.pipeline import write_recipe

REPOSITORY = Path(__file__).parents[2]
TP = ParallelConfig(tensor=2, processes=2)
CP = ParallelConfig(context=2, processes=2)
# Writes the environment as it is when torch is imported, which is before CUDA can have started. The rank ends
# there, once the other has come to it.
AT_TORCH = """
import importlib.abc, json, os, sys, time
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch" and "RANK" in os.environ:
            seen = [f"{os.environ['SEEN']}/{rank}.json" for rank in range(2)]
            mine = seen[int(os.environ["RANK"])]
            with open(f"{mine}.part", "w") as file:
                json.dump(dict(os.environ), file)
            os.rename(f"{mine}.part", mine)
            while not all(map(os.path.exists, seen)):
                time.sleep(0.01)
            os._exit(1)
sys.meta_path.insert(0, Finder())
"""
NAMELESS = 54321


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the variables that are decided here."""
    for name in (
        "PYTORCH_ALLOC_CONF",
        environment.OLD_ALLOCATOR,
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("parallel", "capability", "before", "connections"),
    [
        (ParallelConfig(), 9.0, {}, None),
        (TP, 9.0, {}, "1"),
        (CP, 8.0, {}, "1"),
        (TP, 0.0, {}, "1"),  # nobody knows
        (TP, 10.0, {}, None),
        (TP, 9.0, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, "32"),
    ],
)
def test_a_trainer_overlaps_and_leaves_no_holes_unless_told_otherwise(
    bare: pytest.MonkeyPatch,
    parallel: ParallelConfig,
    capability: float,
    before: dict[str, str],
    connections: str | None,
) -> None:
    bare.setattr(environment, "_compute_capability", lambda: capability)
    for name, value in before.items():
        bare.setenv(name, value)
    environment.set_for_training(parallel)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_stays(bare: pytest.MonkeyPatch, name: str) -> None:
    bare.setenv(name, "max_split_size_mb:512")
    environment.set_for_training(ParallelConfig())
    assert os.environ[name] == "max_split_size_mb:512"
    assert len(os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}) == 1


@pytest.mark.slow
def test_ranks_started_here_have_it_before_torch(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.delenv("OMP_NUM_THREADS")
    arguments = seen_by_ranks(bare, tmp_path)
    assert launch(arguments, 2) == (1, False)
    for rank, seen in seen_in(tmp_path).items():
        assert seen["LOCAL_RANK"] == rank
        assert seen["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
        assert_trainer(seen)


@pytest.mark.slow
def test_torchruns_ranks_under_slurm_have_it_and_their_share_of_cores(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """launchers/lib.sh's task, as srun would start it on the only node."""
    bare.delenv("OMP_NUM_THREADS")
    arguments = seen_by_ranks(bare, tmp_path)
    bare.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in {
        "JOB_ID": "7",
        "NODEID": "0",
        "NNODES": "1",
        "STEP_NODELIST": "localhost",
        "CPUS_PER_TASK": "6",
    }.items():
        bare.setenv(f"SLURM_{name}", value)
    script = (
        f"directory={tmp_path} work_dir={tmp_path} ranks=2 arguments=({' '.join(arguments)}); "
        f"setup() {{ :; }}; source {REPOSITORY}/megatron_lopd/launchers/lib.sh; main task"
    )
    subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, timeout=120)
    for seen in seen_in(tmp_path).values():
        assert seen["OMP_NUM_THREADS"] == "3"
        assert_trainer(seen)


def seen_by_ranks(patch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """A command whose ranks write what they see, and end there."""
    write_recipe(root)
    (root / "at_torch").mkdir()
    (root / "at_torch" / "sitecustomize.py").write_text(AT_TORCH)
    patch.setenv("SEEN", str(root))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(root / "at_torch"), str(REPOSITORY)]))
    patch.chdir(root)
    return ["sft", "recipe.yaml", "parallel.tensor=2", "parallel.processes=2"]


def seen_in(root: Path) -> dict[str, dict[str, str]]:
    found = {path.stem: json.loads(path.read_text()) for path in root.glob("?.json")}
    assert sorted(found) == ["0", "1"]
    return found


def assert_trainer(seen: dict[str, str]) -> None:
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"),
    [
        ("0,1,2,3", "2", "2"),
        ("4, 6", "1", "6"),
        ("GPU-aa,GPU-bb", "1", "GPU-bb"),
        ("MIG-1,MIG-2", "0", "MIG-1"),
        ("5,-1,6", "1", ""),  # CUDA stops at the -1
        ("", "1", ""),
    ],
)
def test_the_engine_of_a_rank_sees_the_ranks_gpu(visible: str, local_rank: str, expected: str) -> None:
    rank = environment.for_rank(int(local_rank), 4, 1234, {"CUDA_VISIBLE_DEVICES": visible})
    assert environment.for_engine(rank)["CUDA_VISIBLE_DEVICES"] == expected


def test_the_engine_of_a_process_by_itself_sees_all_and_of_torchrun_nothing() -> None:
    alone = environment.for_rank(0, 1, 1234, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert environment.for_engine(alone)["CUDA_VISIBLE_DEVICES"] == "0,1"
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    others = {"TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": "3,5", "HOME": "/home/me"}
    assert environment.for_engine(torchrun | others) == {"CUDA_VISIBLE_DEVICES": "5", "HOME": "/home/me"}


@pytest.mark.slow
def test_a_real_engine_is_no_rank_and_has_no_trainers_settings(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = str(make_model_dir(tmp_path / "model"))
    rank = environment.for_rank(1, 2, 1234, {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"})
    settings = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for name, value in (rank | settings).items():
        bare.setenv(name, value)
    with EngineProcess("the teacher", EngineConfig(), model, threads=1) as teacher:
        teacher.ready()
        seen = environment_of(teacher.pid)
    assert seen["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
    assert not seen.keys() & {*environment.RANK_VARIABLES, *settings}


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def test_gpus_that_are_hidden_come_back(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    environment.hide_gpus()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], environment.hides_gpus()) == ("", True)
    assert environment.visible_gpus() == ["2", "3"]
    assert environment.for_rank(0, 1, 1234, os.environ)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert in_own_process(os.getenv, "CUDA_VISIBLE_DEVICES") == "2,3"
    environment.show_gpus()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], environment.hides_gpus()) == ("2,3", False)


@pytest.mark.parametrize(
    "asks",
    [
        ("precision=bf16", "fp8.recipe=tensorwise"),
        ("precision=bf16", "parallel.recompute=moe_act"),
        ("parallel.processes=2",),
    ],
)
def test_what_a_recipe_asks_of_a_gpu_is_asked_in_another_process(
    bare: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], asks: tuple[str, ...]
) -> None:
    """The run's own sees none; a name is a fake GPU, to be left alone."""

    def elsewhere(*unused: object) -> None:
        raise ConfigError(f"asked elsewhere, with {os.environ['CUDA_VISIBLE_DEVICES']!r} to see here")

    write_recipe(tmp_path)
    bare.chdir(tmp_path)
    bare.setenv("CUDA_VISIBLE_DEVICES", "GPU-fake")
    bare.setattr(run, "in_own_process", elsewhere)
    assert main(["run", "recipe.yaml", *asks]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "lopd run: asked elsewhere, with '' to see here"


@pytest.mark.slow
def test_a_uid_without_a_name_or_a_home_trains(tmp_path: Path) -> None:
    """Read access to this interpreter is all that it keeps of root's, where the tests are run by root."""
    write_recipe(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    other = os.getuid() == 0
    if other:
        for path in (tmp_path, *tmp_path.rglob("*")):
            if path != locked:
                os.chown(path, NAMELESS, NAMELESS)
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o777)
    scratch.chmod(0o777)
    for parent in tmp_path.parents[:3]:  # pytest's own, two or, with pytest-xdist, three, are for one user
        parent.chmod(parent.stat().st_mode | 0o055)
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS")}
    variables = {"HOME": str(locked), "TRITON_CACHE_DIR": str(locked / "triton"), "TMPDIR": str(scratch)}
    probe = (
        "import getpass, json, os, sys; from megatron_lopd.cli import main; "
        "code = main(sys.argv[1:]); "
        "import torch._inductor.runtime.cache_dir_utils as caches; "
        "print(json.dumps([code, getpass.getuser(), os.path.expanduser('~'), caches.cache_dir(), "
        "os.environ['TRITON_CACHE_DIR']]))"
    )
    arguments = ["run", "recipe.yaml", "prompts.eval=null", "train=null"]
    done = subprocess.run(
        [*(nameless() if other else []), sys.executable, "-c", probe, *arguments],
        cwd=tmp_path,
        env=kept | variables | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    code, name, home, inductor, triton = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    uid = NAMELESS if other else os.getuid()
    own = scratch / f"lopd-{uid}"
    assert (home, triton) == (str(own / "home"), str(own / "triton_cache_dir"))
    assert Path(inductor).is_relative_to(scratch)
    said = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert len(said) == 2
    assert said[0] == f"lopd: HOME: {locked} cannot be written: {own / 'home'} is used instead"
    assert own.stat().st_mode & 0o777 == 0o700
    if other:
        assert name == f"uid{NAMELESS}"


def nameless() -> list[str]:
    capabilities = "-all,+dac_read_search"
    return [
        "setpriv",
        f"--reuid={NAMELESS}",
        f"--regid={NAMELESS}",
        "--clear-groups",
        f"--inh-caps={capabilities}",
        f"--ambient-caps={capabilities}",
    ]


@pytest.mark.parametrize("in_the_way", ["file for the root", "link to nowhere", "file for the folder"])
def test_a_cache_finds_a_place_whatever_has_the_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_way: str
) -> None:
    """Anybody may make a file in the directory of temporary ones. The cache itself is a link to nowhere."""
    root, cache = tmp_path / f"lopd-{os.getuid()}", tmp_path / "cache"
    cache.symlink_to(tmp_path / "gone" / "cache")
    if in_the_way == "file for the root":
        root.touch()
    elif in_the_way == "link to nowhere":
        root.symlink_to(tmp_path / "gone" / "root")
    else:
        root.mkdir()
        (root / "triton_cache_dir").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    environment.make_writable()
    place = Path(os.environ["TRITON_CACHE_DIR"])
    assert place.is_dir()
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert place.parent.parent == tmp_path


def test_nowhere_to_write_a_temporary_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    assert main(["doctor"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "lopd doctor: No usable temporary directory found in ['/proc']: "
        "set TMPDIR to a directory that can be written"
    )


def test_the_image_gives_any_uid_a_place_to_write() -> None:
    """Of the text alone, for no image is built here: all is below the folder that anybody may write."""
    text = (REPOSITORY / "Dockerfile").read_text()
    (scratch,) = re.findall(r"install --directory --mode=1777 (\S+)", text)
    variables = dict(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=(\S+)", text, re.MULTILINE))
    for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert Path(variables[name]).is_relative_to(scratch), name
    assert variables["USER"]
    assert text.index("lopd doctor && find /scratch -mindepth 1 -delete") > text.index("USER ${LOPD_UID}")
