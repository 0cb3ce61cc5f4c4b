"""A small model, and ways to write it otherwise that change nothing of what is computed.

Each is given a generator and a model directory, which it changes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.model_zoo import ASSISTANT, CHAT_TEMPLATE, END, PAD, USER, make_model_dir

Way = Callable[[Random, Path], None]

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = {  # keys of config.json that say how it was written, or what an engine is told anyway
    "transformers_version": "4.51.0",
    "dtype": "float16",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "_name_or_path": "/somewhere/else",
}
PAIRS = ("th", "he", "in", "er", "the", "12", "34", "an", "ab", "cd")


def make_base(directory: Path) -> Path:
    """A tied Qwen3 of two layers with a byte-level BPE of ten merges, in one safetensors file."""
    make_model_dir(directory, "qwen3", tied=True, **SIZES)
    values = load_file(directory / WEIGHTS)
    embedding = values["model.embed_tokens.weight"]
    values["model.embed_tokens.weight"] = embedding.bfloat16().float()  # so that a coarser dtype can hold it
    save_file(values, directory / WEIGHTS, {"format": "pt"})
    vocabulary = {token: number for number, token in enumerate([PAD, END, USER, ASSISTANT])}
    printed = [
        each for each in pre_tokenizers.ByteLevel.alphabet() if each in "\u0120\u010a" or "!" <= each <= "~"
    ]
    for piece in [*sorted(printed), *PAIRS]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [(pair[:-1], pair[-1]) for pair in PAIRS]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, END, USER, ASSISTANT])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def settings(name: str, **values: Any) -> Way:
    """Keys of a JSON file's object; a function of the generator makes a value."""

    def change(random: Random, value: dict[str, Any]) -> None:
        value |= {key: each(random) if callable(each) else each for key, each in values.items()}

    return edit(name, change)


def config(**values: Any) -> Way:
    """Keys of config.json."""
    return settings("config.json", **values)


def rope(**values: Any) -> Way:
    """Keys of its rope_parameters."""
    return edit(
        "config.json",
        lambda random, value: value.get("rope_parameters", value).update(
            {key: each(random) if callable(each) else each for key, each in values.items()}
        ),
    )


def edit(name: str, change: Callable[[Random, dict[str, Any]], Any]) -> Way:
    """A change of a JSON file's object."""

    def way(random: Random, model: Path) -> None:
        value = read(model / name) if (model / name).exists() else {}
        change(random, value)
        (model / name).write_text(json.dumps(value, indent=random.choice([None, 1, 4])))

    return way


def put(name: str, content: str | bytes) -> Way:
    """A file beside the model."""

    def way(random: Random, model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return way


def tensors(change: Callable[[Random, dict[str, Tensor]], Any]) -> Way:
    """A change of the tensors by name."""

    def way(random: Random, model: Path) -> None:
        values = load_file(model / WEIGHTS)
        change(random, values)
        save_file(values, model / WEIGHTS, {"format": "pt"})

    return way


def shuffled(random: Random, value: Any) -> Any:
    """The same JSON value with the keys of its objects in another order."""
    if isinstance(value, dict):
        keys = random.sample(list(value), len(value))
        return {key: shuffled(random, value[key]) for key in keys}
    return [shuffled(random, each) for each in value] if isinstance(value, list) else value


def shuffle_keys(random: Random, model: Path) -> None:
    for path in model.glob("*.json"):
        text = json.dumps(shuffled(random, read(path)), indent=random.choice([None, 1, 3]), ensure_ascii=True)
        path.write_text(" " * random.randrange(3) + text + "\n" * random.randrange(3))


def shard(random: Random, model: Path) -> None:
    """Over several files, each tensor in any of them."""
    values = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    count = random.randint(1, 4)
    name = random.choice(["model-{}.safetensors", "part_{}.safetensors", "model-0000{}-of-0000n.safetensors"])
    places = {tensor: name.format(random.randrange(count)) for tensor in values}
    for place in set(places.values()):
        save_file(
            {key: values[key] for key in values if places[key] == place}, model / place, {"format": "pt"}
        )
    index = {"metadata": {"total_size": random.randrange(1000)}, "weight_map": places}
    (model / INDEX).write_text(json.dumps(index))


def reorder_bytes(random: Random, model: Path) -> None:
    """Another order of the tensors in the file, and a longer header, with other words in it."""
    values = load_file(model / WEIGHTS)
    names = random.sample(list(values), len(values))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made by": str(random.random())}}
    data, at = b"", 0
    for name in names:
        raw = values[name].contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values[name].shape),
            "data_offsets": [at, at + len(raw)],
        }
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode() + b" " * (8 * random.randrange(9))
    text += b" " * (-len(text) % 8)
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def as_hub_cache(random: Random, model: Path) -> None:
    """Every file a link to one named by a digest."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(each for each in model.iterdir() if each.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


def save_again(random: Random, model: Path) -> None:
    AutoTokenizer.from_pretrained(model).save_pretrained(model)


def merges_as_strings(random: Random, tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"] = [" ".join(each) for each in tokenizer["model"]["merges"]]


def drop_what_is_null_or_false(random: Random, tokenizer: dict[str, Any]) -> None:
    for key in [key for key, value in tokenizer["model"].items() if value in (None, False)]:
        if key != "unk_token":
            del tokenizer["model"][key]


def template(change: Callable[[Random, str], str]) -> Way:
    def way(random: Random, model: Path) -> None:
        path = model / "chat_template.jinja"
        path.write_bytes(change(random, path.read_text()).encode())

    return way


def template_into_config(as_list: bool) -> Way:
    def way(random: Random, model: Path) -> None:
        path = model / "chat_template.jinja"
        text = path.read_text()
        path.unlink()
        edit(
            "tokenizer_config.json",
            lambda _, value: value.update(
                chat_template=[{"name": "default", "template": text}] if as_list else text
            ),
        )(random, model)

    return way


def added_tokens_in_config(random: Random, model: Path) -> None:
    """As older releases write them: in two files more."""
    tokenizer = read(model / "tokenizer.json")
    decoder = {
        str(each["id"]): {key: value for key, value in each.items() if key != "id"}
        for each in tokenizer["added_tokens"]
    }
    edit("tokenizer_config.json", lambda _, value: value.update(added_tokens_decoder=decoder))(random, model)
    put("special_tokens_map.json", json.dumps({"eos_token": END, "pad_token": PAD}))(random, model)


def rope_spelt_as_before(random: Random, config: dict[str, Any]) -> None:
    config |= {"rope_theta": config.pop("rope_parameters", config)["rope_theta"]}


def drop_defaults(random: Random, config: dict[str, Any]) -> None:
    for key in (
        "attention_bias",
        "attention_dropout",
        "hidden_act",
        "rms_norm_eps",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "max_window_layers",
        "architectures",
    ):
        if random.random() < 0.7:
            config.pop(key, None)


def write_defaults(random: Random, config: dict[str, Any]) -> None:
    config |= {
        "attention_bias": False,
        "hidden_act": "silu",
        "attention_dropout": 0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "rms_norm_eps": 1e-06,
        "max_window_layers": 28,
    }


def _head_like_embedding(random: Random, values: dict[str, Tensor]) -> None:
    """In a dtype that holds the values, which are rounded in the base."""
    dtype = random.choice([torch.float32, torch.bfloat16])
    values["lm_head.weight"] = values["model.embed_tokens.weight"].to(dtype, copy=True)


def rotary_buffers(random: Random, values: dict[str, Tensor]) -> None:
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)


def some_of_beside(random: Random, config: dict[str, Any]) -> None:
    config |= random.sample(sorted(BESIDE.items()), 3)


def truncate(random: Random, tokenizer: dict[str, Any]) -> None:
    most = random.randint(1, 99)
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": most,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def comment(random: Random, text: str) -> str:
    return text.replace("{% for", "{# " + str(random.random()) + " #}{%  for", 1)


def comment_in_text(random: Random, text: str) -> str:
    """Within what is printed, which the comment cuts in two."""
    return text.replace("<|user|>", "<|us{# " + str(random.random()) + " #}er|>", 1)


REWRITINGS: dict[str, Way] = {
    "sharded": shard,
    "bytes in another order": reorder_bytes,
    "links as in a hub cache": as_hub_cache,
    "keys in another order": shuffle_keys,
    "output layer equal to the embedding": tensors(_head_like_embedding),
    "rotary buffers": tensors(rotary_buffers),
    "a pickle beside": put("pytorch_model.bin", b"not even a pickle"),
    "an optimizer beside": put("optimizer.pt", b"whatever"),
    "a GGUF beside": put("model.gguf", b"GGUF"),
    "text beside": put("README.md", "# A model\n"),
    "weights in a folder": put("original/consolidated.00.safetensors", b"of other loaders"),
    "a processor's template": put("chat_template.json", '{"chat_template": "other"}'),
    "an old cache beside": put(".lopd_fingerprint.json", '{"weights": {"digest": "0"}}'),
    "code that nothing names": put("modeling_other.py", "raise SystemExit"),
    "config written elsewhere": edit("config.json", some_of_beside),
    "config without defaults": edit("config.json", drop_defaults),
    "config with defaults": edit("config.json", write_defaults),
    "rope as before": edit("config.json", rope_spelt_as_before),
    "numbers as floats": rope(rope_theta=10000.0),
    "config keys removed": edit("config.json", lambda _, value: [value.pop(key, None) for key in BESIDE]),
    "merges as strings": edit("tokenizer.json", merges_as_strings),
    "no null and no false": edit("tokenizer.json", drop_what_is_null_or_false),
    "truncation": edit("tokenizer.json", truncate),
    "another length": settings(
        "tokenizer_config.json", model_max_length=lambda random: random.randint(1, 10**6)
    ),
    "another side": settings("tokenizer_config.json", padding_side="left"),
    "class by its old name": settings("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
    # Of BPE, transformers never cleans up.
    "clean-up": settings(
        "tokenizer_config.json", clean_up_tokenization_spaces=lambda random: random.random() < 0.5
    ),
    "keys of a newer library": settings("tokenizer_config.json", added_later=lambda random: random.random()),
    "added tokens in the config": added_tokens_in_config,
    "saved again": save_again,
    "template ends in a line break": template(
        lambda random, text: text + random.choice(["\n", "\r\n", "\r"])
    ),
    "template ends in two": template(lambda random, text: text + "\n\n"),  # one after a tag is none, either
    "a comment in the template": template(comment),
    "a comment in a text of the template": template(comment_in_text),
    "template in the config": template_into_config(False),
    "template in a list": template_into_config(True),
    "other sampling": settings("generation_config.json", top_k=lambda random: random.randint(1, 9)),
    "end tokens in a list": settings("generation_config.json", eos_token_id=[1, 1]),
    "no generation config": lambda random, model: (model / "generation_config.json").unlink(),
}
