"""What a grader says of a shard of responses, kept beside the claims until the evaluation is committed.

So every worker grades, shards as they are finished, and what is graded survives a kill.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import shard_paths
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import fsync_file
from megatron_lopd.graders import Grader, Verdict, open_grader
from megatron_lopd.pipeline.workers import Derived
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.runtime.claim_files import CLAIMS


class Marker:
    """Grades shards of responses to `prompts`, which the tokenizer in `voice_dir` turns into text."""

    def __init__(self, prompts: Sequence[Prompt], voice_dir: Path, trust_remote_code: bool) -> None:
        self._prompts: Mapping[str, Prompt] = {prompt.id: prompt for prompt in prompts}
        self._chat = Chat(str(voice_dir), trust_remote_code)

    def part(self, shard: Path, grader: str, directory: Path) -> Derived:
        """The verdicts on a shard as a part of the work in `directory`."""

        def write(path: Path, tick: Callable[[], None]) -> None:
            with open_grader(grader) as opened:
                plain = [astuple(verdict) for _, verdict in self._verdicts(shard, opened, tick)]
            text = canonical_json(plain)
            with path.open("w") as stream:  # no directory for it where all is committed
                json.dump({"sha256": sha256_bytes(text), "verdicts": plain}, stream)
            fsync_file(path)

        return Derived(_kept(shard, directory), shard, write)

    def by_prompt(self, directory: Path, grader: Grader, kept_in: Path) -> dict[str, list[Verdict]]:
        """The verdict on each response in a directory of rollouts, by prompt id.

        Those kept in `kept_in` are taken from there, the others made. DataError where one is damaged.
        """
        verdicts: dict[str, list[Verdict]] = defaultdict(list)
        for shard in shard_paths(ROLLOUTS, directory):
            kept = _kept(shard, kept_in)
            reader = ShardReader(ROLLOUTS, [shard])
            if kept.is_file():
                ids = [reader.sample_ids[index] for index in range(len(reader))]
                found = list(zip(ids, _read(kept, len(reader)), strict=True))
            else:
                found = self._verdicts(shard, grader, lambda: None)
            for sample_id, verdict in found:
                verdicts[self._prompt_of(sample_id).id].append(verdict)
        return verdicts

    def _prompt_of(self, sample_id: str) -> Prompt:
        return self._prompts[sample_id.rpartition("/")[0]]

    def _verdicts(self, shard: Path, grader: Grader, tick: Callable[[], None]) -> list[tuple[str, Verdict]]:
        found = []
        for rollout in ShardReader(ROLLOUTS, [shard]):
            tick()
            verdict = Verdict(False)
            if rollout.finish_reason == "stop":
                text = self._chat.decode(rollout.response_tokens)
                verdict = grader.grade(self._prompt_of(rollout.sample_id), text)
            found.append((rollout.sample_id, verdict))
        return found


def _kept(shard: Path, directory: Path) -> Path:
    return directory / CLAIMS / f"verdicts-{shard.stem}"


def _read(path: Path, count: int) -> list[Verdict]:
    plain = read_json(path)
    try:
        verdicts = [Verdict(*each) for each in plain["verdicts"]]
        whole = plain["sha256"] == sha256_bytes(canonical_json(plain["verdicts"])) and len(verdicts) == count
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{path}: damaged: remove it, and run the same command again to grade anew")
    return verdicts
