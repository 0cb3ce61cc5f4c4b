#!/usr/bin/env python3
"""Run a recipe on a SLURM cluster: one job a stage, each behind the one before."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_lopd.config import load_cluster, load_recipe
from megatron_lopd.errors import ConfigError, LopdError

LIBRARY = Path(__file__).resolve().parent / "lib.sh"


def main() -> int:
    """Submit, or print the scripts; returns the process exit code (0, 1 or 2, as lopd's)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML recipe of the whole run")
    parser.add_argument("cluster", help="YAML cluster file: see launcher/clusters/example.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, check and submit nothing")
    options = parser.parse_intermixed_args()
    try:
        for line in _submit(options):
            print(line)
    except LopdError as error:
        print(f"submit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _submit(options: argparse.Namespace) -> list[str]:
    recipe = load_recipe(options.recipe, options.overrides)
    cluster = load_cluster(options.cluster)
    # These import torch, which takes seconds: a misspelt key need not wait for it.
    from megatron_lopd.slurm.jobs import jobs_of
    from megatron_lopd.slurm.queue import check, submit
    from megatron_lopd.slurm.script import Submission, render

    submission = Submission(
        run_dir=Path(os.path.abspath(recipe.run_dir)),
        work_dir=Path.cwd(),
        recipe=Path(os.path.abspath(options.recipe)),
        overrides=options.overrides,
    )
    if cluster.container and cluster.container.workdir and not os.path.isabs(recipe.run_dir):
        raise ConfigError(
            f"container.workdir={cluster.container.workdir} would move run_dir={recipe.run_dir}: give "
            "run_dir from the root, or leave workdir empty"
        )
    jobs = jobs_of(recipe, cluster)
    if not jobs:
        return [f"nothing to do: every stage in {submission.run_dir} is committed"]
    if options.dry_run:
        return [f"# {job.name}.sbatch\n{render(job, submission, cluster)}" for job in jobs]
    notes = check(jobs, recipe, cluster, submission)
    return [*notes, *submit(jobs, cluster, submission, LIBRARY)]


if __name__ == "__main__":
    sys.exit(main())
