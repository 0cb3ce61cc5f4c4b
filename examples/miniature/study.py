"""The paper's claims and what goes past them, in miniature, on a CPU: run every condition over seeds.

    python examples/miniature/study.py            # all of it and its figures: an hour on two cores
    python examples/miniature/study.py --short    # every condition once, a few steps each: does it run?
    python examples/miniature/study.py --seeds 3 --results runs/seed3.json    # one seed again

Every condition is a recipe of this project (recipe.yaml with overrides), run by its own commands in a
process of one thread; conditions that share teacher, student and seed share SFT and rollouts. What is
finished is skipped, so a study that was cut off goes on. At the end `draw.py` makes tables and figures of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = HERE / "recipe.yaml"
# Overrides of the recipe: SFT to a sampled accuracy of about 85 % and of about 20 %.
STARTS = {
    "strong": (),
    "weak": ("sft.steps=300",),
}
# Overrides by a condition's schedule: the study's, a half of it, and the study's with SFT's weight decay.
SCHEDULES = {
    "full": ("train.steps=100",),
    "half": ("train.steps=50",),
    "decayed": ("train.steps=100", "train.optimizer.weight_decay=5.0"),
}
REFRESH_EVERY = 35  # steps: two refreshes
# The recipe's learning rate is the top-k objectives'; the sampled ones' gradient is far noisier. Both were
# chosen on seed 6, which is none of the study's.
SAMPLED_LR = 2e-4
# Few steps of few samples, for --short.
SHORT = (
    *(f"prompts.{use}.count=64" for use in ("sft", "opd", "eval")),
    *(f"{stage}.{key}" for stage in ("sft", "train") for key in ("steps=4", "global_batch_size=16")),
    "sft.optimizer.warmup_steps=1",
    "train.optimizer.warmup_steps=1",
    "train.checkpoint_every=2",
    "train.guard.window=2",
)


@dataclass(frozen=True)
class Condition:
    """One way to go on from the SFT student. `overrides` are of the recipe; `k` teacher tokens are kept."""

    method: str
    k: int
    overrides: tuple[str, ...] = ()
    schedule: str = "full"  # of SCHEDULES

    @property
    def name(self) -> str:
        return f"{self.method}-{self.k}-{self.schedule}"

    @property
    def shared(self) -> tuple[str, ...]:
        """The stages that it has in common with the other conditions of its student."""
        return ("generate",) if self.method == "sft_continued" else ("generate", "sft", "rollout")


@dataclass(frozen=True)
class Cell:
    """The conditions of one SFT student. `answered`, `scored`: the dialects of the teachers that do so."""

    start: str
    answered: str
    scored: str
    seed: int

    @property
    def consistent(self) -> bool:
        return self.answered == self.scored

    def conditions(self, short: bool) -> list[Condition]:
        sampled = ("train.objective=sampled_reverse_kl", f"train.optimizer.lr={SAMPLED_LR}")
        top_k = ("train.objective=topk_reverse_kl",)
        refresh = f"train.refresh_every={2 if short else REFRESH_EVERY}"
        conditions = [
            Condition("sft", 0),
            Condition("sampled_reverse_kl", 0, sampled),
            Condition(
                "sampled_reverse_kl+clipped", 0, (*sampled, "train.sampled_reverse_kl.importance=clipped")
            ),
            Condition("topk_reverse_kl", 4, top_k),
            Condition("topk_forward_kl", 4, ("train.objective=topk_forward_kl",)),
            Condition("refresh", 4, (*top_k, refresh)),
            Condition("online_sampled_reverse_kl", 0, sampled),
            Condition("online_topk_reverse_kl", 4, top_k),
        ]
        # Where the teacher is another one: not what has nothing to do with which teacher scores, nor other k.
        if self.consistent:
            conditions += [
                Condition("sft_continued", 0, sampled[:1]),
                Condition("sft_continued", 0, sampled[:1], "decayed"),
                *(Condition("topk_reverse_kl", k, top_k) for k in (1, 2, 8)),
                Condition("topk_reverse_kl", 4, top_k, "half"),
                Condition("fixed_negative", 0, ("train.objective=fixed_negative", sampled[1])),
            ]
        return conditions


def cells(seeds: Sequence[int]) -> list[list[Cell]]:
    """Every cell; those of one list share the SFT student and are run one after the other."""
    return [
        *([Cell("strong", "equals", scored, seed) for scored in ("equals", "terse")] for seed in seeds),
        *([Cell("weak", "equals", "equals", seed)] for seed in seeds),
        *([Cell("strong", "terse", "equals", seed)] for seed in seeds),
    ]


class CellRunner:
    """Runs the conditions of one cell below `root`; each leaves entry.json when it is finished."""

    def __init__(self, cell: Cell, root: Path, short: bool) -> None:
        self.cell, self.short = cell, short
        self.base = root / f"{cell.start}-{cell.answered}-{cell.seed}"
        self.directory = self.base / f"scored-by-{cell.scored}"

    def run(self) -> None:
        from megatron_lopd.pipeline.execute import execute
        from megatron_lopd.pipeline.resolved import ResolvedRun
        from megatron_lopd.stages.table import GENERATE, ROLLOUT, SFT

        base = ResolvedRun(self.recipe(self.base, teacher=self.cell.answered))
        for stage in (GENERATE, SFT, ROLLOUT):
            execute(stage, base)
        for condition in self.cell.conditions(self.short):
            self.run_condition(condition)

    def recipe(self, run_dir: Path, *overrides: str, teacher: str = "") -> Any:
        from megatron_lopd.config import load_recipe

        model = f"teacher.model={HERE / f'teacher_{teacher or self.cell.scored}'}"
        common = (f"run_dir={run_dir}", f"seed={self.cell.seed}", model, *STARTS[self.cell.start])
        return load_recipe(str(RECIPE), [*common, *overrides, *(SHORT if self.short else ())])

    def overrides(self, condition: Condition) -> tuple[str, ...]:
        """What sets a condition's recipe apart from its cell's."""
        allowed = () if self.cell.consistent else ("allow_teacher_mismatch=true",)
        return (*condition.overrides, *SCHEDULES[condition.schedule], f"score.top_k={condition.k}", *allowed)

    def run_condition(self, condition: Condition) -> None:
        from megatron_lopd.files.writing import atomic_write_json

        directory = self.directory / condition.name
        if (directory / "entry.json").is_file():
            return
        print(f"miniature: {self.cell} {condition.name}", flush=True)
        self.link(directory, *condition.shared)
        entry = {
            "start": self.cell.start,
            "teacher": "consistent" if self.cell.consistent else "inconsistent",
            "answered_by": self.cell.answered,
            "scored_by": self.cell.scored,
            "method": condition.method,
            "k": condition.k,
            "schedule": condition.schedule,
            "seed": self.cell.seed,
            **self.measure(condition, directory),
        }
        atomic_write_json(directory / "entry.json", entry)

    def link(self, directory: Path, *stages: str) -> None:
        """Give a condition what it shares with the others of its student."""
        directory.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            if not (directory / stage).exists():
                (directory / stage).symlink_to((self.base / stage).resolve())

    def share_scores(self, condition: Condition, directory: Path) -> None:
        """Score the rollouts with the condition's k, once for all conditions that read it."""
        from megatron_lopd.errors import LineageError
        from megatron_lopd.pipeline.execute import execute
        from megatron_lopd.pipeline.resolved import ResolvedRun
        from megatron_lopd.stages.table import SCORE

        scores = self.directory / f"scores-{condition.k}"
        self.link(scores, *condition.shared)
        recipe = self.recipe(scores, *condition.overrides, f"score.top_k={condition.k}")
        try:
            execute(SCORE, ResolvedRun(recipe))
        except LineageError:
            if self.cell.consistent:
                raise
            execute(SCORE, ResolvedRun(replace(recipe, allow_teacher_mismatch=True)))
        else:
            if not self.cell.consistent:
                raise SystemExit(f"{scores}: a teacher other than SFT's was let through")
        if not (directory / "score").exists():
            (directory / "score").symlink_to((scores / "score").resolve())

    def measure(self, condition: Condition, directory: Path) -> dict[str, Any]:
        """Run one condition, and grade its student."""
        if condition.method == "sft":
            return self.entry(self.base / "sft" / "model", directory, Spent())
        if condition.method == "sft_continued":
            return self.sft_continued(condition, directory)
        if condition.method.startswith("online"):
            return self.online(condition, directory)
        return self.offline(condition, directory)

    def sft_continued(self, condition: Condition, directory: Path) -> dict[str, Any]:
        """As many further steps on the teacher's answers, with the optimizer that the others are given."""
        from megatron_lopd.commands.run import run_all
        from megatron_lopd.config import to_plain
        from megatron_lopd.pipeline.execute import seconds_of

        train = to_plain(self.recipe(directory, *self.overrides(condition)).train)
        keys = ("steps", "global_batch_size", "micro_batch_tokens", "checkpoint_every")
        same = [f"sft.{key}={train[key]}" for key in keys]
        same += [f"sft.optimizer.{key}={value}" for key, value in train["optimizer"].items()]
        start = (f"student.model={self.base / 'sft' / 'model'}", "student.init=pretrained")
        run_all(_command(_ungraded(replace(self.recipe(directory, *start, *same), train=None))))
        spent = Spent(train=seconds_of(directory / "sft"))
        return self.entry(directory / "sft" / "model", directory, spent)

    def online(self, condition: Condition, directory: Path) -> dict[str, Any]:
        from megatron_lopd.artifacts.manifest import load_manifest
        from megatron_lopd.commands.run import run_one
        from megatron_lopd.pipeline.execute import seconds_of

        run_one("online", _command(_ungraded(self.recipe(directory, *self.overrides(condition)))))
        rollout, teacher = (_sum(directory / "online", key) for key in ("rollout_s", "teacher_s"))
        train = seconds_of(directory / "online") - rollout - teacher
        tokens = load_manifest(directory / "online").counts["teacher_tokens"]
        spent = Spent(rollout, teacher, train, tokens)
        return self.entry(directory / "online" / "model", directory, spent)

    def offline(self, condition: Condition, directory: Path) -> dict[str, Any]:
        from megatron_lopd.commands.run import run_all
        from megatron_lopd.errors import DriftError

        self.share_scores(condition, directory)
        overrides = self.overrides(condition)
        try:
            run_all(_command(_ungraded(self.recipe(directory, *overrides))))
        except DriftError as drift:
            return self.stopped(drift, directory, overrides)
        return self.entry(directory / "export" / "model", directory, self.spent_offline(directory))

    def stopped(self, drift: Any, directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
        """Grade what the guard kept, and what would have become of the run without it."""
        from megatron_lopd.commands.run import run_all
        from megatron_lopd.convert.offline import megatron_to_hf

        spent, stopped_at = self.spent_offline(directory), len(_metrics(directory / "train"))
        kept = Path(drift.last_good)
        if "checkpoints" in kept.parts:
            recipe = self.recipe(directory)
            megatron_to_hf(kept, directory / "kept", recipe.export.max_shard_bytes, self.base / "sft/model")
            kept = directory / "kept"
        entry = self.entry(kept, directory, spent)
        off = (*overrides, "train.guard.min_kept_mass=null")
        run_all(_command(_ungraded(self.recipe(directory, *off))))
        without = self.grade(directory / "export" / "model", directory / "graded-unguarded")
        guard = {"stopped_by_guard": True, "stopped_at_step": stopped_at, "unguarded": without["sampled"]}
        return entry | guard | {"unguarded_greedy": without["greedy"]}

    def spent_offline(self, directory: Path) -> Spent:
        """Seconds and teacher tokens of all rounds: of the first, and of each refresh."""
        from megatron_lopd.artifacts.manifest import load_manifest
        from megatron_lopd.pipeline.execute import seconds_of

        rounds = [directory, *sorted(directory.glob("refresh-*"))]
        students = sum(seconds_of(each / "student") for each in rounds[1:])  # written for the sampler
        return Spent(
            rollout=students + sum(seconds_of(each / "rollout") for each in rounds),
            teacher=sum(seconds_of(each / "score") for each in rounds),
            train=seconds_of(directory / "train")
            or sum(row["seconds"] for row in _metrics(directory / "train")),
            teacher_tokens=sum(load_manifest(each / "score").counts["tokens"] for each in rounds),
        )

    def entry(self, model: Path, directory: Path, spent: Spent) -> dict[str, Any]:
        seconds = {name: round(value, 2) for name, value in asdict(spent).items() if name != "teacher_tokens"}
        return {
            **self.grade(model, directory / "graded"),
            "seconds": seconds,
            "teacher_tokens": spent.teacher_tokens,
            "stopped_by_guard": False,
        }

    def grade(self, model: Path, directory: Path) -> dict[str, Any]:
        from megatron_lopd.artifacts.fingerprint import fingerprint_model
        from megatron_lopd.evaluation.grading import grade_model
        from megatron_lopd.graders import open_grader
        from megatron_lopd.pipeline.resolved import ONLY_SET, ResolvedRun

        recipe = self.recipe(self.base)
        prompts = ResolvedRun(recipe).evaluation_sets[ONLY_SET].prompts
        with open_grader(recipe.evaluate.grader) as grader:
            label, made_from = directory.parent.name, fingerprint_model(model).weights
            grades, _ = grade_model(
                model, prompts, recipe.evaluate, self.cell.seed, directory, label, grader, made_from
            )
        names = ("sampled", "greedy", "pass_at_k", "entropy", "length")
        return {name: round(getattr(grades, name), 5) for name in names}


@dataclass(frozen=True)
class Spent:
    """Seconds by part, SFT left out, and the tokens that the teacher read."""

    rollout: float = 0.0
    teacher: float = 0.0
    train: float = 0.0
    teacher_tokens: int = 0


def _command(recipe: Any) -> Any:
    """What runs a recipe in this process; none of it starts another."""
    from megatron_lopd.commands.run import Command
    from megatron_lopd.pipeline.resolved import ResolvedRun

    return Command(ResolvedRun(recipe), str(RECIPE), [])


def _ungraded(recipe: Any) -> Any:
    """The recipe without its own evaluation: the study grades each student itself, and SFT's only once."""
    return replace(recipe, prompts=replace(recipe.prompts, eval=None))


def _metrics(directory: Path) -> list[dict[str, Any]]:
    """Step by step, with how long each took."""
    paths = [path for name in ("metrics.jsonl", "times.jsonl") if (path := directory / name).is_file()]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return [
        {name: value for part in step for name, value in part.items()} for step in zip(*rows, strict=True)
    ]


def _sum(directory: Path, key: str) -> float:
    """A metric over all steps."""
    return sum(row[key] for row in _metrics(directory))


def entries(groups: Sequence[Sequence[Cell]], root: Path, short: bool) -> Iterator[dict[str, Any]]:
    """What the finished conditions measured, in the order of the study."""
    for cell in (cell for group in groups for cell in group):
        runner = CellRunner(cell, root, short)
        for condition in cell.conditions(short):
            yield json.loads((runner.directory / condition.name / "entry.json").read_text())


def machine() -> str:
    """The processor and the versions that the numbers depend on."""
    import torch

    about = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in about if line.startswith("model name")]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The miniature study: every condition over seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default 1 2 3 4 5; 1 with --short)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each (default 2)")
    parser.add_argument("--short", action="store_true", help="a few steps of each condition, in minutes")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/miniature"), help="where runs are kept")
    parser.add_argument(
        "--results", type=Path, help="file to write (default examples/miniature/results.json)"
    )
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)  # what one process is to do
    arguments = parser.parse_args()
    seeds = arguments.seeds or ([1] if arguments.short else [1, 2, 3, 4, 5])
    groups = cells(seeds)
    if arguments.group is not None:
        for cell in groups[arguments.group]:
            CellRunner(cell, arguments.run_dir, arguments.short).run()
        return
    arguments.run_dir.mkdir(parents=True, exist_ok=True)

    logs = [arguments.run_dir / f"group-{number}.log" for number in range(len(groups))]

    def work(number: int) -> int:
        own = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--group", str(number)]
        with logs[number].open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.run(own, env=environment, stdout=log, stderr=log).returncode

    with ThreadPoolExecutor(arguments.jobs) as pool:
        failed = [number for number, code in enumerate(pool.map(work, range(len(groups)))) if code]
    if failed:
        raise SystemExit(f"failed: see {', '.join(str(logs[number]) for number in failed)}")
    results = {
        "machine": machine(),
        "command": " ".join(["python", *sys.argv]),
        "seeds": seeds,
        "conditions": list(entries(groups, arguments.run_dir, arguments.short)),
    }
    path = arguments.results or (
        arguments.run_dir / "results.json" if arguments.short else HERE / "results.json"
    )
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"miniature: {len(results['conditions'])} runs: {path}")
    if path == HERE / "results.json":
        import draw

        draw.main([])


if __name__ == "__main__":
    main()
