"""All that can go wrong with text, looked at before anything is spent: vocabularies, templates, every prompt.

Each stage looks at its own part, and `lopd plan` at them all; a part is looked at once a process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.reading import open_file
from megatron_lopd.pipeline.encoded import longest_prompt, read_notes
from megatron_lopd.pipeline.resolved import ONLY_SET, Model, ResolvedRun

if TYPE_CHECKING:
    from megatron_lopd.data.chat import Chat
    from megatron_lopd.data.records import Rollout
    from megatron_lopd.prompts.prompt import Prompt


def check_text(run: ResolvedRun) -> list[str]:
    """Everything here, of the models and prompts that the recipe has; notes, a line each.

    Raises as the parts do. A model that is not here yet has no tokenizer to ask.
    """
    recipe = run.recipe
    named = [*([run.teacher] if recipe.teacher else []), *([run.student] if recipe.student else [])]
    if absent := [model for model in named if not model.directory.is_dir()]:
        return [f"prompts are not looked at: {absent[0].directory} ({absent[0].key}) is not here"]
    notes: list[str] = []
    check_vocabularies(run)
    if recipe.sft is not None and recipe.sft.data is not None:
        notes += check_conversations(run)
    elif recipe.sft is not None and recipe.sft.checkpoint is None:
        notes += run.generate.check()
    if recipe.train is not None:
        check_top_k(run)
        notes += run.rollout.check()
    if recipe.prompts.eval is not None:
        check_sets(run)
        notes += check_evaluated(run) if recipe.sft is not None else []
    return notes


def check_vocabularies(run: ResolvedRun) -> None:
    """Raise ConfigError unless every model has a row for each token of teacher and student.

    More rows than tokens are padding, and need not be as many in each.
    """
    models = [model for model in _models(run) if model.directory.is_dir()]
    for model in models:
        rows = model.architecture.vocab_size
        for speaker in sorted(models, key=lambda each: each != model):  # itself first
            largest = int(run.spoken(speaker)[-1])
            if largest >= rows:
                whose = "its" if speaker == model else f"{speaker.directory}'s"
                raise ConfigError(
                    f"{model.key or model.directory}: {model.directory} has vocab_size={rows}, too few for "
                    f"token {largest} of {whose} tokenizer: give models with a row for each token of one "
                    "tokenizer"
                )


def _models(run: ResolvedRun) -> Iterator[Model]:
    """Whose tokens meet."""
    recipe = run.recipe
    if recipe.teacher is not None:
        yield run.teacher
    if recipe.sft is not None and recipe.sft.checkpoint is not None:
        yield run.reference
    elif recipe.student is not None:
        yield run.student
    if recipe.train is not None and recipe.train.checkpoint is not None:
        yield run.start


def check_top_k(run: ResolvedRun) -> None:
    """Raise ConfigError when the teacher does not have as many tokens as are to be kept."""
    top_k, vocabulary = run.recipe.score.top_k, run.teacher.architecture.vocab_size
    most = min(len(run.spoken(run.teacher)), vocabulary - 2)
    if top_k > most:
        raise ConfigError(
            f"score.top_k={top_k} leaves none of the teacher's vocab_size={vocabulary} tokens over "
            f"beside the response token: lower it to at most {most}"
        )


def check_sets(run: ResolvedRun) -> dict[str, list[Prompt]]:
    """The prompts of each set to evaluate on. Raises when one of them could not be graded."""
    from megatron_lopd.graders import open_grader

    with open_grader(run.recipe.evaluate.grader) as grader:
        sets = {name: each.prompts for name, each in run.evaluation_sets.items()}
        for prompts in sets.values():
            grader.require(prompts)
    return sets


def check_evaluated(run: ResolvedRun) -> list[str]:
    """Raise unless every prompt to evaluate on can be encoded for every model; notes."""
    settings = run.recipe.evaluate
    shaped = [run.reference if run.reference.directory.is_dir() else run.student]
    if settings.teacher and run.teacher.directory.is_dir():
        shaped.append(run.teacher)
    limit = min(longest_prompt(model.directory, settings.sampling, None, "evaluate") for model in shaped)
    notes = []
    for name in run.evaluation_sets:
        of_set = "" if name == ONLY_SET else f"{name}: "
        found = run.encoded_set(name, run.voice, limit).notes
        notes += [f"{of_set}{note}" for note in found]
    return notes


def check_conversations(run: ResolvedRun) -> list[str]:
    """Raise DataError, naming file and line, for a conversation of sft.data that cannot be trained on.

    Returns notes, a line each.
    """
    chat = student_chat(run)
    deque(tokenized(run, chat), maxlen=0)
    return read_notes(chat)


def student_chat(run: ResolvedRun) -> Chat:
    """What reads sft.data. Raises as `Chat` does."""
    from megatron_lopd.data.chat import Chat

    run.student.require()
    return Chat(str(run.student.directory))


def tokenized(run: ResolvedRun, chat: Chat) -> Iterator[Rollout]:
    """The conversations of sft.data as rollouts that nobody sampled.

    Raises DataError naming file:line, as Chat.conversations does.
    """
    from megatron_lopd.data.records import Rollout
    from megatron_lopd.prompts.rows import read_conversations

    limits = {
        "sft.micro_batch_tokens": run.sft.micro_batch_tokens,
        "the student's max_position_embeddings": run.student.architecture.max_positions,
    }
    tightest = min(limits, key=lambda name: limits[name])
    conversations = read_conversations(data_file(run))
    named = [(f"{where}: sample {each.id}", each.messages) for where, each in conversations]
    read = chat.conversations(named, limits[tightest], tightest)
    for (_, conversation), (prompt, response) in zip(conversations, read, strict=True):
        yield Rollout(f"{conversation.id}/0", prompt, response, "stop", None)


def data_file(run: ResolvedRun) -> Path:
    """sft.data. ConfigError where the recipe has none, DataError where it is not there."""
    data = run.sft.data
    if data is None:
        raise ConfigError("missing key sft.data: a JSONL file of {messages} to fine-tune on")
    try:
        open_file(Path(data)).close()
    except DataError as error:
        raise type(error)(f"sft.data: {error}") from None
    return Path(data)
