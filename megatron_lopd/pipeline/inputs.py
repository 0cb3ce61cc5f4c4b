"""Where a stage finds its models, and the proofs it needs before it spends anything on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import (
    LINEAGE_FILE,
    WHOLE_MODEL,
    Evidence,
    Proof,
    model_parent,
    prove_parent,
    prove_same,
    read_model_lineage,
    short,
    worst,
)
from megatron_lopd.artifacts.manifest import (
    LineageStatus,
    Manifest,
    Parent,
    is_committed,
    load_manifest,
)
from megatron_lopd.config import (
    EngineConfig,
    PromptSource,
    Recipe,
    Sampling,
    ScoreConfig,
    SftConfig,
    StudentConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_lopd.data.chat import Chat
from megatron_lopd.errors import ConfigError, DataError, LineageError
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.pipeline.stage import directory_of, parent_manifest, unchanged_manifest
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.sources import load_prompts, prompts_parent

PROMPT_USES = {
    "sft": "the prompts that the teacher answers",
    "opd": "the prompts that the student rolls out",
    "eval": "prompts with answers to evaluate on",
}
ONLY_SET = "eval"  # the key of the recipe that it stands under
SAME_TEACHER = "the teacher that scores is the teacher that answered"
SAME_STUDENT = "the student that sampled is the student being trained"
SAME_TOKENS = "teacher and student share one tokenizer and one chat template"


def teacher_directory(recipe: Recipe) -> Path:
    """The teacher's checkpoint. ConfigError when the recipe names none."""
    if recipe.teacher is None:
        raise ConfigError("missing key teacher.model: the Hugging Face checkpoint directory of the teacher")
    return Path(recipe.teacher.model)


def teacher_parent(recipe: Recipe, stage: str) -> Parent:
    """The teacher's fingerprint; as recorded, once its stage is committed and the teacher is gone."""
    directory = directory_of(recipe, stage)
    if not teacher_directory(recipe).exists() and is_committed(directory):
        return load_manifest(directory).parents["teacher"]
    return parent_of_model(teacher_directory(recipe))


def check_top_k(recipe: Recipe) -> None:
    """Raise ConfigError when the teacher's vocabulary does not hold as many tokens as are to be kept."""
    top_k, vocabulary = recipe.score.top_k, read_architecture(teacher_directory(recipe)).vocab_size
    if top_k > vocabulary - 2:
        raise ConfigError(
            f"score.top_k={top_k} leaves none of the teacher's vocab_size={vocabulary} tokens over "
            f"beside the response token: lower it to at most {vocabulary - 2}"
        )


def scoring_of(recipe: Recipe) -> ScoreConfig:
    """The score section; what its engines leave empty of their layout is the recipe's."""

    def split(engine: EngineConfig) -> EngineConfig:
        return replace(engine, options=engine.options.over(recipe.parallel))

    agreement = recipe.score.agreement
    return replace(
        recipe.score,
        engine=split(recipe.score.engine),
        agreement=agreement and replace(agreement, engine=split(agreement.engine)),
    )


def base_student(recipe: Recipe) -> StudentConfig:
    """The student before SFT. ConfigError when the recipe names none."""
    if recipe.student is None:
        raise ConfigError(
            "missing key student.model: the Hugging Face checkpoint directory of the base student"
        )
    return recipe.student


def base_student_parent(recipe: Recipe) -> Parent:
    """The base student's fingerprint; one with random weights has the digest of its seed for them."""
    student = base_student(recipe)
    if student.init == "pretrained":
        return parent_of_model(Path(student.model))
    parts = fingerprint_model(student.model, weights=False).parts()
    return Parent("model", student.model, parts | {"weights": f"random, seed {recipe.seed}"})


def sft_config(recipe: Recipe) -> SftConfig:
    """The sft section. ConfigError when the recipe has none."""
    if recipe.sft is None:
        raise ConfigError(
            "missing section sft: how the student is fine-tuned, or sft.checkpoint made elsewhere"
        )
    return recipe.sft


def train_config(recipe: Recipe) -> TrainConfig:
    """The train section. ConfigError when the recipe has none."""
    if recipe.train is None:
        raise ConfigError("missing section train: how the student is trained from the cached scores")
    return recipe.train


def reference_directory(recipe: Recipe) -> Path:
    """pi_ref: the student after SFT, ours or one made elsewhere."""
    elsewhere = sft_config(recipe).checkpoint
    return Path(elsewhere) if elsewhere else directory_of(recipe, "sft") / "model"


def parent_of_model(directory: Path) -> Parent:
    """A model directory, fingerprinted now. LineageError when its own lineage file speaks of others."""
    read_model_lineage(directory)
    return model_parent(directory, fingerprint_model(directory))


def evidence(parent: Parent, who: str) -> Evidence:
    """A recorded parent as evidence: who it was, and where."""
    return Evidence(parent.digests, f"{who} ({parent.path})")


def prove_reference(recipe: Recipe, reference: Parent) -> tuple[Manifest, list[Proof]]:
    """The sft manifest, with the proofs that `reference` (pi_ref) is its model, and of whose answers.

    Raises LineageError when something does not hold, DataError when sft has not run or is damaged.
    """
    sft = unchanged_manifest(recipe, "sft")
    made = sft.parents["student"] if sft_config(recipe).checkpoint else _made_by_sft(recipe)
    proofs = [
        prove_same(
            "the reference student is what sft made",
            evidence(reference, "the reference student"),
            evidence(made, "sft's model"),
            parts=WHOLE_MODEL,
            allow=False,
        )
    ]
    data = sft.parents.get("data")
    if data is not None:
        stage = data.path  # generate or tokenize
        made_data = parent_manifest(recipe, stage)
        proofs.append(prove_parent("sft", stage, data, made_data, directory_of(recipe, stage)))
        if "teacher" in sft.parents:
            proofs.append(
                prove_same(
                    f"the SFT data's teacher is the one of {stage}",
                    evidence(sft.parents["teacher"], "sft's teacher"),
                    evidence(made_data.parents["teacher"], f"{stage}'s teacher"),
                    parts=WHOLE_MODEL,
                    allow=False,
                )
            )
    return sft, proofs


def _made_by_sft(recipe: Recipe) -> Parent:
    directory = directory_of(recipe, "sft") / "model"
    lineage = read_model_lineage(directory)
    if lineage is None:
        raise DataError(
            f"{directory / LINEAGE_FILE}: missing: restore it, or remove {directory.parent} to make it again"
        )
    return Parent("model", str(directory), lineage.model)


def prove_teacher(recipe: Recipe, sft: Manifest, scoring: Parent) -> list[Proof]:
    """Teacher consistency (arXiv 2604.13010): who scores is who answered. LineageError when not."""
    answered = sft.parents.get("teacher")
    if answered is None:
        raise LineageError(
            "refused: nothing says which teacher the SFT data came from: declare it with sft.teacher=PATH"
        )
    proof = prove_same(
        SAME_TEACHER,
        evidence(scoring, "the scoring teacher"),
        evidence(answered, "the SFT data's teacher"),
        parts=WHOLE_MODEL,
        allow=recipe.allow_teacher_mismatch,
    )
    return [Proof(proof.statement, worst([proof.status, sft.lineage]), proof.detail)]


def prove_tokenizer(recipe: Recipe, teacher: Parent, base: Parent) -> Proof:
    """The base student must read the same text as the same tokens; sft teaches it the chat template."""
    return prove_same(
        "teacher and base student share one tokenizer",
        evidence(teacher, "the teacher"),
        evidence(base, "the base student"),
        parts=("tokenizer",),
        allow=recipe.allow_teacher_mismatch,
    )


def prove_tokens(recipe: Recipe, teacher: Parent, student: Parent) -> Proof:
    """Teacher and student must read the same text as the same tokens."""
    return prove_same(
        SAME_TOKENS,
        evidence(teacher, "the teacher"),
        evidence(student, "the student"),
        parts=("tokenizer", "chat_template"),
        allow=recipe.allow_teacher_mismatch,
    )


def prove_training(recipe: Recipe, student: Parent) -> list[Proof]:
    """Everything `train` stands on, walked from the scores back to the teacher's answers.

    `student` is the model about to be trained. Raises LineageError at the first thing that does not
    hold, DataError for a damaged file.
    """
    sft, proofs = prove_reference(recipe, parent_of_model(reference_directory(recipe)))
    rollout, score = unchanged_manifest(recipe, "rollout"), unchanged_manifest(recipe, "score")
    proofs.append(prove_parent("rollout", "sft", rollout.parents["sft"], sft, directory_of(recipe, "sft")))
    proofs.append(
        prove_parent("score", "rollout", score.parents["rollouts"], rollout, directory_of(recipe, "rollout"))
    )
    proofs.append(
        prove_same(
            SAME_STUDENT,
            evidence(rollout.parents["student"], "the rollouts' student"),
            evidence(student, "the student to train"),
            parts=WHOLE_MODEL,
            allow=recipe.allow_teacher_mismatch,
        )
    )
    proofs += prove_teacher(recipe, sft, score.parents["teacher"])
    proofs.append(prove_tokens(recipe, score.parents["teacher"], rollout.parents["student"]))
    names = f"sft {short(sft.id)}, rollout {short(rollout.id)}, score {short(score.id)}"
    proofs.append(Proof("every file is what its manifest says", "proved", names))
    return proofs


def check_model(directory: Path) -> None:
    """Raise before anything is spent on a model that cannot be fingerprinted or talked to."""
    Chat(str(directory))
    read_architecture(directory)


def prompts_of(recipe: Recipe, use: Literal["sft", "opd"]) -> tuple[list[Prompt], Parent]:
    """The prompts for one use, and what a manifest says of them. ConfigError when the recipe has none."""
    source: PromptSource | None = getattr(recipe.prompts, use)
    if source is None:
        raise ConfigError(f"missing section prompts.{use}: {PROMPT_USES[use]}")
    prompts = load_prompts(source, use, recipe.seed)
    return prompts, prompts_parent(source, prompts)


def evaluation_sets(recipe: Recipe) -> dict[str, tuple[list[Prompt], Parent]]:
    """As `prompts_of`, of each set to evaluate on, by name; one that has none is called ONLY_SET."""
    if recipe.prompts.eval is None:
        raise ConfigError(f"missing section prompts.eval: {PROMPT_USES['eval']}")
    sets = {}
    for name, source in recipe.prompts.eval.items():
        prompts = load_prompts(source, "eval", recipe.seed)
        sets[name] = (prompts, prompts_parent(source, prompts))
    return sets


def longest_prompt(model_dir: Path, sampling: Sampling, training: TrainingConfig | None) -> int:
    """Tokens a prompt may have, so that it and its response fit the model and, if trained on, a micro-batch.

    Raises ConfigError when that leaves none.
    """
    limits = {"the model's max_position_embeddings": read_architecture(model_dir).max_positions}
    if training is not None:
        limits[f"{training.section}.micro_batch_tokens"] = training.micro_batch_tokens
    name = min(limits, key=lambda each: limits[each])
    left = limits[name] - sampling.max_new_tokens
    if left < 1:
        raise ConfigError(
            f"sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt within {name}="
            f"{limits[name]}: lower the one or raise the other"
        )
    return left


def status_of(proofs: list[Proof], *inherited: LineageStatus) -> LineageStatus:
    """What an artifact that rests on `proofs` and on its parents' lineage may say of itself."""
    return worst([*(proof.status for proof in proofs), *inherited])
