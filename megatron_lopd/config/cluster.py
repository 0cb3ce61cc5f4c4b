"""What a SLURM cluster is to the launcher: every key of a cluster file, its unit and its default."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config.keys import Count, CountOrZero, FilePath, key, require
from megatron_lopd.registry import LAUNCHERS


@dataclass(frozen=True)
class StageResources:
    nodes: Count = key("nodes: workers of a stage that samples, scores or evaluates; else one job's nodes", 1)
    minutes: Count = key("time limit of one attempt, minutes", 240)
    partition: str | None = key("partition of this stage; empty: the cluster's", None)


@dataclass(frozen=True)
class Stages:
    generate: StageResources = key("1. the teacher answers", factory=StageResources)
    tokenize: StageResources = key("1. instead: text from a file", factory=StageResources)
    sft: StageResources = key("2. fine-tuning", factory=StageResources)
    rollout: StageResources = key("3. the student answers", factory=StageResources)
    score: StageResources = key("4. the teacher scores", factory=StageResources)
    train: StageResources = key("5. training", factory=StageResources)
    refresh: StageResources = key("5. between two rounds of train", factory=StageResources)
    export: StageResources = key("6. the checkpoint for others", factory=StageResources)
    evaluate: StageResources = key("7. accuracy", factory=StageResources)
    report: StageResources = key("8. figures", factory=StageResources)

    def __post_init__(self) -> None:
        for name in ("tokenize", "refresh", "export", "report"):
            nodes = getattr(self, name).nodes
            require(nodes == 1, f"stages.{name}.nodes={nodes}: {name} is one task: leave it at 1")


@dataclass(frozen=True)
class ContainerConfig:
    """A container started by pyxis and enroot."""

    image: FilePath = key("squashfs file (a path) or image reference (registry#name:tag)")
    mounts: tuple[FilePath, ...] = key("source:target[:flags] each; run_dir must be among them", ())
    workdir: str | None = key("directory in the container; empty: the one submit was run in", None)
    writable: bool = key("let the container's own files be written", False)


@dataclass(frozen=True)
class Cluster:
    """A SLURM cluster: whom to ask for nodes, what a node has, and how a job finds its Python."""

    launcher: str = key("what queues the jobs", "slurm", door=LAUNCHERS)
    allow_user_code: bool = key("import a launcher of yours, which launcher names as module:name", False)
    partition: str | None = key("partition; empty: the cluster's default", None)
    account: str | None = key("account to charge", None)
    qos: str | None = key("quality of service", None)
    gpus_per_node: CountOrZero = key(
        "GPUs of a node, a rank of training each; 0: parallel.processes ranks, on CPUs", 8
    )
    cpus_per_node: Count = key("CPUs asked for on each node", 1)
    memory: str | None = key("memory asked for on each node, as --mem takes it (0: all of it)", None)
    stages: Stages = key("nodes and time of each stage", factory=Stages)
    container: ContainerConfig | None = key("a container (pyxis); empty: the node's own files", None)
    setup: tuple[str, ...] = key("shell lines before lopd in every task, such as activating a venv", ())
    env: tuple[str, ...] = key(
        "environment of every task, NAME=value each; NAME alone: what submit has it set to, which is written "
        "into no file",
        (),
    )
    sbatch: tuple[str, ...] = key("further options of sbatch, such as --exclusive", ())
    signal_seconds: Count = key(
        "seconds before the time limit at which a stage is asked to save and stop", 120
    )
    max_requeues: CountOrZero = key(
        "times a job may be queued again after a stop, a crash or a lost node", 20
    )

    def __post_init__(self) -> None:
        for text in self.env:
            name, equals, _ = text.partition("=")
            shown = f"{name}=..." if equals else text  # its value may be a secret
            require(
                name.isidentifier() and name.isascii(),
                f"env: {shown!r}: write it as NAME=value, or NAME for what submit has it set to",
            )
            require("\0" not in text, f"env: {shown!r} has a zero byte, which no environment holds: drop it")
        for text in self.sbatch:
            require(text.startswith("-"), f"sbatch: {text!r} is no option: write it as --name=value")
