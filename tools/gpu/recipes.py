"""A whole run's recipe at a real model's sizes: Qwen3-0.6B's shape and vocabulary, random weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tools.gpu.context import CheckFailed

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "tools" / "bench" / "qwen3_0.6b"
# Its tokenizer has an entry for each character of the arithmetic task; the other entries stand for nothing.
TOKENIZER = ROOT / "examples" / "quickstart" / "student"
TOY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TOY |= {"head_dim": 16, "num_hidden_layers": 2, "vocab_size": 1003}


def write_recipe(folder: Path, toy: bool, layers: int | None = None, **sections: Any) -> Path:
    """Models `folder`/teacher and `folder`/student, and the recipe of a run of them in `folder`/run.

    `layers`: other than the shape's own. `sections` replace the recipe's.
    """
    sizes = dict(TOY) if toy else ({} if layers is None else {"num_hidden_layers": layers})
    for number, name in enumerate(("teacher", "student")):
        write_model(folder / name, seed=number, **sizes)
    samples, new_tokens = (16, 16) if toy else (64, 128)
    engine = {"batch_size": samples, "shard_samples": samples, "dtype": "bf16"}
    asked = {"sampling": {"max_new_tokens": new_tokens}, "engine": engine}
    prompts = {"task": "arithmetic", "count": samples}
    training = {
        "steps": 2 if toy else 6,
        "global_batch_size": samples // 2,
        "micro_batch_tokens": 1024 if toy else 8192,
        "checkpoint_every": 1 if toy else 3,
        "optimizer": {"lr": 1e-5},
    }
    recipe = {
        "run_dir": str(folder / "run"),
        "seed": 1,
        "precision": "bf16",
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "prompts": {"sft": prompts, "opd": prompts, "eval": prompts},
        "generate": asked,
        "sft": training,
        "rollout": asked,
        "score": {"engine": engine, "top_k": 64},
        "train": {"objective": "topk_reverse_kl", **training},
        "evaluate": {"grader": "arithmetic", **asked},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")
    return path


def write_model(directory: Path, seed: int, **sizes: Any) -> None:
    """A Hugging Face directory of SHAPE with `sizes`: bf16 weights drawn from the seed, and a tokenizer."""
    shape = json.loads((SHAPE / "config.json").read_text(encoding="utf-8"))
    special = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": None}
    config = AutoConfig.for_model(**(shape | special | sizes))
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, directory)
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"<|nothing {number}|>": number for number in range(len(words), config.vocab_size)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def run_stages(recipe: Path, *overrides: str) -> Iterator[tuple[str, float]]:
    """`lopd run`: (stage, its seconds) as each ends. Raises CheckFailed if it fails."""
    command = [sys.executable, "-m", "megatron_lopd.cli", "run", str(recipe), *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if done := re.search(r"lopd: (?:\[\d+/\d+\] )?(\w+): done in ([\d.]+) s", line):
            yield done[1], float(done[2])
    if code := process.wait():
        raise CheckFailed(f"lopd run ended with exit code {code}: its message is in the log")
