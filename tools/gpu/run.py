"""Runs the checks of registry.py, each in a process of its own. Standard library alone; check.sh starts it.

Nothing that a check does ends the others, or this: an import that fails, a crash, a hang, a kill -9, floods
of output, a child that would outlive it. DIR/results.jsonl has a line for each check as soon as it has
ended, DIR/figures what it has told by then, DIR/logs what it printed, DIR/table.txt all of it for a person.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tools.gpu.processes import Running
from tools.gpu.registry import CHECKS, Check
from tools.gpu.results import BAD, Ending, Results, table

ROOT = Path(__file__).parents[2]
BUDGET = 570.0  # seconds
POLL_SECONDS = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NEEDED = ("torch",)  # all else that is missing costs the checks that need it
NEEDED_FOR_TOYS = ("torch", "triton", "pytest")  # of the tests' environment: on a CPU no torch brings triton
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "vllm", "flash-attn")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"check.sh: {message}\n")


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Run them; 0 if none failed, 1 if one did or none ran, 2 for usage."""
    options = _parse(arguments, checks)
    out = options.out.absolute()
    if (out / "results.jsonl").exists():
        print(f"check.sh: {out} has the results of another run: name another folder", file=sys.stderr)
        return 2
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = Results(out / "results.jsonl")
    except OSError as error:
        print(f"check.sh: --out {out} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    machine = describe_machine(options.toy)
    results.add({"machine": machine})
    chosen = [check for check in checks if not options.only or check.name in options.only]
    run = _Run(options.toy, options.budget, out, results)
    endings = run.all(chosen)
    text = table(machine, endings)
    print(f"\n{text}\nresults, logs and this table: {out}", flush=True)
    try:
        (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # a full disk: it has been printed
        print(f"check.sh: {out}/table.txt cannot be written ({error.strerror})", file=sys.stderr)
    statuses = {ending.status for ending in endings}
    return int(bool(run.stopped_by) or "ok" not in statuses or not statuses.isdisjoint(BAD))


def _parse(arguments: Sequence[str] | None, checks: Sequence[Check]) -> argparse.Namespace:
    parser = _Parser(
        prog="check.sh",
        description="whether this machine's GPU gives the right numbers, and how fast",
        epilog="checks:\n" + "\n".join(f"  {check.name:<14}{check.about}" for check in checks),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--toy", action="store_true", help="on a CPU, at sizes that measure nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these checks alone")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help=f"seconds in all ({BUDGET:.0f}); what does not fit is left out",
    )
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    default = ROOT / "runs" / f"gpu-check-{stamp}"
    parser.add_argument(
        "--out", type=Path, default=default, metavar="DIR", help="where results go (runs/gpu-check-TIME)"
    )
    options = parser.parse_args(arguments)
    known = [check.name for check in checks]
    unknown = [name for name in options.only if name not in known]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: there are {', '.join(known)}")
    if not options.budget > 0:
        parser.error("--budget must be above 0 seconds")
    if not options.toy and not has_gpu():
        parser.error("no NVIDIA GPU is visible here: --toy runs the same checks at toy sizes on a CPU")
    missing = [name for name in (NEEDED_FOR_TOYS if options.toy else NEEDED) if find_spec(name) is None]
    if missing:
        remedy = "`make .venv/.dev` makes one that has" if options.toy else "name one that has with PYTHON"
        parser.error(f"{sys.executable} has no {', no '.join(missing)}: {remedy}")
    return options


def has_gpu() -> bool:
    """Whether the driver shows a GPU. torch is not asked: if it cannot use it, the checks say so."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or "GPU" in _output("nvidia-smi", "-L")


def describe_machine(toy: bool) -> dict[str, str]:
    """What a figure is worth nothing without."""
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = "none used (--toy)" if toy else "; ".join(_output("nvidia-smi", *query).splitlines())
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": gpus or "nvidia-smi says nothing",
        "host": f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "commit": commit or "not a git checkout",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _output(*command: str) -> str:
    """What a program prints; nothing where it is not, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


class _Run:
    """`stopped_by`: the signal that asked for an early end, if one did."""

    def __init__(self, toy: bool, budget: float, out: Path, results: Results) -> None:
        self._toy, self._out, self._results = toy, out, results
        self._end = time.monotonic() + budget
        self._scratch = out / "scratch"
        self._endings: list[Ending] = []
        self.stopped_by = ""

    def all(self, checks: Sequence[Check]) -> list[Ending]:
        """Run them in their order; a signal ends the running ones and leaves out the rest."""
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        waiting, running = list(checks), list[Running]()
        try:
            while (waiting or running) and not self.stopped_by:
                self._begin_what_can(waiting, running)
                time.sleep(POLL_SECONDS)
                for each in list(running):
                    if ending := each.poll():
                        running.remove(each)
                        self._add(ending)
            for each in running:
                self._add(each.end("killed", f"this run was stopped by {self.stopped_by}"))
            for check in waiting:
                self._add(Ending(check.name, "left out", 0.0, f"this run was stopped by {self.stopped_by}"))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            shutil.rmtree(self._scratch, ignore_errors=True)
        return self._endings

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name

    def _begin_what_can(self, waiting: list[Check], running: list[Running]) -> None:
        """The next check when none runs, and beside checks that share the GPU those that do too."""
        while waiting and (not running or (waiting[0].shared and all(each.check.shared for each in running))):
            check, left = waiting.pop(0), self._end - time.monotonic()
            if left < check.seconds:
                reason = f"budget: {left:.0f} s were left, and it takes about {check.seconds:.0f}"
                self._add(Ending(check.name, "left out", 0.0, reason))
                continue
            print(f"{check.name}: {check.about} ...", flush=True)
            scratch = self._scratch / check.name
            try:
                each = Running(check, self._out, scratch, self._environment(), self._toy, left)
            except OSError as error:  # a full disk, no more processes
                self._add(Ending(check.name, "failed", 0.0, f"it cannot be begun ({error})"))
                continue
            running.append(each)

    def _add(self, ending: Ending) -> None:
        self._endings.append(ending)
        self._results.add_ending(ending)
        shutil.rmtree(self._scratch / ending.name, ignore_errors=True)
        print(f"{ending.name}: {ending.status} after {ending.seconds:.1f} s {ending.reason}", flush=True)

    def _environment(self) -> dict[str, str]:
        """What the caller has set wins."""
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
        caches = {
            name: str(self._scratch / "caches" / folder)
            for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
        }
        defaults = {
            **caches,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_OFFLINE": "1",
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": "0",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        fixed: dict[str, Any] = {"PYTHONPATH": ":".join(os.path.abspath(path) for path in paths)}
        if self._toy:
            fixed["CUDA_VISIBLE_DEVICES"] = ""
            defaults["OMP_NUM_THREADS"] = "1"
        return {**defaults, **os.environ, **fixed}


if __name__ == "__main__":
    sys.exit(main())
