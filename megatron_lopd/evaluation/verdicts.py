"""What a grader says of a shard of responses, kept beside the claims until the evaluation is committed.

So every worker grades, shards as they are finished, and what is graded survives a kill.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import islice
from pathlib import Path

from megatron_lopd.data.arrow_file import ShardFile, path_of
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.data.thought import ThoughtMarks
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import fsync_file
from megatron_lopd.graders import Grader, Verdict, open_grader
from megatron_lopd.graders.sandbox import CPU_SECONDS
from megatron_lopd.pipeline.workers import Derived
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.runtime.claim_files import CLAIMS

AT_ONCE = 1024  # responses whose texts are held


class Marker:
    """Grades shards of responses to `prompts`, which the tokenizer in `voice_dir` turns into text.

    A response may take `seconds_each` on the mean of what is graded together.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        voice_dir: Path,
        trust_remote_code: bool,
        seconds_each: float = CPU_SECONDS,
    ) -> None:
        self._prompts: Mapping[str, Prompt] = {prompt.id: prompt for prompt in prompts}
        self._marks = ThoughtMarks(Chat(str(voice_dir), trust_remote_code).tokenizer)
        self._seconds_each = seconds_each

    def text(self, rollout: Rollout) -> str:
        """A response as a grader is shown it."""
        return self._marks.text(rollout.prompt_tokens, rollout.response_tokens)

    def part(self, shard: ShardFile, grader: str, directory: Path) -> Derived:
        """The verdicts on a shard as a part of the work in `directory`."""

        def write(path: Path, tick: Callable[[], None]) -> None:
            with open_grader(grader) as opened:
                plain = [astuple(verdict) for _, verdict in self._verdicts(shard, opened, tick)]
            text = canonical_json(plain)
            with path.open("x") as stream:  # no directory for it where all is committed
                json.dump({"sha256": sha256_bytes(text), "verdicts": plain}, stream)
            fsync_file(path)

        return Derived(_kept(path_of(shard), directory), path_of(shard), write)

    def by_prompt(
        self, shards: Sequence[ShardFile], grader: Grader, kept_in: Path
    ) -> dict[str, list[Verdict]]:
        """The verdict on each response in shards of rollouts, by prompt id.

        Those kept in `kept_in` are taken from there, the others made. DataError where one is damaged.
        """
        verdicts: dict[str, list[Verdict]] = defaultdict(list)
        for shard in shards:
            kept = _kept(path_of(shard), kept_in)
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

    def _verdicts(
        self, shard: ShardFile, grader: Grader, tick: Callable[[], None]
    ) -> list[tuple[str, Verdict]]:
        found: list[tuple[str, Verdict]] = []
        records = iter(ShardReader(ROLLOUTS, [shard]))
        while some := list(islice(records, AT_ONCE)):
            asked = [
                (self._prompt_of(each.sample_id), self.text(each))
                for each in some
                if each.finish_reason == "stop"
            ]
            verdicts = iter(grader.grade_all(asked, self._seconds_each * len(asked)))
            for each in some:
                tick()
                verdict = next(verdicts) if each.finish_reason == "stop" else Verdict(False)
                found.append((each.sample_id, verdict))
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
