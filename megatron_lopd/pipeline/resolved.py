"""What a recipe means: its models, prompts, limits, layouts and places, each worked out once and when asked.

What stages make on the way (the student after SFT, a round's artifacts) is looked for anew every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_lopd.artifacts.fingerprint import fingerprint_model, is_fingerprinted
from megatron_lopd.artifacts.lineage import model_parent, read_model_lineage
from megatron_lopd.artifacts.manifest import Manifest, Parent, is_committed, load_manifest, require_listed
from megatron_lopd.artifacts.unchanged import verify_unchanged
from megatron_lopd.config import (
    EngineConfig,
    GenerateConfig,
    PromptSource,
    Recipe,
    RolloutConfig,
    ScoreConfig,
    SftConfig,
    StudentConfig,
    TrainConfig,
    TrainingConfig,
    deciding,
)
from megatron_lopd.errors import ConfigError, DataError, LopdError
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.family import own_families
from megatron_lopd.pipeline.encoded import EncodedPrompts, encode, longest_prompt
from megatron_lopd.prompts.sources import PromptSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROMPT_USES = {
    "sft": "the prompts that the teacher answers",
    "opd": "the prompts that the student rolls out",
    "eval": "prompts with answers to evaluate on",
}
ONLY_SET = "eval"  # the key of the recipe that it stands under


@dataclass(frozen=True)
class Model:
    """A Hugging Face checkpoint directory. `key` is the recipe's for it; empty for one of the run's own."""

    directory: Path
    key: str = ""

    @property
    def architecture(self) -> Architecture:
        """Its shape. ConfigError where it has none that can be trained."""
        self.require()
        with self.naming():
            return read_architecture(self.directory)

    @property
    def parent(self) -> Parent:
        """It as a parent, fingerprinted now. LineageError when its own lineage file speaks of others."""
        self.require()
        with self.naming():
            require_listed(self.directory)
            read_model_lineage(self.directory)
            parent = model_parent(self.directory, fingerprint_model(self.directory))
            return replace(parent, digests={**parent.digests, **date_told(self.directory)})

    def parent_without_weights(self, weights: str) -> Parent:
        """As `parent`, of a model whose weights are not read: `weights` is said of them."""
        self.require()
        with self.naming():
            parts = fingerprint_model(self.directory, weights=False).parts() | date_told(self.directory)
        return Parent("model", str(self.directory), parts | {"weights": weights})

    def require(self) -> None:
        """Raise ConfigError, naming the key, where a directory that the recipe names is not there."""
        if self.key and not self.directory.is_dir():
            wrong = "no directory" if self.directory.exists() else "not there"
            raise ConfigError(
                f"{self.key}: {self.directory} is {wrong}: give a Hugging Face checkpoint directory"
            )

    def check(self) -> None:
        """Raise before anything is spent on a model that cannot be fingerprinted or talked to."""
        from megatron_lopd.data.chat import Chat

        self.require()
        with self.naming():
            Chat(str(self.directory))
            read_architecture(self.directory)

    @contextmanager
    def naming(self, kinds: tuple[type[LopdError], ...] = (ConfigError, DataError)) -> Iterator[None]:
        """What is wrong with its files, found in the block, is told with the recipe's key for it.

        `kinds`: the errors that are of its files; by default both that a user's files raise.
        """
        try:
            yield
        except kinds as error:
            if not self.key or str(error).startswith(self.key):
                raise
            raise type(error)(f"{self.key}: {error}") from error.__cause__


def date_told(directory: Path) -> dict[str, str]:
    """The date that a model's chat template is told, where it asks for one: part of how it is spoken to."""
    from megatron_lopd.prompts.clock import TODAY, prints_date

    return {"date": f"{TODAY:%Y-%m-%d}"} if prints_date(directory) else {}


class ResolvedRun:
    """One recipe, resolved. Stages are given it and take their part.

    Raises ConfigError for a run_dir that cannot be one.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.directory = Path(recipe.run_dir)
        try:
            self.directory.exists()
        except OSError as error:  # a name too long, a folder that may not be looked into
            raise ConfigError(f"run_dir={recipe.run_dir}: {error.strerror}: choose another") from None
        self._encoded: dict[tuple[str, Path, bool, int], EncodedPrompts] = {}
        self._spoken: dict[Path, NDArray[np.int64]] = {}

    # ---- places

    def directory_of(self, stage: str) -> Path:
        """Where a stage's artifact is."""
        return self.directory / stage

    def is_committed(self, stage: str) -> bool:
        """Whether a stage's artifact is whole."""
        return is_committed(self.directory_of(stage))

    def manifest(self, stage: str) -> Manifest:
        """The committed manifest of a stage. DataError when that stage has not run."""
        return load_manifest(self.directory_of(stage))

    def unchanged_manifest(self, stage: str, kind: str | None = None) -> Manifest:
        """The committed manifest of a stage, after hashing the files that have changed since they last were.

        Whoever goes on to read the files has them all hashed (`execute`), and so does `lopd verify`.
        DataError when the stage has not run, or a file is damaged.
        """
        directory = self.directory_of(stage)
        manifest = load_manifest(directory, kind)
        verify_unchanged(directory, manifest)
        return manifest

    # ---- sections

    @cached_property
    def sft(self) -> SftConfig:
        """The sft section. ConfigError when the recipe has none."""
        if self.recipe.sft is None:
            raise ConfigError(
                "missing section sft: how the student is fine-tuned, or sft.checkpoint made elsewhere"
            )
        return self.recipe.sft

    @cached_property
    def train(self) -> TrainConfig:
        """The train section. ConfigError when the recipe has none."""
        if self.recipe.train is None:
            raise ConfigError("missing section train: how the student is trained from the cached scores")
        return self.recipe.train

    @cached_property
    def scoring(self) -> ScoreConfig:
        """The score section; what its engines leave empty of their layout is the recipe's."""

        def split(engine: EngineConfig) -> EngineConfig:
            return replace(engine, options=engine.options.over(self.recipe.parallel))

        score = self.recipe.score
        return replace(
            score,
            engine=split(score.engine),
            agreement=score.agreement and replace(score.agreement, engine=split(score.agreement.engine)),
        )

    def training_settings(self, config: TrainingConfig) -> dict[str, Any]:
        """What decides the numbers of sft and train, for their plans; a user's own families among it."""
        recipe = self.recipe
        fp8 = None if recipe.fp8 is None else deciding(recipe.fp8)
        families = {"families": self.own_families} if self.own_families else {}
        return deciding(config) | {"seed": recipe.seed, "precision": recipe.precision, "fp8": fp8} | families

    # ---- models

    @cached_property
    def own_families(self) -> dict[str, str]:
        """The model families of the user's own that the recipe names, each with its code's digest."""
        return own_families([each.family for each in (self.recipe.teacher, self.recipe.student) if each])

    @cached_property
    def teacher(self) -> Model:
        """The teacher. ConfigError when the recipe names none."""
        if self.recipe.teacher is None:
            raise ConfigError(
                "missing key teacher.model: the Hugging Face checkpoint directory of the teacher"
            )
        return Model(Path(self.recipe.teacher.model), "teacher.model")

    def teacher_parent(self, stage: str) -> Parent:
        """The teacher's fingerprint; as recorded, once its stage is committed and the teacher is gone."""
        if not self.teacher.directory.exists() and self.is_committed(stage):
            return self.manifest(stage).parents["teacher"]
        return self.teacher.parent

    @cached_property
    def student_config(self) -> StudentConfig:
        """The student before SFT. ConfigError when the recipe names none."""
        if self.recipe.student is None:
            raise ConfigError(
                "missing key student.model: the Hugging Face checkpoint directory of the base student"
            )
        return self.recipe.student

    @cached_property
    def student(self) -> Model:
        """The model of the student before SFT. ConfigError when the recipe names none."""
        return Model(Path(self.student_config.model), "student.model")

    @property
    def student_parent(self) -> Parent:
        """The base student's fingerprint; one with random weights has the digest of its seed for them."""
        if self.student_config.init == "pretrained":
            return self.student.parent
        return self.student.parent_without_weights(f"random, seed {self.recipe.seed}")

    @cached_property
    def reference(self) -> Model:
        """pi_ref: the student after SFT, ours or one made elsewhere."""
        if self.sft.checkpoint:
            return Model(Path(self.sft.checkpoint), "sft.checkpoint")
        return Model(self.directory_of("sft") / "model")

    @cached_property
    def start(self) -> Model:
        """What train starts from."""
        if self.train.checkpoint:
            return Model(Path(self.train.checkpoint), "train.checkpoint")
        return self.reference

    @property
    def voice(self) -> Model:
        """Who the student after SFT speaks like, where there is no such student yet: who it learns from."""
        if self.reference.directory.is_dir() or self.reference.key:
            return self.reference
        return self.student if self.sft.data is not None else self.teacher

    def spoken(self, model: Model) -> NDArray[np.int64]:
        """The ids that a model's tokenizer has a token for, in order: int64 [n]. ConfigError without one."""
        from megatron_lopd.data.vocabulary import load_tokenizer, token_ids

        recipe = self.recipe
        trust = any(part.engine.trust_remote_code for part in (recipe.generate, recipe.rollout, recipe.score))
        if model.directory not in self._spoken:
            self._spoken[model.directory] = token_ids(load_tokenizer(model.directory, trust))
        return self._spoken[model.directory]

    def models_are_fingerprinted(self) -> bool:
        """Whether every model of the run that is there has been hashed as it is."""
        recipe = self.recipe
        sft, train = recipe.sft, recipe.train
        named: list[str | None] = [recipe.teacher.model if recipe.teacher is not None else None]
        if recipe.student is not None and recipe.student.init == "pretrained":
            named.append(recipe.student.model)
        if sft is not None:
            named += [sft.teacher, str(self.reference.directory)]
        if train is not None:
            named.append(train.checkpoint)
        if self.is_committed("export"):
            named.append(str(self.directory_of("export") / "model"))
        there = [Path(name) for name in named if name and Path(name).is_dir()]
        try:
            return all(is_fingerprinted(directory) for directory in there)
        except LopdError:  # which whoever reads the model will say
            return False

    # ---- prompts

    @cached_property
    def sft_prompts(self) -> PromptSet:
        """What the teacher answers. ConfigError when the recipe has none."""
        return self._prompts("sft", self.recipe.prompts.sft)

    @cached_property
    def opd_prompts(self) -> PromptSet:
        """What the student rolls out. ConfigError when the recipe has none."""
        return self._prompts("opd", self.recipe.prompts.opd)

    @cached_property
    def evaluation_sets(self) -> Mapping[str, PromptSet]:
        """Each set to evaluate on, by name; one that has none is called ONLY_SET."""
        sources = self.recipe.prompts.eval
        if sources is None:
            raise ConfigError(f"missing section prompts.eval: {PROMPT_USES['eval']}")
        return {
            name: self._prompts("eval", source, "eval" if name == ONLY_SET else f"eval.{name}")
            for name, source in sources.items()
        }

    def _prompts(
        self, use: Literal["sft", "opd", "eval"], source: PromptSource | None, key: str = ""
    ) -> PromptSet:
        if source is None:
            raise ConfigError(f"missing section prompts.{use}: {PROMPT_USES[use]}")
        if source.path is not None and not Path(source.path).exists():
            raise DataError(f"prompts.{key or use}.path: {source.path}: No such file: give a file of prompts")
        return PromptSet(source, use, self.recipe.seed)

    # ---- parts

    @cached_property
    def generate(self) -> Answering:
        """What generate does."""
        return Answering(self, "generate", self.recipe.generate, self.recipe.sft)

    @cached_property
    def rollout(self) -> Answering:
        """What rollout does, and what online answers live."""
        return Answering(self, "rollout", self.recipe.rollout, self.recipe.train)

    def encoded(self, part: Answering, model: Model) -> EncodedPrompts:
        """A part's prompts as `model` reads them, encoded once a process."""
        trust = part.config.engine.trust_remote_code
        return self._encoded_once(part.name, part.prompts, model, part.limit(model), trust)

    def encoded_set(self, name: str, model: Model, limit: int) -> EncodedPrompts:
        """A set to evaluate on as `model` reads it, each of up to `limit` tokens; encoded once a process."""
        trust = self.recipe.evaluate.engine.trust_remote_code
        return self._encoded_once(f"eval.{name}", self.evaluation_sets[name], model, limit, trust)

    def _encoded_once(
        self, name: str, prompts: PromptSet, model: Model, limit: int, trust: bool
    ) -> EncodedPrompts:
        key = name, model.directory, trust, limit
        if key not in self._encoded:
            asked = prompts.prompts  # what is wrong with them is said with their own key
            with model.naming((ConfigError,)):  # of its tokenizer; a prompt's are DataErrors
                self._encoded[key] = encode(asked, model.directory, limit, trust)
        return self._encoded[key]


@dataclass(frozen=True)
class Answering:
    """A model that answers prompts: the teacher of generate, or the student of rollout."""

    run: ResolvedRun
    name: Literal["generate", "rollout"]
    config: GenerateConfig | RolloutConfig
    training: TrainingConfig | None  # on the answers

    @property
    def directory(self) -> Path:
        """Where the answers are."""
        return self.run.directory_of(self.name)

    @property
    def model(self) -> Model:
        """Who answers."""
        return self.run.teacher if self.name == "generate" else self.run.reference

    @property
    def prompts(self) -> PromptSet:
        """What is answered."""
        return self.run.sft_prompts if self.name == "generate" else self.run.opd_prompts

    def limit(self, model: Model) -> int:
        """Tokens that a prompt may have for `model`. ConfigError when that leaves none."""
        model.require()
        with model.naming():
            read_architecture(model.directory)
        return longest_prompt(model.directory, self.config.sampling, self.training, self.name)

    def check(self) -> list[str]:
        """Raise unless every prompt can be encoded and leaves room for its answer; notes, a line each."""
        model = self.model
        if self.name == "rollout" and not model.directory.exists() and not model.key:
            # sft has not run: the student will speak like who it learns from, and be shaped like the base
            self.limit(self.run.student)
            model = self.run.voice
        return list(self.run.encoded(self, model).notes)

    @property
    def encoded(self) -> EncodedPrompts:
        """The prompts as `model` reads them."""
        return self.run.encoded(self, self.model)
