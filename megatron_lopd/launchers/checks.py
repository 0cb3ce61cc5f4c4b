"""What can be found wrong with a recipe and a cluster file before anything is in the queue."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_lopd.artifacts.digest_cache import relying_on_hints
from megatron_lopd.commands.run import check_run_dir
from megatron_lopd.config import Cluster, Recipe
from megatron_lopd.config.hints import hints_of, is_path
from megatron_lopd.errors import ConfigError, EngineError, NotInstalled
from megatron_lopd.launchers.launcher import Job, Submission
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.stages.table import STAGES

Section = TypeVar("Section")


def check_cluster(cluster: Cluster, submission: Submission, recipe: Recipe) -> None:
    """Raise ConfigError for what no cluster could be, or where the run would not be seen in its container."""
    if 1 <= cluster.cpus_per_node < cluster.gpus_per_node:
        raise ConfigError(
            f"cpus_per_node={cluster.cpus_per_node} for gpus_per_node={cluster.gpus_per_node}: each GPU's "
            "process needs cores of its own: set it to the cores of a node (sinfo --format='%P %c')"
        )
    for text in cluster.env:
        if "=" not in text and text not in os.environ:
            raise ConfigError(
                f"env: {text} is not set here: set it before you submit, or write it as {text}=value"
            )
    container = cluster.container
    if container is None:
        return
    if container.workdir and not submission.is_from_root:
        raise ConfigError(
            f"container.workdir={container.workdir} would move run_dir: give run_dir from the root, or leave "
            "workdir empty"
        )
    mounted = [_same_path(mount) for mount in container.mounts]
    places = {"run_dir": submission.run_dir, "the recipe": submission.recipe}
    if not container.workdir:
        places["the directory of this command"] = submission.work_dir
    places |= {name: Path(os.path.abspath(submission.work_dir / path)) for name, path in _inputs(recipe)}
    for what, path in places.items():
        # What is in the home directory is mounted where enroot is set up so.
        seen = (*filter(None, mounted), Path.home())
        if not any(path.is_relative_to(place) for place in seen):
            raise ConfigError(
                f"container.mounts: {what} is {path}, which the container does not see under that path: add "
                f"{path.parent}:{path.parent}"
            )


def _inputs(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, path) of what a recipe reads; an engine's interpreter is of the container's own."""
    kind: type = type(section)
    hints = hints_of(kind)
    for item in dataclasses.fields(section):
        value, name = getattr(section, item.name), f"{prefix}{item.name}"
        if name == "run_dir" or "options_of" in item.metadata:
            continue
        if isinstance(value, str) and is_path(hints[item.name]):
            yield name, value
        for key, part in (value if isinstance(value, dict) else {"": value}).items():
            if dataclasses.is_dataclass(part):
                yield from _inputs(part, f"{name}." if key in ("", item.name) else f"{name}.{key}.")


def _same_path(mount: str) -> Path | None:
    """What a mount shows under the path that it has outside too; None where that differs."""
    source, colon, rest = mount.partition(":")
    target = rest.partition(":")[0]
    if not (colon and source.startswith("/") and target.startswith("/")):
        raise ConfigError(
            f"container.mounts: {mount!r}: write it as /source:/target, with paths from the root"
        )
    if not Path(source).exists():
        raise ConfigError(f"container.mounts: {source} is not there: correct the path, or drop the mount")
    return Path(source) if Path(source) == Path(target) else None


@relying_on_hints()
def check_recipe(jobs: Sequence[Job], recipe: Recipe) -> list[str]:
    """Each stage's own check, but for what a login node, outside any container, cannot have.

    Returns a line for each that could not be made. Raises as the checks do.
    """
    run = ResolvedRun(without_fp8(recipe))
    check_run_dir(run)
    commands, unchecked = {job.command for job in jobs}, []
    for stage in STAGES:
        if stage.name in commands:
            try:
                stage.check(run)
            except (EngineError, NotInstalled) as error:
                unchecked.append(f"{stage.name}: not checked here, the nodes will: {error}")
    return unchecked


def without_fp8(section: Section) -> Section:
    """The same without FP8 layers anywhere in it, which ask for a GPU that can do them."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        if item.name == "fp8":
            changes[item.name] = None
        elif dataclasses.is_dataclass(value):
            changes[item.name] = without_fp8(value)
    return dataclasses.replace(section, **changes)  # type: ignore[type-var]
