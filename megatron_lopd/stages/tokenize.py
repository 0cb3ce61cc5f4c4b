"""SFT text to tokens, when the answers to train on come from a file and not from `generate`.

The artifact is of the same kind as generate's, so `sft` reads either: prompt and response ids, the end
token in the response; nothing was sampled, so there are no behaviour log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lopd.artifacts.files import sha256_file
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.config import Recipe
from megatron_lopd.convert.hf_checkpoint import VOICE, copy_files
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import shard_name
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import write_shard
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.shard_jobs import count_rollouts
from megatron_lopd.pipeline.stage import Output, Plan
from megatron_lopd.prompts.rows import read_conversations


def check(recipe: Recipe) -> list[str]:
    data = _data(recipe)
    student = Path(inputs.base_student(recipe).model)
    Chat(str(student))
    return [f"tokenize {data} with {student}'s chat template"]


def plan(recipe: Recipe) -> Plan:
    data, student = _data(recipe), inputs.base_student_parent(recipe)
    parents = {"data": Parent("file", str(data), {"sha256": sha256_file(data)}), "student": student}
    declared = inputs.sft_config(recipe).teacher
    if declared is not None:
        parents["teacher"] = inputs.parent_of_model(Path(declared))
    return Plan({"max_tokens": inputs.sft_config(recipe).micro_batch_tokens}, parents, "declared")


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    student = Path(inputs.base_student(recipe).model)
    name = shard_name(ROLLOUTS, 0)
    write_shard(
        directory / name, ROLLOUTS, _tokenized(_data(recipe), Chat(str(student)), plan.config["max_tokens"])
    )
    voice = copy_files(student, directory / "tokenizer", VOICE)
    return Output([name, *(f"tokenizer/{file}" for file in voice)], count_rollouts(directory))


def _tokenized(data: Path, chat: Chat, max_tokens: int) -> Iterator[Rollout]:
    for conversation in read_conversations(data):
        prompt, response = chat.conversation(
            conversation.messages, f"{data}: sample {conversation.id}", max_tokens
        )
        yield Rollout(f"{conversation.id}/0", prompt, response, "stop", None)


def _data(recipe: Recipe) -> Path:
    data = inputs.sft_config(recipe).data
    if data is None:
        raise ConfigError("missing key sft.data: a JSONL file of {messages} to fine-tune on")
    if not Path(data).is_file():
        raise DataError(f"sft.data: {data}: no such file")
    return Path(data)
