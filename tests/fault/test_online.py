"""`lopd online`: what it writes, what it refuses, and what a killed teacher or a signal does to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from gloo import run_ranks

from megatron_lopd.artifacts.lineage import read_model_lineage
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from tests.model_zoo import contents, make_model_dir
from tests.pipeline import SMALL
from tests.training_zoo import NATS, ROUNDED

ONLINE = ["online", "recipe.yaml"]


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run's copy up to sft, with the recipe's relative paths pointing into it."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for stage in ("rollout", "score", "train", "export", "evaluate", "report"):
        shutil.rmtree(copy / "run" / stage)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/online, as one process makes it."""
    copy = tmp_path_factory.mktemp("undisturbed") / "copy"
    shutil.copytree(finished, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        assert main(ONLINE) == 0
    return copy / "run" / "online"


def steps_of(online: Path) -> list[dict[str, Any]]:
    """Metrics and times, step by step."""
    metrics, times = (
        [json.loads(line) for line in (online / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "times.jsonl")
    )
    return [{**one, **other} for one, other in zip(metrics, times, strict=True)]


def losses(online: Path) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in steps_of(online)]


def test_it_counts_times_and_names_what_it_used(undisturbed: Path) -> None:
    manifest, steps = load_manifest(undisturbed, "model"), steps_of(undisturbed)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        parts = step["rollout_s"], step["teacher_s"], step["data_wait_s"]
        assert min(parts[:2]) > 0
        assert sum(parts) < step["seconds"]
        assert abs(step["drift_kl"]) < 1e-6, "the student that samples is the one that is trained"
        assert step["effective_sample_size"] == pytest.approx(1, abs=1e-5)
    counts = manifest.counts
    assert (counts["steps"], counts["samples"]) == (5, 40)
    assert counts["teacher_tokens"] == counts["tokens"] == sum(step["tokens"] for step in steps)
    assert counts["response_tokens"] == sum(step["response_tokens"] for step in steps)
    assert set(manifest.parents) == {"prompts", "sft", "student", "teacher"}
    assert manifest.lineage == "proved"
    lineage = read_model_lineage(undisturbed / "model")
    assert lineage is not None
    assert (lineage.made_by, lineage.status) == ("online", "proved")
    start = undisturbed.parent / "sft" / "model"
    assert contents(undisturbed / "model")[0] != contents(start)[0]


def on_score(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Call `action(teacher)` while the `number`-th request to score waits for its answer."""
    from megatron_lopd.engines.process import EngineProcess

    send, sent = EngineProcess._send, []

    def send_and_act(teacher: Any, message: Any) -> None:
        sent.append(message)
        if len(sent) != number + 1:  # the first message is the model to load
            return send(teacher, message)
        os.kill(teacher.pid, signal.SIGSTOP)
        send(teacher, message)
        action(teacher)
        os.kill(teacher.pid, signal.SIGCONT)

    monkeypatch.setattr(EngineProcess, "_send", send_and_act)


def test_killed_teacher_and_stop_signal_change_nothing(
    root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        on_score(patch, 4, lambda teacher: os.kill(teacher.pid, signal.SIGKILL))
        assert main(ONLINE) == 75
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lopd online:")]
    for text in ("the teacher's process", "SIGKILL", "after step 3 of 5", "run the same command to go on"):
        assert text in message
    # Of an even step, for checkpoint_every is 2, but for the teacher's end.
    assert (root / "run/online/checkpoints/step_00000003/manifest.json").exists()

    with monkeypatch.context() as patch:
        on_score(patch, 1, lambda teacher: os.kill(os.getpid(), signal.SIGTERM))
        assert main(ONLINE) == 75
    assert len(steps_of(root / "run/online")) == 4

    assert main(ONLINE) == 0
    assert losses(root / "run/online") == losses(undisturbed)
    manifests = [(online / "manifest.json").read_bytes() for online in (root / "run/online", undisturbed)]
    assert manifests[0] == manifests[1], "with the digest of every file of the model"


@pytest.mark.nightly  # ranks of the launcher's are those below in all but who started them
def test_ranks_it_starts_itself_train_as_one_process_does(root: Path, undisturbed: Path) -> None:
    assert main([*ONLINE, "parallel.tensor=2", "parallel.processes=2"]) == 0
    assert_close(root / "run/online", undisturbed)


@pytest.mark.timeout(120)
def test_all_ranks_stop_when_the_teacher_of_one_is_killed(root: Path, undisturbed: Path) -> None:
    assert run_ranks(2, online_rank, root, 2, timeout=60) == [75, 75]
    assert len(steps_of(root / "run/online")) == 1
    assert run_ranks(2, online_rank, root, None, timeout=60) == [0, 0]
    assert_close(root / "run/online", undisturbed)


def assert_close(online: Path, expected: Path) -> None:
    """Equal to rounding: the same tokens were sampled, and the same steps taken."""
    for step, reference in zip(steps_of(online), steps_of(expected), strict=True):
        for name in ("samples", "tokens", "response_tokens"):
            assert step[name] == reference[name]
        for name in ("loss", "grad_norm", "reverse_kl_sampled"):
            assert step[name] == pytest.approx(reference[name], rel=ROUNDED, abs=NATS)


def online_rank(root: Path, killed_at: int | None) -> int:
    """One of two data parallel ranks; the teacher of rank 1 is killed at a step."""
    os.chdir(root)
    with pytest.MonkeyPatch.context() as patch:
        if killed_at is not None and os.environ["RANK"] == "1":
            on_score(patch, killed_at, lambda teacher: os.kill(teacher.pid, signal.SIGKILL))
        return main([*ONLINE, "parallel.processes=2"])


def test_a_token_that_the_student_has_not_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said by the teacher in the third step, as by one whose output layer is padded further."""
    from megatron_lopd.engines.process import EngineProcess

    score, calls = EngineProcess.score, []

    def with_padding(teacher: Any, *asked: Any) -> Any:
        scores = list(score(teacher, *asked))
        calls.append(scores)
        if len(calls) == 3:
            scores[1].top_k.ids[0, -1] = 131  # make_model_dir's vocab_size
        return scores

    monkeypatch.setattr(EngineProcess, "score", with_padding)
    top_k = ["train.objective=topk_reverse_kl", "score.top_k=3"]
    refused(capsys, top_k, 1, "likeliest tokens is 131", "student's vocabulary of 131", "score.top_k")
    assert len(steps_of(root / "run/online")) == 2


def refused(capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, *expected: str) -> None:
    capsys.readouterr()
    assert main([*ONLINE, *overrides]) == code
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lopd online:")]
    for text in expected:
        assert text in message


def test_what_cannot_be_is_said_in_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model_dir(root / "other", seed=9, **SMALL)
    refused(capsys, ["teacher.model=other"], 3, "teacher", "weights", "other")
    refused(capsys, ["train.preflight_tolerance=1e-12"], 3, "preflight", "1e-12")
    shutil.rmtree(root / "run/online")
    refused(capsys, ["teacher.model=nowhere"], 2, "nowhere")
    refused(capsys, ["teacher=null"], 2, "missing key teacher.model")
    refused(capsys, ["prompts.opd=null"], 2, "prompts.opd")
    refused(capsys, ["train=null"], 2, "missing section train")
    refused(capsys, ["train.objective=topk_reverse_kl"], 2, "score.top_k")
    refused(capsys, ["train.checkpoint=student"], 2, "train.checkpoint")
    shared = ["score.engine.name=vllm", "score.engine.vllm.tensor=2", "parallel.processes=2"]
    refused(capsys, shared, 2, "this one takes 2", "own GPU")
    refused(capsys, ["rollout.sampling.max_new_tokens=64"], 2, "leaves no room for a prompt")
    assert main([*ONLINE, "--dry-run"]) == 0
    assert "online" in capsys.readouterr().out
    shutil.rmtree(root / "run/sft")
    refused(capsys, [], 1, "sft", "run `lopd sft`")
    assert main([*ONLINE, "--dry-run"]) == 0
    assert not (root / "run/online").exists()
