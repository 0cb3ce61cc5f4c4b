#!/usr/bin/env python3
"""Run a recipe on a cluster: one job a stage, each behind the one before."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from megatron_lopd.config import load_cluster, load_recipe
    from megatron_lopd.errors import LopdError
    from megatron_lopd.registry import LAUNCHERS
    from megatron_lopd.runtime.display import say
except ModuleNotFoundError as error:
    print(f"submit: {error}: run it in the environment that megatron-lopd is installed in", file=sys.stderr)
    sys.exit(2)


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
            say(line)
    except LopdError as error:
        say(f"submit: {error}", error=True)
        return error.exit_code
    return 0


def _submit(options: argparse.Namespace) -> list[str]:
    recipe = load_recipe(options.recipe, options.overrides)
    cluster = load_cluster(options.cluster)
    # These import torch, which takes seconds: a misspelt key need not wait for it.
    from megatron_lopd.launchers import Submission
    from megatron_lopd.launchers.checks import check_cluster, check_recipe
    from megatron_lopd.launchers.jobs import jobs_of

    launcher = LAUNCHERS[cluster.launcher]()
    submission = Submission(
        launcher=launcher.name,
        run_dir=Path(os.path.abspath(recipe.run_dir)),
        work_dir=Path.cwd(),
        recipe=Path(os.path.abspath(options.recipe)),
        overrides=options.overrides,
        is_from_root=os.path.isabs(recipe.run_dir),
    )
    jobs = jobs_of(recipe, cluster)
    if not jobs:
        return [f"nothing to do: every stage in {submission.run_dir} is committed"]
    if options.dry_run:
        scripts = launcher.scripts(jobs, cluster, submission)
        return [line for name, text in scripts.items() for line in (f"# {name}", *text.split("\n"))]
    check_cluster(cluster, submission, recipe)
    launcher.check(jobs, cluster, submission)
    notes = check_recipe(jobs, recipe)
    return [*notes, *launcher.submit(jobs, cluster, submission)]


if __name__ == "__main__":
    sys.exit(main())
