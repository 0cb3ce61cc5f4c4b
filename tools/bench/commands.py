"""CPU seconds of the commands that only ask, and of a run of which nothing is left to do.

    python -m tools.bench.commands [--rounds N] [--package DIR ...] [--run DIR RECIPE]

Without `--run` the recipe of tests/pipeline.py is run first, in a temporary directory. `--run . RECIPE` takes
a recipe whose run is finished, and the directory that its paths are relative to. `--package` names
checkouts of this project (this one alone, by default); they and the commands take turns. CPU seconds, user
and system, are the process's with all that it started, from os.times: medians of `--rounds` fresh processes
after one that warms the file cache. The last line is one JSON object, {checkout: {command: seconds}}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from megatron_lopd.config import load_recipe

HERE = Path(__file__).parents[2]


def main() -> None:
    """Measure, print a table, and the JSON object."""
    parser = argparse.ArgumentParser(description="CPU seconds of commands that only ask")
    parser.add_argument("--rounds", type=int, default=5, help="processes measured of each (count)")
    parser.add_argument("--package", type=Path, nargs="+", default=[HERE], help="checkouts, measured in turn")
    parser.add_argument(
        "--run", nargs=2, metavar=("DIR", "RECIPE"), help="a finished run: where, and of what"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root, recipe = arguments.run or (place, _make_run(Path(place), arguments.package[0]))
        figures = measure(Path(root), recipe, arguments.package, arguments.rounds)
    for package, seconds in figures.items():
        for command, value in seconds.items():
            print(f"{value:6.2f} s  {command:24} {package}")
    print(json.dumps(figures))


def measure(root: Path, recipe: str, packages: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """{checkout: {command: CPU seconds}}, medians."""
    run_dir = load_recipe(root / recipe).run_dir
    commands = {
        "--help": ["--help"],
        "a misspelt key": ["run", recipe, "train.stepz=3"],
        "status": ["status", recipe],
        "verify": ["verify", run_dir],
        "inspect an artifact": ["inspect", f"{run_dir}/export"],
        "inspect shards": ["inspect", f"{run_dir}/rollout"],
        "a run with nothing to do": ["run", recipe],
    }
    spent: dict[Path, dict[str, list[float]]] = {package: defaultdict(list) for package in packages}
    for number in range(rounds + 1):
        for name, command in commands.items():
            for package in packages:
                seconds = cpu_seconds(command, root, package, exit_code=2 if "misspelt" in name else 0)
                if number:  # the first filled the file cache
                    spent[package][name].append(seconds)
    return {
        str(package): {name: round(statistics.median(values), 2) for name, values in of_package.items()}
        for package, of_package in spent.items()
    }


def cpu_seconds(command: list[str], root: Path, package: Path, exit_code: int) -> float:
    """What `lopd *command` in `root` takes, by the code of a checkout. Exits where it ends otherwise."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lopd.cli", *command],
        cwd=root,
        env=_environment(package),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        text=True,
    )
    after = os.times()
    if done.returncode != exit_code:
        raise SystemExit(
            f"lopd {' '.join(command)}: exit code {done.returncode}, not {exit_code}: {done.stderr}"
        )
    return after.children_user + after.children_system - before.children_user - before.children_system


def _make_run(root: Path, package: Path) -> str:
    """A finished run of the tests' recipe below `root`; returns the recipe's name."""
    program = (
        "from pathlib import Path; from tests.pipeline import write_recipe; "
        "from megatron_lopd.cli import main; raise SystemExit(main(['run', write_recipe(Path('.')).name]))"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=_environment(package),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return "recipe.yaml"


def _environment(package: Path) -> dict[str, str]:
    """This one's, with compiled modules kept, as outside of an image that says not to."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    rest = kept.get("PYTHONPATH")
    return kept | {"PYTHONPATH": os.pathsep.join([str(package.resolve()), *([rest] if rest else [])])}


if __name__ == "__main__":
    main()
