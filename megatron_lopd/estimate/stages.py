"""What each stage of a recipe has to do, how long, and what of it was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_lopd.config import EngineConfig, PromptSource, Recipe, Sampling, TrainingConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.gpu_kinds import GpuCluster
from megatron_lopd.estimate.hours import (
    DECODING,
    UTILIZATION,
    TokenWork,
    bubble,
    compute_hours,
    decoding_hours,
    forward_flops,
    training_flops,
)
from megatron_lopd.estimate.memory import ENGINE_SHARE, EngineMemory, engine_memory
from megatron_lopd.families.memory_shapes import Shape, read_shape
from megatron_lopd.prompts.reader import reader_of
from megatron_lopd.registry import ENGINES

# Where no file of prompts is here to be looked at.
PROMPT_TOKENS = 150
# Of English text and mathematics, by Qwen3's and Llama 3's tokenizers, roughly.
BYTES_A_TOKEN = 4
# A checkpoint's bytes of a weight beside the weight itself: its fp32 master, and Adam's two moments.
CHECKPOINT = 12
# Bytes kept of a response token (tools/bench/README.md, store.py): of a rollout, id and behaviour log-prob;
# of a score its log-prob, and with a top k a tail log-prob, and an id and a log-prob each.
ROLLOUT, SCORE, SCORE_TAIL, SCORE_TOP_K = 7.4, 4.0, 4.0, 4.25


@dataclass(frozen=True)
class StageEstimate:
    """One stage: `samples` of on average `prompt` and `response` tokens; FLOPs; GPU-hours on the cluster's
    GPU.

    `engine` is what samples or scores; None where the stage trains. `disk`: bytes of its artifact.
    """

    name: str
    model: str
    work: TokenWork
    flops: float
    gpu_hours: float
    engine: EngineMemory | None
    disk: float


@dataclass
class Sizing:
    """How much a recipe asks for. `fill`: average response, as a share of `max_new_tokens`.

    `assumptions` gathers what the recipe and its files do not say.
    """

    recipe: Recipe
    cluster: GpuCluster
    fill: float
    assumptions: list[str] = field(default_factory=list)

    @cached_property
    def teacher(self) -> Shape:
        """Raises ConfigError where the recipe names none, or one of no known shape."""
        if self.recipe.teacher is None:
            raise ConfigError("teacher.model is missing: give the Hugging Face directory of the teacher")
        return self._shape(self.recipe.teacher.model)

    @cached_property
    def student(self) -> Shape:
        """Raises ConfigError where the recipe names none, or one of no known shape."""
        sft = self.recipe.sft
        if sft is not None and sft.checkpoint is not None:
            return self._shape(sft.checkpoint)
        if self.recipe.student is None:
            raise ConfigError("student.model is missing: give the Hugging Face directory of the base student")
        return self._shape(self.recipe.student.model)

    def stages(self) -> Iterator[StageEstimate]:
        """Those that `lopd run` would run and that take a GPU, in order."""
        recipe = self.recipe
        sft_trains = recipe.sft is not None and recipe.sft.checkpoint is None
        if recipe.sft is not None and sft_trains:
            yield from self._sft(recipe.sft)
        if recipe.train is not None:
            yield from self._opd(recipe.train)
        if recipe.prompts.eval is not None and recipe.sft is not None:
            yield from self._evaluate(recipe.prompts.eval)

    def _sft(self, config: TrainingConfig) -> Iterator[StageEstimate]:
        sampling, source = self.recipe.generate.sampling, self.recipe.prompts.sft
        work = self._sampled("sft", source, sampling, config)
        if self.recipe.sft is not None and self.recipe.sft.data is None:
            yield self._decode("generate", "teacher", work, self.recipe.generate.engine)
        else:
            self.assume(
                f"sft.data: answers are as long as generate.sampling.max_new_tokens="
                f"{sampling.max_new_tokens} allows"
            )
        yield self._trained("sft", config, work)

    def _opd(self, config: TrainingConfig) -> Iterator[StageEstimate]:
        recipe, score = self.recipe, self.recipe.score
        work = self._sampled("opd", recipe.prompts.opd, recipe.rollout.sampling, config)
        if recipe.train is not None and recipe.train.refresh_every is not None:
            self.assume("train.refresh_every: rollout and score are counted once, not at each refresh")
        yield self._decode("rollout", "student", work, recipe.rollout.engine)
        top_k = SCORE_TAIL + SCORE_TOP_K * score.top_k if score.top_k else 0.0
        flops = forward_flops(self.teacher.arch, work)
        yield StageEstimate(
            name="score",
            model="teacher",
            work=work,
            flops=flops,
            gpu_hours=compute_hours(flops, self.cluster.gpu),
            engine=self._engine(
                "score", self.teacher, score.engine, work.prompt + recipe.rollout.sampling.max_new_tokens
            ),
            disk=work.samples * work.response * (SCORE + top_k),
        )
        yield self._trained("train", config, work)

    def _evaluate(self, sources: Mapping[str, PromptSource]) -> Iterator[StageEstimate]:
        """Sampled and greedy, before and after OPD, of every set that can be counted; the teacher too, where
        the recipe asks for it."""
        config = self.recipe.evaluate
        students = 2 if self.recipe.train is not None else 1
        sets = []
        for name, source in sources.items():
            if source.count is None and not _is_here(source):
                self.assume(f"prompts.eval {name}: {source.path} is not here, and is not counted")
            else:
                sets.append(self._prompts(f"eval {name}", source))
        if sets:
            count = sum(each for each, _ in sets)
            prompt = round(sum(each * tokens for each, tokens in sets) / count)
            answers = config.sampling.samples_per_prompt + 1
            for model, times in (("student", students), ("teacher", 1 if config.teacher else 0)):
                if times:
                    self.assume(
                        f"evaluate: {times} {model} model{'s' * (times > 1)} x {count} prompts x {answers} "
                        f"answers, {config.sampling.samples_per_prompt} sampled and 1 greedy"
                    )
                    work = TokenWork(count * times * answers, prompt, self._response(config.sampling))
                    yield self._decode("evaluate", model, work, config.engine)

    def _decode(self, name: str, model: str, work: TokenWork, config: EngineConfig) -> StageEstimate:
        shape = self.teacher if model == "teacher" else self.student
        sampling = getattr(self.recipe, name).sampling
        engine = self._engine(name, shape, config, work.prompt + sampling.max_new_tokens)
        hours = decoding_hours(shape, work, engine, _element(config), self.cluster.gpu)
        disk = work.samples * (work.response * ROLLOUT + work.prompt * 3)
        return StageEstimate(name, model, work, forward_flops(shape.arch, work), hours, engine, disk)

    def _engine(self, name: str, shape: Shape, config: EngineConfig, length: int) -> EngineMemory:
        kind = ENGINES[config.name]
        if text := kind.assumption():
            self.assume(text)
        memory, element = self.cluster.gpu.memory_bytes, _element(config)
        sizes = kind.sizes(config, self.cluster.node_size)
        share = kind.memory_share(config) or ENGINE_SHARE
        found = engine_memory(shape, element, config.batch_size, length, memory, sizes, share)
        if found is None:
            weights = shape.parameters * element / 1e9
            gpus = f"{sizes[-1]} x {self.cluster.gpu.name} ({memory / 1e9:.0f} GB each)"
            remedies = [
                *kind.too_large(name),
                *([f"set {name}.engine.dtype=bf16"] if config.dtype == "fp32" else []),
                "lower max_new_tokens",
            ]
            raise ConfigError(
                f"{name}: the model's {weights:.0f} GB of {config.dtype} weights and a sequence of {length} "
                f"tokens do not fit {gpus}: {', '.join(remedies)}, or plan for larger GPUs"
            )
        return found

    def _trained(self, name: str, config: TrainingConfig, data: TokenWork) -> StageEstimate:
        arch = self.student.arch
        steps = config.steps or (config.epochs or 0) * data.samples / config.global_batch_size
        work = TokenWork(steps * config.global_batch_size, data.prompt, data.response)
        parallel = self.recipe.parallel
        flops = training_flops(arch, work, parallel)
        replicas = max(1, self.cluster.count // (parallel.tensor * parallel.pipeline * parallel.context))
        step_tokens = config.global_batch_size * work.length
        waiting = bubble(parallel, step_tokens / (config.micro_batch_tokens * replicas))
        hours = compute_hours(flops, self.cluster.gpu) * (1 + waiting)
        element = 2 if self.recipe.precision == "bf16" else 4  # of the weights, here and as exported
        disk = self.student.parameters * ((element + CHECKPOINT) * config.keep_checkpoints + element)
        return StageEstimate(name, "student", work, flops, hours, None, disk)

    def _sampled(
        self, split: str, source: PromptSource | None, sampling: Sampling, config: TrainingConfig
    ) -> TokenWork:
        """The samples that a prompt split makes; as many as training takes where the prompts are not here."""
        response = self._response(sampling)
        if source is not None and (source.count is not None or _is_here(source)):
            count, prompt = self._prompts(split, source)
            return TokenWork(count * sampling.samples_per_prompt, prompt, response)
        if config.steps is None:
            raise ConfigError(
                f"prompts.{split}: there are no prompts here to count, and epochs are counted in them: give "
                f"prompts.{split}.count, or steps instead of epochs"
            )
        samples = config.steps * config.global_batch_size
        self.assume(
            f"prompts.{split}: not here, taken to give the {samples} samples of {config.steps} steps x "
            f"{config.global_batch_size}, each seen once, with prompts of {PROMPT_TOKENS} tokens"
        )
        return TokenWork(samples, PROMPT_TOKENS, response)

    def _prompts(self, split: str, source: PromptSource) -> tuple[int, int]:
        """(prompts, average tokens of one)."""
        if not _is_here(source):
            if source.count is None:
                raise ConfigError(
                    f"prompts.{split}.path: {source.path} is not here: give prompts.{split}.count"
                )
            self.assume(f"prompts.{split}: taken to be of {PROMPT_TOKENS} tokens")
            return source.count, PROMPT_TOKENS
        path = Path(str(source.path))
        rows = sum(1 for _ in reader_of(path, source.format).rows(path))
        if not rows:
            raise ConfigError(f"prompts.{split}.path: {path} is empty: put prompts into it")
        prompt = max(1, path.stat().st_size // rows // BYTES_A_TOKEN)
        self.assume(f"prompts.{split}: {prompt} tokens on average, {BYTES_A_TOKEN} bytes of the file each")
        return source.count or rows, prompt

    def _response(self, sampling: Sampling) -> int:
        return max(1, round(sampling.max_new_tokens * self.fill))

    def _shape(self, model_dir: str) -> Shape:
        shape = read_shape(model_dir)
        if shape.assumed is not None:
            self.assume(shape.assumed)
        return shape

    def assume(self, text: str) -> None:
        """Note an assumption, once."""
        if text not in self.assumptions:
            self.assumptions.append(text)

    def assume_rates(self) -> None:
        """What stands behind every figure in hours."""
        share = "reaches max_new_tokens" if self.fill == 1 else f"has {self.fill:g} of max_new_tokens"
        self.assume(f"the average response {share} (--fill)")
        self.assume("layers are Transformer Engine's: native ones keep about twice the activations")
        self.assume(f"decoding at {DECODING:.0%} of memory bandwidth")
        self.assume(f"training and scoring at {UTILIZATION:.0%} of bf16 peak, fitted to two published runs")
        if self.recipe.fp8 is not None:
            self.assume("fp8: hours are counted at the bf16 rate, an upper bound")


def _is_here(source: PromptSource) -> bool:
    return source.path is not None and Path(source.path).is_file()


def _element(config: EngineConfig) -> int:
    return 2 if config.dtype == "bf16" else 4
