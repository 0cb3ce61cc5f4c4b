"""What others have put into a run's directory, changed there, or led out of it: not used, or refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import megatron_lopd as lopd
from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.artifacts.manifest import (
    MANIFEST,
    copy_committed,
    load_manifest,
    plan_digest,
    verify_files,
)
from megatron_lopd.cli import main
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS, SCORES
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.errors import DataError
from megatron_lopd.pipeline.execute import TIMING_FILE, seconds_of
from megatron_lopd.pipeline.resolved import Model
from megatron_lopd.pipeline.students import listed_metrics
from megatron_lopd.training.data_sources import CachedData

pytestmark = pytest.mark.timeout(120)  # a FIFO that is opened blocks for ever


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error, error


def test_what_a_manifest_does_not_list_is_not_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten more shards of other samples, in both artifacts: as many as a training could be poisoned with."""
    for stage, kind in (("rollout", "rollouts"), ("score", "scores")):
        for number in range(3, 13):
            shutil.copy(
                root / f"run/{stage}/{kind}-00000.arrow", root / f"run/{stage}/{kind}-{number:05d}.arrow"
            )
    assert len(CachedData(root / "run/rollout", root / "run/score")) == 40
    assert len(lopd.read_rollouts("run/rollout").ids) == len(lopd.Run("recipe.yaml").rollouts) == 40
    assert len(lopd.read_scores("run/score").ids) == 40
    assert main(["verify", "run/score"]) == 0
    shown = ", ".join(f"scores-{number:05d}.arrow" for number in range(3, 8))
    assert f"run/score: no part of it, and not read: {shown} and 5 more\n" in capsys.readouterr().out
    assert main(["run", "recipe.yaml"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_file_that_a_loader_would_take_for_the_models_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".DS_Store", "README.md"):
        (root / "run/sft/model" / name).write_text("{}")
    Model(Path("run/sft/model")).parent  # noqa: B018 - nobody takes these for the model's
    (root / "run/sft/model/added_tokens.json").write_text("{}")
    (root / "linked").symlink_to("run/sft/model")
    for name, place in (("run/sft/model", root), ("linked", root), (".", root / "run/sft/model")):
        unlisted = rf"^{re.escape(str(Path(name) / 'added_tokens.json'))}: not part of .*run/sft,"
        with contextlib.chdir(place), pytest.raises(DataError, match=unlisted):
            Model(Path(name)).parent  # noqa: B018
    refused(capsys, ["verify", "run/sft/model"], 1, "added_tokens.json: not part of")
    refused(capsys, ["verify", "run"], 1, "added_tokens.json: not part of")


def test_a_folder_is_copied_as_it_was_committed(root: Path, tmp_path: Path) -> None:
    generate = root / "run/generate"
    (generate / "tokenizer/added_tokens.json").write_text("{}")
    names = copy_committed(generate, load_manifest(generate), "tokenizer", tmp_path / "to")
    assert "tokenizer.json" in names
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(names)
    assert "added_tokens.json" not in names


def by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def by_folder_link(path: Path) -> None:
    path.parent.rename(path.parents[1] / "elsewhere")
    path.parent.symlink_to("elsewhere")


def by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


REPLACED = [by_link, by_directory, by_fifo, by_dangling_link]


@pytest.mark.parametrize("change", [*REPLACED, by_folder_link])
def test_files_are_opened_without_links_and_only_files(root: Path, change: Callable[[Path], None]) -> None:
    """The bytes that a link leads to are the right ones: whoever made it may change them afterwards."""
    path = root / "run/sft/model/config.json"
    manifest = load_manifest(root / "run/sft")
    file = CommittedFile(root / "run/sft", "model/config.json", manifest.files["model/config.json"])
    verify_files(root / "run/sft", manifest)
    change(path)
    for look in (file.open, lambda: verify_files(root / "run/sft", manifest)):
        with pytest.raises(DataError, match=r"model/.*: (a link|a directory|a FIFO|missing)") as caught:
            look()
        assert "\n" not in str(caught.value)


def test_a_manifest_dated_ahead_hides_no_change(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml"]) == 0  # which remembers what it has seen
    shard = root / "run/rollout/rollouts-00001.arrow"
    before, content = shard.stat(), bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    ahead = before.st_mtime_ns + 10**18
    os.utime(root / "run/rollout" / MANIFEST, ns=(ahead, ahead))
    refused(capsys, ["run", "recipe.yaml"], 1, "rollouts-00001.arrow: damaged")


def test_altered_metrics_are_refused_and_missing_steps_are_no_part(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "run/train/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "metrics.jsonl" in load_manifest(root / "run/train").files
    assert not any("seconds" in line or "tokens_per_s" in line for line in lines), "times are beside it"
    path.write_text("".join(lines).replace("1", "2", 1))
    shutil.rmtree(root / "run/report")
    refused(capsys, ["report", "recipe.yaml"], 1, "metrics.jsonl: damaged")
    with pytest.raises(DataError, match="damaged"):
        lopd.read_metrics("run/train")
    for content in ("".join(lines[:2] + lines[3:]), "{}\n", "\xff\n", "".join(lines).replace("5", "NaN")):
        path.write_bytes(content.encode("latin-1"))
        assert listed_metrics(root / "run/train", len(lines)) == []
        assert "it is no part of the artifact" in capsys.readouterr().out
    path.write_text("".join(lines))
    assert listed_metrics(root / "run/train", len(lines)) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "NaN", "\xff"),
        *(f'{{"seconds": {value}}}' for value in ("NaN", "9" * 400, "-1", "1e308", '"1"', "{}", "[" * 5000)),
    ],
)
def test_a_duration_of_nobodys_stops_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / TIMING_FILE).write_bytes(text.encode("latin-1"))
    assert seconds_of(tmp_path) == 0.0


@pytest.mark.parametrize("change", REPLACED)
def test_what_is_no_file_in_a_shards_place_ends_the_stage(
    root: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    (root / "run/score" / MANIFEST).unlink()
    change(root / "run/score/scores-00001.arrow")
    refused(capsys, ["score", "recipe.yaml"], 1, "run/score/scores-00001.arrow: ")


def test_a_shard_of_another_plan_is_never_committed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = root / "run/score"
    plan = plan_digest(load_manifest(score).config, load_manifest(score).parents)
    shard, whole = score / "scores-00001.arrow", score / "scores-00000.arrow"
    records, others = list(ShardReader(SCORES, [shard], plan=plan)), list(ShardReader(SCORES, [whole]))
    (score / MANIFEST).unlink()
    write_shard(shard, SCORES, records, "f" * 64)
    refused(capsys, ["score", "recipe.yaml"], 1, f"{shard.relative_to(root)}: another plan made it (ffff")
    write_shard(shard, SCORES, others, plan)
    refused(capsys, ["score", "recipe.yaml"], 1, "is there twice")
    content = bytearray(write_shard(shard, SCORES, records, plan) and shard.read_bytes())
    at = content.index(records[3].log_probs.tobytes())
    content[at] ^= 1
    shard.write_bytes(content)
    refused(capsys, ["score", "recipe.yaml"], 1, "scores-00001.arrow: damaged: the checksum of sample")
    assert not (score / MANIFEST).exists()
    write_shard(shard, SCORES, records, plan)
    assert main(["score", "recipe.yaml"]) == 0


def test_a_shard_of_other_prompts_is_never_committed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a template that printed the date would leave it, where the stage was killed before midnight."""
    rollout = root / "run/rollout"
    plan = plan_digest(load_manifest(rollout).config, load_manifest(rollout).parents)
    shard = rollout / "rollouts-00001.arrow"
    records: list[Rollout] = list(ShardReader(ROLLOUTS, [shard], plan=plan))
    (rollout / MANIFEST).unlink()
    dated = replace(records[2], prompt_tokens=np.append(records[2].prompt_tokens, np.int32(1)))
    write_shard(shard, ROLLOUTS, [*records[:2], dated, *records[3:]], plan)
    name = records[2].sample_id
    refused(capsys, ["rollout", "recipe.yaml"], 1, f"sample {name} answers another prompt than it is now")
    write_shard(shard, ROLLOUTS, records[::-1], plan)
    refused(
        capsys, ["rollout", "recipe.yaml"], 1, "rollouts-00001.arrow: sample 16 is ", "was asked for there"
    )
    write_shard(shard, ROLLOUTS, records, plan)
    assert main(["rollout", "recipe.yaml"]) == 0


@pytest.mark.parametrize("place", ["score", "score/.claims", "evaluate/sft"])
def test_a_run_writes_below_its_own_directory(
    root: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    stage = place.split("/")[0]
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").write_text("theirs")
    if place == stage:
        shutil.rmtree(root / "run" / stage)
    else:
        (root / "run" / stage / MANIFEST).unlink()
        shutil.rmtree(root / "run" / place, ignore_errors=True)
    (root / "run" / place).symlink_to(elsewhere)
    refused(capsys, [stage, "recipe.yaml"], 2, f"run/{place} is a link to")
    assert [path.name for path in elsewhere.iterdir()] == ["theirs"]
