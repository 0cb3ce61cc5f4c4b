"""`lopd <command> recipe.yaml key=value ...`: parse, run, and end with the right exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from megatron_lopd import __version__
from megatron_lopd.artifacts import digest_cache
from megatron_lopd.config import Recipe, load_recipe, to_plain
from megatron_lopd.config.help import key_help
from megatron_lopd.errors import ConfigError, DataError, LopdError, StopRequested
from megatron_lopd.files.writing import open_to_append
from megatron_lopd.runtime import environment
from megatron_lopd.runtime.display import printable, say, shortened
from megatron_lopd.runtime.signals import interrupted_at_once

EXIT_CODES = """exit codes:
  0   done
  1   failed (bad data, damaged file, engine or checkpoint error)
  2   bad usage or configuration
  3   refused: the lineage does not hold, or a guard stopped the run
  75  stopped on request, checkpoint saved: run the same command again"""

STAGE_HELP = {
    "run": "every stage in order; skips what is committed, resumes what was cut off",
    "generate": "1. the teacher answers the SFT prompts",
    "tokenize": "1. instead: SFT text from a file, when sft.data names one",
    "sft": "2. fine-tune the student on those answers",
    "rollout": "3. the student answers the OPD prompts, once",
    "score": "4. the same teacher scores those tokens, once",
    "train": "5. train from the cached scores, no teacher in sight",
    "refresh": "5. between two rounds of train: the student now is rolled out and scored anew",
    "export": "6. write the trained student as a Hugging Face checkpoint",
    "evaluate": "7. accuracy of the students on prompts with answers",
    "report": "8. summary.json and a page with figures",
    "online": "the baseline: standard OPD from the sft stage's model, with a live teacher",
}
_SECTIONS = {
    "generate": ("teacher", "prompts.sft", "generate"),
    "tokenize": ("student", "sft.data", "sft.teacher"),
    "sft": ("student", "sft", "precision", "parallel"),
    "rollout": ("prompts.opd", "rollout"),
    "score": ("teacher", "score", "parallel"),
    "train": ("train", "precision", "parallel"),
    "refresh": ("teacher", "prompts.opd", "rollout", "score", "train.refresh_every"),
    "export": ("export",),
    "evaluate": ("prompts.eval", "evaluate"),
    "report": (),
    "online": ("teacher", "prompts.opd", "rollout", "score", "train", "precision", "parallel", "export"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    options = parse(arguments)
    with interrupted_at_once() as interrupted:
        try:
            environment.make_writable()
            digest_cache.session()  # of the processes that this one starts, too
            options.handler(options)
        except LopdError as error:
            if interrupted():  # taken, by whoever caught it, for a module or a model that does not load
                return _say_interrupted(options)
            return _say_error(options, error)
        except BrokenPipeError:  # `lopd inspect ... | head`
            _drop_output()
            return 1
        except OSError as error:  # of a library's, or of a file that nothing above has an answer for
            return _say_error(options, _in_a_line(error))
        except KeyboardInterrupt:
            return _say_interrupted(options)
        return 0


def _drop_output() -> None:
    """Nobody reads on: what is left to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_a_line(error: OSError) -> DataError:
    """What the operating system refused, naming the file as far as it does."""
    if error.errno is None:  # a library's own
        return DataError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    names = " to ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
    what = error.strerror or os.strerror(error.errno)
    return DataError(
        f"{names or 'a file'}: cannot be read or written: {what}: check the disk or the mount it is on"
    )


def _say_error(options: argparse.Namespace, error: LopdError) -> int:
    rank = int(os.environ.get("RANK", "0"))
    # Every rank raises a stop, and what rank 0 has told them.
    if rank == 0 or not (error.said or isinstance(error, StopRequested)):
        where = f" (rank {rank})" if rank else ""
        say(f"lopd {options.command}{where}: {shortened(printable(str(error)))}", error=True)
    _record_end(error)
    return error.exit_code


def _say_interrupted(options: argparse.Namespace) -> int:
    say(f"lopd {options.command}: interrupted: run the same command again to go on", error=True)
    return 130


def _record_end(error: LopdError) -> None:
    """Add a line `code name` to the file named by LOPD_EXIT_FILE: torchrun turns every exit code into 1."""
    if path := os.environ.get("LOPD_EXIT_FILE"):
        try:
            with open_to_append(Path(path)) as file:
                file.write(f"{error.exit_code} {type(error).__name__}\n")
        except (DataError, OSError) as failure:
            say(f"lopd: {failure}", error=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What a command line says. Raises SystemExit for one that says nothing of use.

    argparse stops taking overrides at the first option; those after it are taken here.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [text for text in rest if text.startswith("-") or "=" not in text or "overrides" not in options]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    """The recipe's keys are described where --help asks (`_StageHelp`), which takes a while."""
    parser = _Parser(
        prog="lopd",
        description="Offline on-policy distillation on Megatron-Core (Lightning OPD, arXiv 2604.13010).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-lopd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in STAGE_HELP.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            add_help=False,
        )
        command.add_argument(
            "-h", "--help", action=_StageHelp, nargs=0, help="this, and every key of the recipe that matters"
        )
        _takes_recipe(command)
        command.add_argument(
            "--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop"
        )
        command.set_defaults(handler=_run_stages)
    status = commands.add_parser("status", help="how far a run is, on all machines at work on it")
    _takes_recipe(status)
    status.set_defaults(handler=_status)
    verify = commands.add_parser("verify", help="re-hash an artifact, and its lineage")
    verify.add_argument("path", type=Path, help="directory of an artifact, a checkpoint, a model or a run")
    verify.set_defaults(handler=_verify)
    inspect = commands.add_parser("inspect", help="show a run, an artifact, a shard or graded answers")
    inspect.add_argument("path", type=Path, help="run, artifact, .arrow shard or answers.jsonl")
    inspect.add_argument("--samples", type=int, default=2, help="samples shown of each shard (count)")
    inspect.set_defaults(handler=_inspect)
    doctor = commands.add_parser("doctor", help="what this machine has, and what a recipe would use")
    _takes_recipe(doctor, nargs="?")
    doctor.set_defaults(handler=_doctor)
    plan = commands.add_parser("plan", help="memory, layout and hours of a recipe, before anything is queued")
    _takes_recipe(plan)
    plan.add_argument("--gpus", required=True, help="kind:count, as h100:32 (a100-80g, h100, h200, b200)")
    plan.add_argument(
        "--fill", type=float, default=1.0, help="average response, as a share of max_new_tokens (default 1)"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object: bytes, FLOPs, hours")
    plan.set_defaults(handler=_plan)
    return parser


def _takes_recipe(command: argparse.ArgumentParser, nargs: Literal["?"] | None = None) -> None:
    """`nargs` "?": it may be left out."""
    command.add_argument(
        "recipe", nargs=nargs, help=f"YAML recipe of the whole run{' (optional)' if nargs else ''}"
    )
    # A default, even this one, keeps argparse from asking for overrides where the recipe is missing.
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted overrides: train.optimizer.lr=1e-6",
    )


class _StageHelp(argparse.Action):
    """`--help` of a stage: with the recipe's keys, and with what the code of a recipe before it adds."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *unused: object
    ) -> None:
        if namespace.recipe:
            try:
                load_recipe(namespace.recipe, namespace.overrides or ())
            except ConfigError as error:
                parser.error(str(error))
        command = parser.prog.rpartition(" ")[2]
        wanted = ("run_dir", "seed", "allow_teacher_mismatch", "allow_user_code", *_SECTIONS.get(command, ()))
        keys = key_help(None if command == "run" else wanted)
        try:
            print(f"{parser.format_help()}\nrecipe keys:\n{keys}\n\n{EXIT_CODES}", flush=True)
        except BrokenPipeError:  # `lopd train --help | head`
            _drop_output()
        parser.exit()


# The handlers import what they need when called: torch and Megatron-Core take seconds to import, and
# `--help` or a misspelt key should not wait for them.


def _run_stages(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    from megatron_lopd.commands import run
    from megatron_lopd.pipeline.resolved import ResolvedRun
    from megatron_lopd.stages.table import STAGES

    resolved = ResolvedRun(recipe)
    command = run.Command(resolved, options.recipe, options.overrides)
    if options.dry_run:
        names = [stage.name for stage in STAGES] if options.command == "run" else [options.command]
        _print_dry_run(recipe, run.describe(resolved, names))
    elif options.command == "run":
        run.run_leaving_gpus(command)
    elif options.command == "refresh":
        run.run_refresh(resolved)
    else:
        run.run_one(options.command, command)


def _print_dry_run(recipe: Recipe, plan: Iterable[str]) -> None:
    print(yaml.safe_dump(to_plain(recipe), sort_keys=False).rstrip())
    print("\nplan:")
    for line in plan:
        say(f"  {line}")


def _status(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    from megatron_lopd.commands.status import describe_run
    from megatron_lopd.pipeline.resolved import ResolvedRun

    for line in describe_run(ResolvedRun(recipe)):
        say(line)


def _verify(options: argparse.Namespace) -> None:
    from megatron_lopd.commands.verify import verify_path

    for line in verify_path(options.path):
        say(line)


def _inspect(options: argparse.Namespace) -> None:
    from megatron_lopd.commands.inspection import describe_path

    for line in describe_path(options.path, options.samples):
        say(line)


def _doctor(options: argparse.Namespace) -> None:
    from megatron_lopd.commands.doctor import diagnose

    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    for line in diagnose(recipe):
        say(line)


def _plan(options: argparse.Namespace) -> None:
    from megatron_lopd.estimate.gpu_kinds import parse_cluster
    from megatron_lopd.estimate.run_plan import as_json, make_plan, table
    from megatron_lopd.pipeline.resolved import ResolvedRun
    from megatron_lopd.pipeline.text_checks import check_text

    recipe = load_recipe(options.recipe, options.overrides)
    plan = make_plan(recipe, parse_cluster(options.gpus), options.fill)
    for line in [json.dumps(as_json(plan))] if options.json else table(plan):
        say(line)
    if plan.problems:
        raise ConfigError("; ".join(plan.problems))
    for line in check_text(ResolvedRun(recipe)):
        print(line, file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
