"""Model directories: equal fingerprints compute equal things; what is not whole is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import (
    In,
    Json,
    Stand,
    dump,
    file_changes,
    in_files,
    json_changes,
    special_changes,
)

JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"
FILES = [f"teacher/{name}" for name in (*JSON, WEIGHTS, "chat_template.jinja")]
STRAYS = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "pytorch_model.bin",
    "model.bin",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_evil.py",
    "configuration_evil.py",
    "tokenization_evil.py",
    "lopd_lineage.json",
    ".lopd_fingerprint.json",
    "additional_chat_templates/tool_use.jinja",
    "quantize_config.json",
    "params.json",
    "tekken.json",
)


@dataclass(frozen=True)
class Header:
    """The weights' header: its JSON changed, or its length said to be `length`."""

    change: Json | None
    length: int | None

    def __call__(self, world: Path) -> None:
        path = world / "teacher" / WEIGHTS
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header, rest = content[8 : 8 + size], content[8 + size :]
        if self.change is not None:
            header = dump(self.change.changed(json.loads(header)))
        length = len(header) if self.length is None else self.length
        path.write_bytes(struct.pack("<Q", length) + header + rest)


@dataclass(frozen=True)
class Stray:
    """A file more: a copy of one that is there, or `content`."""

    name: str
    of: str | None
    content: bytes

    def __call__(self, world: Path) -> None:
        path = world / "teacher" / self.name
        path.parent.mkdir(exist_ok=True)
        if self.of is not None:
            shutil.copyfile(world / "teacher" / self.of, path)
        else:
            path.write_bytes(self.content)


@dataclass(frozen=True)
class Index:
    """The weights split by an index: `twice` of them in two files, `lost` in none, one in the file `name`."""

    files: int
    twice: int
    lost: int
    name: str

    def __call__(self, world: Path) -> None:
        from safetensors.numpy import load_file, save_file

        directory = world / "teacher"
        tensors = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number in range(self.files):
            file = f"model-{number + 1:05d}-of-{self.files:05d}.safetensors"
            mine = [each for index, each in enumerate(names) if index % self.files == number]
            changed = {each: tensors[each] + 1 for each in names[: self.twice] if each not in mine}
            save_file({each: tensors[each] for each in mine} | changed, directory / file, {"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        for each in names[: self.lost]:
            del weight_map[each]
        if self.name:
            weight_map[names[-1]] = self.name
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


class Models(Attack[Any]):
    """Headers, indices, configs, tokenizers, strays and links in a teacher's directory."""

    name = "model directories"
    copies = ("recipe.yaml", "teacher", "student")
    examples = 5

    def changes(self) -> SearchStrategy[Any]:
        lengths = st.sampled_from(
            [0, 1, 7, 8, 2, 100, 1 << 20, 1 << 31, 20_000_000_000, 1 << 63, (1 << 64) - 1]
        )
        tensor = st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(0, 3))
        value = st.one_of(
            st.integers(-(2**64), 2**64),
            st.sampled_from(["F32", "F64", "I32", "BF16", "F16", "U8", "BOOL", "F8_E4M3", "X"]),
            st.lists(st.integers(-1, 200_000), max_size=3),
        )
        return st.one_of(
            in_files([f"teacher/{name}" for name in JSON], json_changes),
            in_files(FILES, file_changes),
            st.builds(Header, st.builds(Json, tensor, st.just("set"), st.just(""), value), st.none()),
            st.builds(Header, json_changes, st.none()),
            st.builds(Header, st.none(), lengths),
            st.builds(Stray, st.sampled_from(STRAYS), st.sampled_from([*JSON, WEIGHTS]), st.just(b"")),
            st.builds(
                Stray,
                st.sampled_from(STRAYS),
                st.none(),
                st.sampled_from([b"", b"{}", b"[]", b"not json", b'{"a": 1}', b"\x80\x04\x95"]),
            ),
            st.builds(
                Index,
                st.integers(1, 3),
                st.integers(0, 2),
                st.integers(0, 1),
                st.sampled_from(
                    ["", "../../outside/secret", "../student/model.safetensors", "config.json", "absent"]
                ),
            ),
            in_files([f"teacher/{name}" for name in STRAYS], special_changes),
        )

    def spoil(self, world: Path, change: Any) -> None:
        change(world)

    def use(self, world: Path, change: Any) -> str:
        """The fingerprint, and apart from it what the engine computes and what the trainer would read."""
        from megatron_lopd.config import EngineConfig
        from megatron_lopd.convert.hf_checkpoint import HFWeights
        from megatron_lopd.data.chat import Chat
        from megatron_lopd.engines.transformers_engine import TransformersEngine
        from megatron_lopd.pipeline.resolved import Model
        from tests.model_zoo import unsampled

        lopd("run", "recipe.yaml", "--dry-run")
        model = Model(Path("teacher"), "teacher.model")
        model.check()
        identity = model.parent.digests
        tokens = np.arange(5, 45, dtype=np.int32)
        engine: Any = TransformersEngine(EngineConfig(), "teacher")
        (score,) = engine.score([unsampled("a", tokens[:9], tokens)])
        trained = {}
        with HFWeights("teacher") as weights:
            for name in sorted(weights._locations):
                trained[name] = hashlib.sha256(weights.read(name).contiguous().numpy().tobytes()).hexdigest()
        chat = Chat("teacher")
        text = "ab <|end|><|user|> 12+3=\n\u00e9  x<|pad|>"
        voice = [
            chat.prompt([{"role": "user", "content": "1+2="}], "a", 500).tolist(),
            chat.tokenizer.encode(text, add_special_tokens=False),
            sorted(chat.end_tokens),
            chat.decode(np.arange(60, dtype=np.int32)),
        ]
        computed = [hashlib.sha256(score.log_probs.tobytes()).hexdigest(), trained, voice]
        return json.dumps({"identity": identity, "computed": computed})

    def allows(self, change: Any, before: str, after: str) -> bool:
        """A model with another identity may compute what it likes."""
        was, now = json.loads(before), json.loads(after)
        if (
            isinstance(change, In)
            and isinstance(change.change, Stand)
            and change.change.what == "hard link outside"
        ):
            return True
        return was["identity"] != now["identity"] or was["computed"] == now["computed"]

    def named(self, change: Any) -> Sequence[str]:
        return ["teacher"]
