"""What users get wrong: one line with what, where and what to do, before anything is spent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lopd import cli
from megatron_lopd.cli import main
from megatron_lopd.errors import ConfigError
from megatron_lopd.evaluation.answers import ANSWERS, GradedAnswer
from megatron_lopd.pipeline.execute import TIMING_FILE, seconds_of
from tests.pipeline import write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_recipe(root)
    return root


@pytest.fixture
def root(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(models, copy)
    monkeypatch.chdir(copy)
    return copy


def edit_json(path: str, **changes: object) -> Callable[[], None]:
    def edit() -> None:
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps(content | changes))

    return edit


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(text) and None


def no_end_token() -> None:
    edit_json("teacher/tokenizer_config.json", eos_token=None)()
    edit_json("teacher/config.json", eos_token_id=None)()
    Path("teacher/generation_config.json").unlink()


FROM_FILE = "prompts.opd={path: p.jsonl}"
GOOD_LINE = '{"prompt": "1+2+3+4+5+6"}\n'
CASES: dict[str, tuple[Callable[[], object], list[str], int, list[str]]] = {
    "a file for a model": (
        lambda: None,
        ["teacher.model=teacher/config.json"],
        2,
        ["teacher.model: teacher/config.json is no directory"],
    ),
    "misspelt key": (lambda: None, ["train.optimiser.lr=1"], 2, ["train.optimiser", "train.optimizer"]),
    "a directory without a name": (lambda: None, ['run_dir=""'], 2, ["run_dir", "names no directory"]),
    "a directory that no name can be": (
        lambda: None,
        [f"run_dir={'x' * 300}"],
        2,
        ["run_dir", "File name too long"],
    ),
    "a zero byte in a name": (lambda: None, ['run_dir="a\\0b"'], 2, ["run_dir", "names no directory"]),
    "wrong type": (lambda: None, ["seed=x"], 2, ["seed", "expected int"]),
    "no such teacher": (
        lambda: None,
        ["teacher.model=nowhere"],
        2,
        ["teacher.model: nowhere", "give a"],
    ),
    "no such student": (lambda: None, ["student.model=nowhere"], 2, ["student.model: nowhere"]),
    "no such declared teacher": (
        lambda: None,
        ["sft.checkpoint=student", "sft.teacher=nowhere"],
        2,
        ["sft.teacher: nowhere", "give a"],
    ),
    "no config": (
        lambda: Path("teacher/config.json").unlink(),
        [],
        2,
        ["teacher.model: teacher/config.json"],
    ),
    "no such prompts": (lambda: None, [FROM_FILE], 1, ["prompts.opd.path: p.jsonl", "No such file"]),
    "empty prompts": (write("p.jsonl", ""), [FROM_FILE], 1, ["p.jsonl", "empty"]),
    "malformed line": (write("p.jsonl", GOOD_LINE + "{oops\n"), [FROM_FILE], 1, ["p.jsonl:2", "JSON"]),
    "a line without a prompt": (
        write("p.jsonl", GOOD_LINE + '{"text": "1"}\n'),
        [FROM_FILE],
        1,
        ["p.jsonl:2", "prompt"],
    ),
    "prompts that nothing reads": (
        write("p.csv", GOOD_LINE),
        ["prompts.sft={path: p.csv}"],
        2,
        ["lopd run: prompts.sft: p.csv: nothing is known to read .csv"],
    ),
    "a directory of prompts": (
        lambda: Path("ps").mkdir(),
        ["prompts.sft={path: ps}"],
        2,
        ["lopd run: prompts.sft: ps: a directory"],
    ),
    "prompts to evaluate on without an answer": (
        write("p.jsonl", GOOD_LINE),
        ["prompts.eval={path: p.jsonl}", "evaluate.grader=math"],
        1,
        ["lopd run: p.jsonl:1: prompt ", "has no answer"],
    ),
    "prompts to evaluate on that are not the task's": (
        write("p.jsonl", '{"prompt": "1=2"}\n'),
        ["prompts.eval={path: p.jsonl}", "evaluate.grader=arithmetic"],
        1,
        ["lopd run: p.jsonl:1: prompt ", "1=2"],
    ),
    "a prompt that the tokenizer cannot write": (
        write("p.jsonl", GOOD_LINE + '{"prompt": "\u00bf\u00e4\u00df"}\n'),
        [FROM_FILE],
        1,
        ["lopd run: p.jsonl:2: prompt ", "no token for any of '\u00bf\u00e4\u00df'"],
    ),
    "long prompt": (
        write("p.jsonl", json.dumps({"id": "big", "prompt": "1" * 99})),
        [FROM_FILE],
        1,
        ["big", "limit of 52"],
    ),
    "no room for a prompt": (
        lambda: None,
        ["rollout.sampling.max_new_tokens=64"],
        2,
        ["lopd run: rollout.sampling.max_new_tokens=64", "max_position_embeddings=64"],
    ),
    "no such task": (lambda: None, ["prompts.eval.task=chess"], 2, ["chess", "arithmetic"]),
    "no such grader": (lambda: None, ["evaluate.grader=maths"], 2, ["maths", "arithmetic"]),
    "unsupported architecture": (
        edit_json("student/config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        [],
        2,
        ["student", "gpt2"],
    ),
    "no chat template": (
        lambda: Path("teacher/chat_template.jinja").unlink(),
        [],
        2,
        ["teacher.model: teacher", "chat template"],
    ),
    "no end token": (no_end_token, [], 2, ["teacher", "end token"]),
    "heads do not divide": (lambda: None, ["parallel.tensor=3", "parallel.processes=3"], 2, ["tensor", "3"]),
    "layers do not divide": (
        lambda: None,
        ["parallel.pipeline=4", "parallel.processes=4"],
        2,
        ["pipeline", "4"],
    ),
    "a micro-batch that holds nothing at this layout": (
        lambda: None,
        ["parallel.context=32", "parallel.processes=32", "sft.micro_batch_tokens=60"],
        2,
        ["sft.micro_batch_tokens=60", "at least 64"],
    ),
    "a processes number that cannot be": (lambda: None, ["parallel.tensor=2"], 2, ["parallel.processes=2"]),
    "FP8 without a GPU": (
        lambda: None,
        ["precision=bf16", "fp8.recipe=tensorwise"],
        2,
        ["fp8.recipe=tensorwise", "GPU", "drop the fp8 section"],
    ),
    "more than a line can quote": (
        lambda: None,
        ["seed=" + "{bomb: " * 5000],
        2,
        ["override 'seed={bomb: ", "characters ...]", "more than 32 levels deep"],
    ),
    "another tokenizer": (
        lambda: edit_json("student/tokenizer.json", normalizer={"type": "NFC"})(),
        [],
        3,
        ["tokenizer differs", "teacher", "student"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_before_anything_is_spent(
    root: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, overrides, code, expected = CASES[case]
    spoil()
    capsys.readouterr()
    assert main(["run", "recipe.yaml", *overrides]) == code
    captured = capsys.readouterr()
    (message,) = [line for line in captured.err.splitlines() if line.startswith("lopd run:")]
    for text in expected:
        assert text in message
    assert len(message) < 2000
    assert captured.out == ""
    assert not (root / "run").exists()


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("student/config.json", "[]", 2),
        ("teacher/generation_config.json", "[]", 2),
        ("teacher/generation_config.json", '{"eos_token_id": 99999}', 2),
        ("teacher/model.safetensors", "0123456789", 1),
        ("teacher/model.safetensors.index.json", "{}", 1),
        ("teacher/tokenizer.json", "{", 2),
        ("run", "a file", 2),
    ],
)
def test_damaged_files_are_named(
    root: Path, capsys: pytest.CaptureFixture[str], path: str, content: str, code: int
) -> None:
    Path(path).write_text(content)
    assert main(["run", "recipe.yaml"]) == code
    assert path.split("/")[0] in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_dir_that_cannot_be_written_is_found_before_anything_runs(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # root may write everywhere

    def refusing(path: str, mode: int) -> bool:
        return Path(path).name != "store" and access(path, mode)

    monkeypatch.setattr(os, "access", refusing)
    (root / "store").mkdir()
    for command in (["run", "recipe.yaml"], ["run", "recipe.yaml", "--dry-run"], ["doctor", "recipe.yaml"]):
        assert main([*command, "run_dir=store/runs/first"]) == 2
        assert f"run_dir: {root / 'store'} cannot be written" in capsys.readouterr().err


def test_ctrl_c_is_no_fault_of_what_was_being_loaded(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*unused: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:  # as libraries do while they import
            raise ConfigError("teacher: the model does not load") from None

    monkeypatch.setattr(cli, "load_recipe", load)
    assert main(["run", "recipe.yaml"]) == 130
    assert capsys.readouterr().err == "lopd run: interrupted: run the same command again to go on\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exit_code_is_noted_through_no_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").touch()
    (tmp_path / "exit").symlink_to(tmp_path / "other")
    monkeypatch.setenv("LOPD_EXIT_FILE", str(tmp_path / "exit"))
    assert main(["status", str(tmp_path / "none.yaml")]) == 2
    assert (tmp_path / "other").read_text() == ""
    assert capsys.readouterr().err.endswith("exit: a link, not a file: remove it\n")


def test_stages_out_of_order_say_which_to_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("rollout", "train", "export"):
        assert main([stage, "recipe.yaml"]) == 1
        assert "run the stage that makes it" in capsys.readouterr().err


def test_dry_run_prints_the_recipe_and_the_plan_and_does_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "recipe.yaml", "--dry-run", "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7" in out
    for stage in ("generate", "sft", "rollout", "score", "train", "export", "evaluate", "report"):
        assert f"  {stage}" in out
    assert not (root / "run").exists()


def test_keys_that_will_do_nothing_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "recipe.yaml", "--dry-run", "sft.checkpoint=student", "sft.teacher=teacher"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "nothing is trained: sft.steps, sft.global_batch_size, " in out
    assert "sft.max_skipped_steps" not in out


def test_what_is_no_file_of_text_is_told_for_what_it_is(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("text.jsonl")
    for name, expected in (("text.jsonl", "a FIFO, not a file"), ("absent.jsonl", "no such file")):
        assert main(["run", "recipe.yaml", f"sft.data={name}", "--dry-run"]) == 1
        assert capsys.readouterr().err.startswith(f"lopd run: sft.data: {name}: {expected}")


@pytest.mark.parametrize("arguments", [["run"], ["fly", "recipe.yaml"], ["run", "recipe.yaml", "--fast"]])
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["run", "train", "status", "plan"])
def test_a_recipe_is_all_that_is_asked_for(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command])
    asked = capsys.readouterr().err.splitlines()[-1].partition("required: ")[2]
    assert asked == ("recipe, --gpus" if command == "plan" else "recipe")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_file_is_not_said_to_be_away(root: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("recipe.yaml", ("not a directory", "nothing to inspect")), ("none", ("no such",))):
        assert main([command, name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert any(each in line for each in said), line


def test_a_damaged_metric_is_one_line_under_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "run/sft").mkdir(parents=True)
    (root / "run/sft/metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    assert main(["status", "recipe.yaml"]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert "run/sft/metrics.jsonl:2: damaged (it has no step)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", 7),
        ("mode", ["sampled"]),
        ("mode", "loud"),
        ("prompt", "q"),
        ("prompt", ["q"]),
        ("gold", {}),
        ("text", None),
        ("verdict", "perhaps"),
        ("more", 1),
        ("", None),
    ],
)
def test_a_damaged_answer_is_one_line_under_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    message = {"role": "user", "content": "1+2"}
    whole = vars(GradedAnswer("p/0", "sampled", [message], "3", "so 3", "3", "right"))
    path = tmp_path / ANSWERS
    path.write_text(f"{json.dumps(whole)}\n{json.dumps(whole | {key: value} if key else value)}\n")
    assert main(["inspect", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{ANSWERS}:2: damaged: it is no graded answer" in line


@pytest.mark.parametrize("content", ['{"seconds": NaN}', '{"seconds": "long"}', "[]", "{"])
def test_a_damaged_duration_stops_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / TIMING_FILE).write_text(content)
    assert seconds_of(tmp_path) == 0
