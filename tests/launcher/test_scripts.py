"""The launcher's scripts, held still by golden files, and what a cluster file gets wrong.

`python tests/launcher/test_scripts.py` writes the golden files anew: read the difference.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lopd.config import load_cluster, load_recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.launchers import Job, Slurm, Submission, slurm
from megatron_lopd.launchers.checks import check_cluster, check_recipe
from megatron_lopd.launchers.jobs import jobs_of
from megatron_lopd.launchers.slurm import _gpus
from tests.pipeline import write_recipe

REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = REPOSITORY / "launcher/clusters/example.yaml"
BARE: dict[str, Any] = {"gpus_per_node": 8, "setup": ["source /shared/venv/bin/activate"]}
RECIPE: dict[str, Any] = {
    "run_dir": "/shared/runs/a run",
    "teacher": {"model": "/shared/teacher"},
    "student": {"model": "/shared/student"},
    "prompts": {name: {"path": f"/shared/{name}.jsonl"} for name in ("sft", "opd", "eval")},
    "sft": {"steps": 20},
    "train": {"steps": 30},
    "evaluate": {"grader": "math"},
}
REFRESHED = RECIPE | {"train": {"steps": 30, "refresh_every": 10}}


def plan(root: Path, recipe: dict[str, Any], cluster: dict[str, Any] | Path) -> tuple[list[Job], str]:
    """The jobs, and their scripts in one text."""
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    if isinstance(cluster, dict):
        (root / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        cluster = root / "cluster.yaml"
    settings = load_cluster(cluster)
    jobs = jobs_of(load_recipe(path), settings)
    where = Submission(
        "slurm", Path(recipe["run_dir"]), Path("/shared/work"), Path("/shared/r.yaml"), ["train.seed=a b"]
    )
    scripts = Slurm().scripts(jobs, settings, where)
    return jobs, "\n".join(f"# {name}\n{text}" for name, text in scripts.items())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | Path]] = {
    "one_node_bare": (RECIPE, BARE),
    "four_nodes_container": (RECIPE, EXAMPLE),
    "refresh": (REFRESHED, BARE),
}


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_what_they_were(name: str, tmp_path: Path) -> None:
    assert plan(tmp_path, *CASES[name])[1] == (GOLDEN / f"{name}.sbatch").read_text()


def test_train_alternates_with_refresh_until_its_last_round(tmp_path: Path) -> None:
    names = [job.name for job in plan(tmp_path, REFRESHED, BARE)[0]]
    rounds = ["train", "refresh-1", "train-1", "refresh-2", "train-2"]
    assert names == ["generate", "sft", "rollout", "score", *rounds, "export", "evaluate", "report"]


def test_stages_not_needed_are_left_out(tmp_path: Path) -> None:
    bare = {name: value for name, value in RECIPE.items() if name != "train"}
    assert "train" not in [job.name for job in plan(tmp_path, bare, BARE)[0]]


def test_a_job_has_gpus_where_its_stage_uses_one(tmp_path: Path) -> None:
    """Calibration for FP8 runs the student, which a plain export does not."""
    without = {job.name for job in plan(tmp_path, RECIPE, BARE)[0] if not job.gpus}
    assert without == {"export", "report"}
    quantized = RECIPE | {"export": {"quantization": "fp8"}}
    assert {job.name: job.gpus for job in plan(tmp_path, quantized, BARE)[0]}["export"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partitoin": "x"}, "unknown key partitoin: did you mean partition"),
        ({"stages": {"sft": {"node": 2}}}, "unknown key stages.sft.node: did you mean stages.sft.nodes"),
        ({"stages": {"export": {"nodes": 2}}}, "stages.export.nodes=2: export is one task"),
        ({"setup": "module load x"}, "setup: expected list of str, got 'module load x'"),
        ({"env": ["A B"]}, "write it as NAME=value"),
        ({"sbatch": ["exclusive"]}, "is no option"),
        ({"gpus_per_node": 3}, "makes 3 ranks, not a multiple of 2"),
    ],
)
def test_what_a_cluster_file_gets_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, RECIPE | {"parallel": {"tensor": 2, "processes": 2}}, BARE | changes)


def test_all_that_a_recipe_reads_is_to_be_seen_in_the_container(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    where = Submission("slurm", tmp_path / "a/run", tmp_path / "a", tmp_path / "a/recipe.yaml", [])
    mount = f"{tmp_path}/a:{tmp_path}/a"
    (tmp_path / "cluster.yaml").write_text(
        yaml.safe_dump(BARE | {"cpus_per_node": 16, "container": {"image": "r#i", "mounts": [mount]}})
    )
    cluster = load_cluster(tmp_path / "cluster.yaml")
    inside = RECIPE | {"teacher": {"model": "t"}, "student": {"model": "s"}}
    inside |= {"prompts": {name: {"path": f"{name}.jsonl"} for name in ("sft", "opd", "eval")}}
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "teacher.model": {"teacher": {"model": "/else/where"}},
        "prompts.eval.path": {"prompts": inside["prompts"] | {"eval": {"path": "../eval.jsonl"}}},
        "sft.data": {"sft": {"steps": 3, "data": "/else/where.jsonl"}},
        "train.checkpoint": {"train": {"steps": 3, "checkpoint": "/else/where"}},
    }
    for key, change in changes.items():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(inside | change))
        recipe = load_recipe(tmp_path / "recipe.yaml")
        if not key:
            check_cluster(cluster, where, recipe)
            continue
        with pytest.raises(
            ConfigError, match=rf"container\.mounts: {key} is .*, which the container does not"
        ):
            check_cluster(cluster, where, recipe)


def test_secrets_are_in_no_file_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor in any, where the cluster file names them alone: the job takes them from where it was submitted."""
    monkeypatch.setattr(slurm, "_ask", lambda *command: "17")
    umask = os.umask(0o022)
    try:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(BARE | {"env": ["TOKEN=hush 'x'", "BY_NAME"]}))
        cluster = load_cluster(tmp_path / "cluster.yaml")
        where = Submission("slurm", tmp_path / "run", tmp_path, tmp_path / "recipe.yaml", [])
        job = Job("sft", "sft", 1, 0, 1, 0, 5, None)
        (tmp_path / "run/slurm").mkdir(parents=True)
        (tmp_path / "run/slurm/sft.sbatch").write_text("of a submission before")  # as everybody may read
        Slurm().submit([job], cluster, where)
    finally:
        os.umask(umask)
    script = tmp_path / "run/slurm/sft.sbatch"
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    text = script.read_text()
    setup = text[text.index("setup() {") : text.index("}\n", text.index("    :")) + 2]

    def told(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        lines = setup.replace("source /shared/venv/bin/activate", "true")
        return subprocess.run(
            ["bash", "-c", f'{lines}\nsetup && printf "%s %s" "$TOKEN" "$BY_NAME"'],
            env={"PATH": os.environ["PATH"]} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    assert told({"BY_NAME": "kept $HOME"}).stdout == "hush 'x' kept $HOME"
    assert "BY_NAME: did not come along" in told({}).stderr


@pytest.mark.parametrize("value", ["A B=hush", "=hush", "A-B=hush", "A=hush\0x"])
def test_a_value_that_may_be_a_secret_is_in_no_message(tmp_path: Path, value: str) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(BARE | {"env": [value]}))
    with pytest.raises(ConfigError, match="env: ") as caught:
        load_cluster(tmp_path / "cluster.yaml")
    assert "hush" not in str(caught.value)


JOB = """
source "$1"
stage=sft directory=$2 max_requeues=0 srun_options=()
srun() { check_node; echo said; }
main
"""


@pytest.mark.parametrize(
    "plant", [lambda path, other: path.symlink_to(other), lambda path, _: os.mkfifo(path)]
)
def test_a_job_writes_through_nothing_that_is_planted(tmp_path: Path, plant: Callable[..., None]) -> None:
    directory, other = tmp_path / "slurm", tmp_path / "other"
    (directory / "logs").mkdir(parents=True)
    other.write_text("another's")
    log = directory / "logs/sft-7-attempt0.log"
    for path in (log, directory / ".clock-7-0"):
        plant(path, other)
    numbers = {"JOB_ID": "7", "NODEID": "0", "JOB_NODELIST": "n", "JOB_NUM_NODES": "1", "CPUS_PER_TASK": "1"}
    subprocess.run(
        ["bash", "-c", f"umask 027\n{JOB}", "job", slurm.LIBRARY, directory],
        env=os.environ | {f"SLURM_{name}": value for name, value in numbers.items()},
        check=True,
        timeout=30,
    )
    assert other.read_text() == "another's"
    assert stat.S_IMODE(log.lstat().st_mode) == 0o640
    assert log.read_text().splitlines()[-2:] == ["said", "lopd launcher: sft is done"]
    assert {path.name for path in directory.rglob("*")} == {"logs", log.name, ".clock-7-0"}


def test_a_run_may_be_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert slurm._ask("printf", "lopd caf\\351") == f"lopd {name}"  # of the jobs in the queue
    monkeypatch.setattr(slurm, "_sbatch", lambda job, *arguments: "7")
    jobs, _ = plan(tmp_path, RECIPE, BARE)
    where = Submission("slurm", tmp_path / name, tmp_path, tmp_path / "recipe.yaml", [])
    Slurm().submit(jobs, load_cluster(tmp_path / "cluster.yaml"), where)
    (script,) = where.directory.glob("sft.sbatch")
    assert os.fsencode(where.directory) in script.read_bytes()


def test_workers_that_a_node_has_no_gpus_for(tmp_path: Path) -> None:
    greedy = {"rollout": {"engine": {"name": "vllm", "vllm": {"tensor": 4}, "workers": 4}}}
    with pytest.raises(ConfigError, match=r"rollout\.engine: .* takes 16 GPUs, and gpus_per_node is 8"):
        plan(tmp_path, RECIPE | greedy, BARE)


def test_what_only_the_nodes_have_is_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's interpreter is not on the login node; a wrong setting is wrong anywhere."""
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    inside = ["rollout.engine.name=vllm", "rollout.engine.vllm.python=/inside/python"]
    (note,) = checked(inside)
    assert note.startswith("rollout: not checked here, the nodes will: rollout.engine.vllm.python: /in")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        checked([*inside, "rollout.sampling.max_new_tokens=640"])


def test_fp8_layers_are_looked_for_on_the_nodes_wherever_the_recipe_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine, as a login node, has no GPU that can do them."""
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    fp8 = "{name: megatron, dtype: bf16, fp8: {recipe: tensorwise}}"
    assert checked([f"score.engine={fp8}"]) == []
    assert checked(["score.engine.name=transformers", f"score.agreement={{engine: {fp8}}}"]) == []
    assert checked(["precision=bf16", "fp8={recipe: tensorwise}"]) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpus_per_node": 8, "cpus_per_node": 4}, "cpus_per_node=4 for gpus_per_node=8"),
        ({"mounts": ["/nowhere:/nowhere"]}, "/nowhere is not there"),
        ({"mounts": ["/"]}, "write it as /source:/target"),
        ({"mounts": ["data:/data"]}, "write it as /source:/target"),
        ({"mounts": ["/etc:/etc"]}, r"run_dir is /a/run, which the container does not see .* add /a:/a"),
        ({"mounts": ["/:/host"]}, "run_dir is /a/run, which the container does not see under that path"),
        ({"mounts": ["/:/"]}, ""),
        ({"mounts": ["/work:/a"]}, "run_dir is /a/run, which the container does not see under that path"),
        ({"env": ["NOT_SET_HERE"]}, "env: NOT_SET_HERE is not set here"),
        ({"mounts": ["/:/"], "workdir": "/elsewhere"}, "would move run_dir"),
    ],
)
def test_a_cluster_that_cannot_be(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    outside = [key for key in keys if key.endswith("_node") or key == "env"]
    plain = {"cpus_per_node": 16} | {key: keys[key] for key in outside}
    container = {key: keys[key] for key in keys if key not in outside}
    image = {"container": {"image": "registry#image", **container}} if container else {}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(BARE | plain | image))
    cluster = load_cluster(tmp_path / "cluster.yaml")
    where = Submission("slurm", Path("/a/run"), Path("/a"), Path("/a/recipe.yaml"), [], is_from_root=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    if not message:
        check_cluster(cluster, where, recipe)
        return
    with pytest.raises(ConfigError, match=message):
        check_cluster(cluster, where, recipe)


def checked(overrides: list[str]) -> list[str]:
    Path("cluster.yaml").write_text(yaml.safe_dump(BARE | {"gpus_per_node": 0}))
    recipe = load_recipe("recipe.yaml", overrides)
    return check_recipe(jobs_of(recipe, load_cluster("cluster.yaml")), recipe)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:8(S:0-1)", 8), ("gpu:h100:4(S:0),nvme:1", 4), ("gpu:a:1,gpu:b:2", 3)],
)
def test_gpus_that_sinfo_tells_of(gres: str, count: int) -> None:
    assert _gpus(gres) == count


if __name__ == "__main__":
    import tempfile

    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"{case}.sbatch").write_text(plan(Path(scratch), *CASES[case])[1])
