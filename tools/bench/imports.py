"""How long a command's imports take: by package, in all, and in two processes that start at once.

    python tools/bench/imports.py [--rounds N] [--package DIR ...]

`--package` names checkouts of this project (this one alone, by default); they take turns, so that a change
can be measured against what was before it. Each figure is the median of `--rounds` fresh processes after one
that warms the file cache: wall clock seconds, and CPU seconds, which other work on the machine disturbs less.
What is imported is what a command imports before it does anything; `train`, all that a rank runs to its last
step. Seconds by package are Python's own (-X importtime), a module's without what it imports in turn. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

# What each command comes to, whichever modules it is divided into.
PROGRAMS = {
    "help": "from megatron_lopd.cli import _parser; _parser().format_help()",
    "status": "import megatron_lopd.cli, megatron_lopd.commands.status",
    "plan": "import megatron_lopd.cli, megatron_lopd.estimate.run_plan",
    "train": (
        "import megatron_lopd.cli, megatron_lopd.commands.run, megatron_lopd.stages.train, sys\n"
        "from megatron_lopd.families.architecture import read_architecture\n"
        "read_architecture(sys.argv[1])"
    ),
}
MODEL = Path(__file__).parent / "qwen3_0.6b"
LISTED = 12


def main() -> None:
    """Measure, print a table for each command, and the JSON object."""
    parser = argparse.ArgumentParser(description="seconds that a command's imports take")
    parser.add_argument("--rounds", type=int, default=5, help="processes measured of each (count)")
    here = Path(__file__).parents[2]
    parser.add_argument("--package", type=Path, nargs="+", default=[here], help="checkouts, measured in turn")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in PROGRAMS:
        figures[name] = measure(name, arguments.package, arguments.rounds)
        for package, values in figures[name].items():
            print(f"{name:8}" + "".join(f"{key} {value:<8}" for key, value in values.items()) + package)
    for package in arguments.package:
        print(f"\ntrain, seconds by package, {package}:")
        for module, microseconds in by_package("train", package).most_common(LISTED):
            print(f"  {microseconds / 1e6:7.2f}  {module}")
    print(json.dumps(figures))


def measure(name: str, packages: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """{checkout: {wall_s, cpu_s, two_at_once_s}}, medians; the checkouts take turns."""
    alone: dict[Path, list[tuple[float, float]]] = {package: [] for package in packages}
    pairs: dict[Path, list[float]] = {package: [] for package in packages}
    for number in range(rounds + 1):
        for package in packages:
            one, two = run(name, package, 1), run(name, package, 2)
            if number:  # the first filled the file cache
                alone[package].append(one)
                pairs[package].append(two[0])
    return {
        str(package): {
            "wall_s": round(statistics.median(wall for wall, _ in alone[package]), 2),
            "cpu_s": round(statistics.median(cpu for _, cpu in alone[package]), 2),
            "two_at_once_s": round(statistics.median(pairs[package]), 2),
        }
        for package in packages
    }


def run(name: str, package: Path, processes: int) -> tuple[float, float]:
    """(wall clock seconds until the last has ended, CPU seconds of all) of so many processes at once."""
    before, began = os.times(), time.perf_counter()
    started = [
        subprocess.Popen(_command(name), cwd=package, env=_environment(package)) for _ in range(processes)
    ]
    if any(process.wait() for process in started):
        raise SystemExit(f"imports.py: {name} of {package} failed: its own message is above")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def by_package(name: str, package: Path) -> Counter[str]:
    """Microseconds of the modules of each top-level package, torch's by one level more."""
    command = _command(name, "-X", "importtime")
    ended = subprocess.run(
        command, cwd=package, env=_environment(package), capture_output=True, text=True, check=True
    )
    microseconds: Counter[str] = Counter()
    for line in ended.stderr.splitlines():
        if line.startswith("import time:") and "cumulative" not in line:
            own, _, module = line.removeprefix("import time:").split("|")
            parts = module.strip().split(".")
            microseconds[".".join(parts[: 2 if parts[0] == "torch" else 1])] += int(own)
    return microseconds


def _command(name: str, *options: str) -> list[str]:
    return [sys.executable, "-W", "ignore", *options, "-c", PROGRAMS[name], str(MODEL)]


def _environment(package: Path) -> dict[str, str]:
    rest = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(package.resolve()), *([rest] if rest else [])])}


if __name__ == "__main__":
    main()
