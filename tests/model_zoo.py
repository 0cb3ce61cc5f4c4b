"""Tiny random Hugging Face checkpoints of every supported architecture, as whole model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_lopd.data.records import Rollout

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")
_CONFIGS: dict[Family, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHARACTERS = "0123456789+-*=() abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!:;\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(size: int = 0) -> PreTrainedTokenizerFast:
    """One token a character of CHARACTERS, with an end token, a pad token and a chat template.

    And as many more, which no text has in it, as make it `size` tokens.
    """
    vocabulary = [PAD, END, USER, ASSISTANT, "<|unknown|>", *CHARACTERS]
    vocabulary += [f"<|{number}|>" for number in range(len(vocabulary), size)]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token="<|unknown|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token="<|unknown|>",
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(family: Family, *, tied: bool = False, **sizes: Any) -> Any:
    """A transformers config: 4 layers, hidden 32, 4 heads over 2 groups, a vocabulary of 131 (odd)."""
    values: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family.startswith("qwen3"):
        values["head_dim"] = 16  # not hidden / heads, as in the real ones
    if family == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        values |= {"norm_topk_prob": True}
    return _CONFIGS[family](**{**values, **sizes})


def make_model_dir(
    directory: Path,
    family: Family = "qwen3",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.3,
    max_shard_size: str = "5GB",
    config: Any = None,
    tokens: int | None = None,
    **sizes: Any,
) -> Path:
    """Write weights, config, generation config and tokenizer to `directory`; returns it.

    `config`: a transformers config of another family than these, in place of `family`, `tied` and `sizes`.
    `tokens`: the tokenizer's; None is one for every row of the model.
    Every weight is random, biases and norms too: a missing or swapped one must show. `std` is large, so
    that attention and logits are far from uniform.
    """
    if config is None:
        config = make_config(family, tied=tied, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            weight.copy_(torch.empty(weight.shape).normal_(center, std, generator=generator))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer(config.vocab_size if tokens is None else tokens).save_pretrained(directory)
    return directory


def contents(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A model directory's tensors by name as (dtype, shape, bytes), and every other file."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a safe_open file is no mapping
                value = file.get_tensor(name)
                data = value.contiguous().view(torch.uint8).numpy().tobytes()
                tensors[name] = (value.dtype, tuple(value.shape), data)
    files = {path.name: path.read_bytes() for path in directory.iterdir() if "safetensors" not in path.name}
    return tensors, files


def unsampled(sample_id: str, prompt: Any, response: Any) -> Rollout:
    """Tokens int32 [P] and int32 [T] for an engine to score, which no sampler made."""
    return Rollout(sample_id, prompt, response, "length", None)
