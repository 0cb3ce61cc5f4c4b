"""SFT text to tokens, when the answers to train on come from a file and not from `generate`.

The artifact is of the same kind as generate's, so `sft` reads either: prompt and response ids, the end
token in the response; nothing was sampled, so there are no behaviour log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.digests import sha256_file
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of

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
        from megatron_lopd.data.chat import Chat

        data, student = _data(run), run.student
        student.require()
        Chat(str(student.directory))
        return [f"tokenize {data} with {student.directory}'s chat template"]

    def plan(self, run: ResolvedRun) -> Plan:
        data = _data(run)
        parents = {
            "data": Parent("file", str(data), {"sha256": sha256_file(data)}),
            "student": run.student_parent,
        }
        if run.sft.teacher is not None:
            parents["teacher"] = Model(Path(run.sft.teacher), "sft.teacher").parent
        return Plan({}, parents, "declared")

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.convert.hf_checkpoint import copy_voice
        from megatron_lopd.data.chat import Chat
        from megatron_lopd.data.dataset import shard_name
        from megatron_lopd.data.schemas import ROLLOUTS
        from megatron_lopd.data.shards import ShardReader, write_shard
        from megatron_lopd.pipeline.shard_jobs import count_rollouts

        directory, student = run.directory_of(self.name), run.student.directory
        name = shard_name(ROLLOUTS, 0)
        limits = {
            "sft.micro_batch_tokens": run.sft.micro_batch_tokens,
            "the student's max_position_embeddings": run.student.architecture.max_positions,
        }
        records = _tokenized(_data(run), Chat(str(student)), limits)
        write_shard(directory / name, ROLLOUTS, records, identity_of(plan))
        voice = copy_voice(student, directory / "tokenizer")
        return Output(
            [name, *(f"tokenizer/{file}" for file in voice)],
            count_rollouts(ShardReader(ROLLOUTS, [directory / name])),
        )


def _tokenized(data: Path, chat: Chat, limits: Mapping[str, int]) -> Iterator[Rollout]:
    """Raises DataError naming file:line, as Chat.conversation does."""
    from megatron_lopd.data.records import Rollout
    from megatron_lopd.prompts.rows import read_conversations

    tightest = min(limits, key=lambda name: limits[name])
    for where, conversation in read_conversations(data):
        name = f"{where}: sample {conversation.id}"
        prompt, response = chat.conversation(conversation.messages, name, limits[tightest], tightest)
        yield Rollout(f"{conversation.id}/0", prompt, response, "stop", None)


def _data(run: ResolvedRun) -> Path:
    data = run.sft.data
    if data is None:
        raise ConfigError("missing key sft.data: a JSONL file of {messages} to fine-tune on")
    if not Path(data).is_file():
        raise DataError(f"sft.data: {data}: no such file")
    return Path(data)
