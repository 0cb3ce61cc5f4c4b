"""SFT text to tokens, when the answers to train on come from a file and not from `generate`.

The artifact is of the same kind as generate's, so `sft` reads either: prompt and response ids, the end
token in the response; nothing was sampled, so there are no behaviour log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.digest_cache import digest_of, require_as_hashed
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.files.digests import sha256_file
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of
from megatron_lopd.pipeline.text_checks import (
    check_conversations,
    check_vocabularies,
    data_file,
    student_chat,
    tokenized,
)

if TYPE_CHECKING:
    from megatron_lopd.data.chat import Chat
    from megatron_lopd.data.records import Rollout


class TokenizeStage(Stage):
    """Conversations as prompt and response ids, with the student's tokenizer."""

    name, kind = "tokenize", "rollouts"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.sft is not None and run.recipe.sft.data is not None

    def on_gpu(self, run: ResolvedRun) -> bool:
        return False

    def check(self, run: ResolvedRun) -> list[str]:
        data = data_file(run)
        check_vocabularies(run)
        notes = [] if run.is_committed(self.name) else check_conversations(run)
        return [f"tokenize {data} with {run.student.directory}'s chat template", *notes]

    def plan(self, run: ResolvedRun) -> Plan:
        data = data_file(run)
        parents = {
            "data": Parent(
                "file", str(data), {"sha256": digest_of("sft.data", [data], lambda: sha256_file(data))}
            ),
            "student": run.student_parent,
        }
        if run.sft.teacher is not None:
            parents["teacher"] = Model(Path(run.sft.teacher), "sft.teacher").parent
        return Plan({}, parents, "declared")

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.convert.hf_checkpoint import copy_voice
        from megatron_lopd.data.dataset import shard_name
        from megatron_lopd.data.schemas import ROLLOUTS
        from megatron_lopd.data.shards import ShardReader, write_shard
        from megatron_lopd.pipeline.shard_jobs import count_rollouts

        directory, chat = run.directory_of(self.name), student_chat(run)
        name = shard_name(ROLLOUTS, 0)
        write_shard(directory / name, ROLLOUTS, _as_hashed(run, chat), identity_of(plan))
        voice = copy_voice(run.student.directory, directory / "tokenizer", chat.end_tokens)
        return Output(
            [name, *(f"tokenizer/{file}" for file in voice)],
            count_rollouts(ShardReader(ROLLOUTS, [directory / name])),
        )


def _as_hashed(run: ResolvedRun, chat: Chat) -> Iterator[Rollout]:
    """As `tokenized`. DataError where the file is not the one that was hashed for the plan."""
    yield from tokenized(run, chat)
    require_as_hashed([data_file(run)])
