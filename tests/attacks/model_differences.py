"""Ways to change a small model so that it computes otherwise, or so that it is not one model to all loaders.

Each is given a generator and a model directory, which it changes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor

from tests.attacks.model_rewritings import (
    INDEX,
    SIZES,
    WEIGHTS,
    Way,
    config,
    edit,
    put,
    read,
    rope,
    settings,
    shard,
    template,
    tensors,
)
from tests.model_zoo import CHAT_TEMPLATE, PAD, USER, make_model_dir

FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def flip(random: Random, model: Path) -> None:
    """One bit of one tensor's bytes."""
    data = bytearray((model / WEIGHTS).read_bytes())
    data[random.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))] ^= 1 << random.randrange(8)
    (model / WEIGHTS).write_bytes(data)


def swap(random: Random, values: dict[str, Tensor]) -> None:
    one = random.choice([name for name in values if ".layers.0." in name])
    other = one.replace(".layers.0.", ".layers.1.")
    values[one], values[other] = values[other], values[one]


def round_one(random: Random, values: dict[str, Tensor]) -> None:
    name = random.choice(sorted(values))
    values[name] = values[name].to(random.choice([torch.bfloat16, torch.float16]))


def other_head(random: Random, values: dict[str, Tensor]) -> None:
    head = values["model.embed_tokens.weight"].clone()
    head[random.randrange(len(head)), 0] += random.choice([1e-3, 1.0])
    values["lm_head.weight"] = head


def nudge(random: Random, values: dict[str, Tensor]) -> None:
    values[random.choice(sorted(values))].view(-1)[0] += 1


def added(token: str, **flags: bool) -> Callable[[Random, dict[str, Any]], None]:
    """Of tokenizer.json."""

    def change(random: Random, tokenizer: dict[str, Any]) -> None:
        plain = dict.fromkeys(FLAGS[1:], False)
        known = {each["content"]: each for each in tokenizer["added_tokens"]}
        if token in known:
            known[token].update(flags)
        else:
            number = len(tokenizer["model"]["vocab"]) + len(known)
            tokenizer["added_tokens"].append({"id": number, "content": token, **plain, **flags})

    return change


def in_decoder(random: Random, config: dict[str, Any]) -> None:
    token = AddedToken("1+1", normalized=False, special=random.random() < 0.5)
    config["added_tokens_decoder"] = {"130": {key: getattr(token, key) for key in FLAGS}}


def swap_ids(random: Random, tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, other = random.sample(["a", "b", "c", "h", "1", "2"], 2)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def of_merges(change: Callable[[Random, list[Any]], Any]) -> Way:
    return edit("tokenizer.json", lambda random, value: change(random, value["model"]["merges"]))


def other_weights(random: Random, model: Path) -> None:
    make_model_dir(model.parent / "other", "qwen3", tied=True, seed=random.randrange(1, 99), **SIZES)
    shutil.move(model.parent / "other" / WEIGHTS, model / WEIGHTS)


def insert(random: Random, text: str) -> str:
    """A character between others, where the template prints it: not within a tag, nor beside one."""
    where = text.index("<|{{") if random.random() < 0.5 else text.index("<|end|>")
    return text[:where] + random.choice(" .\tx") + text[where:]


def digits_apart(random: Random, tokenizer: dict[str, Any]) -> None:
    first = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, tokenizer["pre_tokenizer"]]}


def old_rope(random: Random, config: dict[str, Any]) -> None:
    del config["rope_parameters"]
    config["rope_theta"] = random.choice([500.0, 5e5])


def slide(random: Random, config: dict[str, Any]) -> None:
    config.pop("layer_types", None)
    config |= {"use_sliding_window": True, "sliding_window": random.randint(2, 4), "max_window_layers": 0}


def either(*values: Any) -> Callable[[Random], Any]:
    """One of several, as the generator has it."""
    return lambda random: random.choice(values)


TOKENIZER, VOICE = "tokenizer.json", "tokenizer_config.json"
DIFFERENCES: dict[str, Way] = {
    "a bit": flip,
    "two layers exchanged": tensors(swap),
    "one tensor rounded": tensors(round_one),
    "another output layer though tied": tensors(other_head),
    "one value": tensors(nudge),
    "other weights": other_weights,
    "norm's epsilon": config(rms_norm_eps=either(1e-5, 1e-4, 1e-3)),
    "rotary base": rope(rope_theta=either(1e2, 1e3, 1e6)),
    "rotary base in the old place": edit("config.json", old_rope),
    "rotary scaling": rope(rope_type="linear", factor=either(2.0, 4.0)),
    "activation": config(hidden_act=either("gelu", "relu")),
    "a sliding window": edit("config.json", slide),
    "two ids exchanged": edit(TOKENIZER, swap_ids),
    "a merge less": of_merges(lambda random, merges: merges.pop(0)),
    "a token more": edit(TOKENIZER, added("1+1")),
    "a special token more": edit(TOKENIZER, added("34+", special=True)),
    "a token in the config": edit(VOICE, in_decoder),
    "a token in a file more": put("added_tokens.json", '{"1+1": 130}'),
    "an extra special token": settings(VOICE, extra_special_tokens=["1+1"]),
    "special tokens split": settings(VOICE, split_special_tokens=True),
    "a special token that is none": edit(TOKENIZER, added(USER, special=False)),
    "a token that takes spaces": edit(TOKENIZER, added(USER, rstrip=True)),
    "lower case": settings(TOKENIZER, normalizer={"type": "Lowercase"}),
    "a space put before": edit(
        TOKENIZER, lambda _, value: value["pre_tokenizer"].update(add_prefix_space=True)
    ),
    "digits apart": edit(TOKENIZER, digits_apart),
    "another decoder": settings(TOKENIZER, decoder={"type": "Fuse"}),
    "an end token of the tokenizer": settings(VOICE, eos_token=either(USER, PAD)),
    "an end token more": settings(
        "generation_config.json", eos_token_id=lambda random: [1, random.randint(2, 90)]
    ),
    "a template's character": template(insert),
    "a template's line break": template(lambda random, text: text.replace("<|end|>", "<|end|>\n")),
    "another template that hides the first": put(
        "additional_chat_templates/default.jinja", CHAT_TEMPLATE + "!"
    ),
}


def index_and(name: str) -> Way:
    """A sharded model, with weights beside it that its index does not list."""

    def way(random: Random, model: Path) -> None:
        values = load_file(model / WEIGHTS)
        shard(random, model)
        save_file({key: value + 1 for key, value in values.items()}, model / name, {"format": "pt"})

    return way


def spoil_index(change: Callable[[Random, dict[str, str]], Any]) -> Way:
    def way(random: Random, model: Path) -> None:
        while not (model / INDEX).exists() or len(set(read(model / INDEX)["weight_map"].values())) < 2:
            if (model / INDEX).exists():
                values = {}
                for name in set(read(model / INDEX)["weight_map"].values()):
                    values |= load_file(model / name)
                    (model / name).unlink()
                save_file(values, model / WEIGHTS, {"format": "pt"})
            shard(random, model)
        index = read(model / INDEX)
        change(random, index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return way


def misplace(random: Random, weight_map: dict[str, str]) -> None:
    name = random.choice(sorted(weight_map))
    weight_map[name] = next(place for place in weight_map.values() if place != weight_map[name])


def instead(make: Callable[[Path], Any]) -> Way:
    """Something else in the place of a file."""

    def way(random: Random, model: Path) -> None:
        path = model / random.choice([WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"])
        path.unlink()
        make(path)

    return way


def index_of_more(random: Random, model: Path) -> None:
    save_file({"x": torch.ones(1)}, model / "more.safetensors")
    put(INDEX, json.dumps({"weight_map": {"a": WEIGHTS, "x": "more.safetensors"}}))(random, model)


def key_twice(random: Random, model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", '{"rms_norm_eps": 1e-3, ', 1))


def copied_to(name: str) -> Way:
    """The weights again, under another name."""
    return lambda random, model: shutil.copy(model / WEIGHTS, model / name) and None


def naming(file: str) -> Way:
    """An index with a tensor in `file`."""
    return spoil_index(lambda random, weight_map: weight_map.update(more=file))


AMBIGUITIES: dict[str, Way] = {
    "a whole model beside an index": index_and(WEIGHTS),
    "weights beside an index": index_and("extra.safetensors"),
    "consolidated weights beside an index": index_and("consolidated.safetensors"),
    "another variant": copied_to("model.fp16.safetensors"),
    "an adapter's weights": copied_to("adapter_model.safetensors"),
    "an adapter": put("adapter_config.json", '{"base_model_name_or_path": "other"}'),
    "another index": put("model.fp16.safetensors.index.json", "{}"),
    "an index of one and of more": index_of_more,
    "a tensor elsewhere than the index has it": spoil_index(misplace),
    "a tensor that the index lacks": spoil_index(
        lambda random, names: names.pop(random.choice(sorted(names)))
    ),
    "a tensor that is not there": spoil_index(lambda _, names: names.update(more=next(iter(names.values())))),
    "a file outside": naming("../other.safetensors"),
    "a file by its whole path": naming("/tmp/other.safetensors"),
    "a file in a folder": naming("folder/other.safetensors"),
    "a pickle in the index": naming("pytorch_model.bin"),
    "a name that no file can have": naming("other\0.safetensors"),
    "a key that names other weights": config(transformers_weights="other.safetensors"),
    "a key that names other configurations": config(configuration_files=["config.4.0.0.json"]),
    "a key twice": key_twice,
    "two rotary bases": config(rope_theta=123.0),
    "a quantization for one loader": put("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
    "tokenizers by release": settings(VOICE, fast_tokenizer_files=["tokenizer.4.0.0.json"]),
    "a Mistral tokenizer": put("tekken.json", "{}"),
    "a tokenizer that draws at random": edit(
        "tokenizer.json", lambda random, value: value["model"].update(dropout=random.choice([0.1, 1.0]))
    ),
    "code that runs on loading": put("custom_generate/generate.py", "def generate(model): ..."),
    "code of another repository": config(auto_map={"AutoModelForCausalLM": "someone/else--module.Model"}),
    "a link to nothing": instead(lambda path: path.symlink_to("nowhere")),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
}


ODD = [None, True, -1, 0, 1e308, "", [], {}, "x" * 50, {"type": "Sequence"}, [None], 2**70]


def _spoilt(random: Random, value: Any) -> Any:
    """A JSON value with something else in one place, or one key less."""
    if not value or not isinstance(value, dict | list) or random.random() < 0.15:
        return random.choice(ODD)
    copy = value.copy()
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    if isinstance(copy, dict) and random.random() < 0.15:
        del copy[key]
    else:
        copy[key] = _spoilt(random, value[key])
    return copy


def spoil(random: Random, model: Path) -> None:
    """One JSON file, in one or two places."""
    path = model / random.choice(
        ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"]
    )
    value = read(path)
    for _ in range(random.randint(1, 2)):
        value = _spoilt(random, value)
    path.write_text(json.dumps(value))
