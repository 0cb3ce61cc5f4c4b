"""Record what the project computes: `python -m tests.golden.record OUT.json [part ...]`.

All parts (quickstart, some minutes on one core, is the longest), or those named: the others stay as they are
in OUT.json. It reads what the commands leave on disk, with none of the package's own readers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from tests.golden.arithmetic import PINNED, REPOSITORY, canary

# What decides bits beside the processor.
LIBRARIES = ("torch", "numpy", "megatron-core", "transformers", "tokenizers", "safetensors", "pyarrow")
# Values of metrics.jsonl that a clock gives.
CLOCK = {"seconds", "data_wait_s", "tokens_per_s"}
WHOLE = {"step", "loss", "grad_norm"}  # recorded number by number; of the other metrics, a digest

# Bytes of an item in a shard's `values`, where a record's columns follow each other in the schema's order.
ITEM_BYTES = {
    "log_probs": 4,
    "tail_log_probs": 4,
    "prompt_tokens": 3,
    "response_tokens": 3,
    "top_k_log_probs": 2,
    "top_k_ids": 1,
}


def main(out: Path, parts: list[str]) -> None:
    """Record `parts`, or all, into `out`."""
    record = json.loads(out.read_text()) if out.exists() else {}
    record["arithmetic"] = {"canary": canary(), "libraries": {name: version(name) for name in LIBRARIES}}
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as root:
            record[part] = PARTS[part](Path(root))
    out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _layouts(which: str, root: Path) -> dict[str, Any]:
    from gloo import run_ranks
    from matrix import make_models

    from tests.golden import layouts as golden

    make_models(root)
    record: dict[str, Any] = {}
    for processes, layouts in getattr(golden, which).items():
        ranks = run_ranks(processes, golden.record_layouts, root, layouts, timeout=600)
        for name in layouts:
            record[name] = {f"rank {number}": rank[name] for number, rank in enumerate(ranks)}
    return record


def _pipeline(root: Path) -> dict[str, Any]:
    from tests.pipeline import write_recipe

    write_recipe(
        root,
        score={"engine": {"batch_size": 16, "shard_samples": 16}, "top_k": 8},
        train={
            "objective": "topk_reverse_kl",
            "steps": 5,
            "global_batch_size": 8,
            "micro_batch_tokens": 96,
            "checkpoint_every": 2,
            "optimizer": {"lr": 1e-3},
        },
    )
    return _run(root, "recipe.yaml", Path("run"))


def _quickstart(root: Path) -> dict[str, Any]:
    # Paths are in the ids: those of the recipe, from a directory like the repository.
    (root / "examples").symlink_to(REPOSITORY / "examples")
    return _run(root, "examples/quickstart/recipe.yaml", Path("runs/quickstart"))


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "matrix": partial(_layouts, "LAYOUTS"),
    "nightly matrix": partial(_layouts, "NIGHTLY"),
    "pipeline": _pipeline,
    "quickstart": _quickstart,
}


# ---- what a run leaves


def _run(root: Path, recipe: str, run_dir: Path) -> dict[str, Any]:
    """`lopd run` of `recipe` in `root`, and all that it made in `run_dir`."""
    command = [sys.executable, "-m", "megatron_lopd.cli", "run", recipe]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    run = root / run_dir
    manifests = {
        str(path.parent.relative_to(run)): json.loads(path.read_text())
        for path in sorted(run.rglob("manifest.json"))
    }
    artifacts = {name: each for name, each in manifests.items() if "/checkpoints/" not in name}
    unclocked = artifacts.keys() - {"report"}  # its pages tell how long each stage took
    summary = json.loads((run / "report" / "summary.json").read_text())
    results = json.loads((run / "evaluate" / "results.json").read_text())
    del summary["seconds"]
    masks = _Masks(manifests)
    return {
        "ids": {name: artifacts[name]["id"] for name in unclocked},
        "versions": {name: manifest["versions"] for name, manifest in artifacts.items()},
        "config": {name: manifest["config"] for name, manifest in artifacts.items()},
        "lineage": {
            name: {part: masks.value(manifest[part]) for part in ("kind", "lineage", "parents")}
            for name, manifest in artifacts.items()
        },
        "counts": {name: manifest["counts"] for name, manifest in artifacts.items()},
        "files": {
            f"{name}/{file}": masks.digest(run / name / file, entry["blake3"])
            for name in unclocked
            for file, entry in artifacts[name]["files"].items()
        },
        "results": masks.value({"evaluate": results, "report": summary}),
        "losses": {
            str(path.parent.relative_to(run)): _metrics(path) for path in sorted(run.rglob("metrics.jsonl"))
        },
        "log_probs": {
            str(directory.relative_to(run)): _columns(sorted(directory.glob("*.arrow")))
            for directory in sorted({path.parent for path in run.rglob("*.arrow")})
        },
        "tensors": {
            str(directory.relative_to(run)): _tensors(directory)
            for directory in sorted(max(each.glob("step_*")) for each in run.rglob("checkpoints"))
        },
    }


class _Masks:
    """Puts names in place of ids: what holds the id of something renamed is not changed by that."""

    def __init__(self, manifests: dict[str, Any]) -> None:
        names = {manifest["id"]: f"<id of {name}>" for name, manifest in manifests.items()}
        for name, manifest in manifests.items():
            if identity := manifest["config"].get("identity"):
                names[identity] = f"<identity of {name}>"
        self._names = names | {known[:12]: name for known, name in names.items()}  # the whole first

    def text(self, text: str) -> str:
        for known, name in self._names.items():
            text = text.replace(known, name)
        return text

    def value(self, value: Any) -> Any:
        return json.loads(self.text(json.dumps(value)))

    def digest(self, path: Path, expected: str) -> str:
        """SHA-256 of a file, whose BLAKE3 is `expected`; of text, with its ids masked."""
        content = path.read_bytes()
        if (found := blake3(content).hexdigest()) != expected:
            raise SystemExit(f"{path}: BLAKE3 {found}, its manifest says {expected}")
        if path.suffix not in (".json", ".html"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha256(self.text(content.decode()).encode()).hexdigest()


def _metrics(path: Path) -> dict[str, Any]:
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted(set().union(*steps) - CLOCK)
    columns = {name: [step.get(name) for step in steps] for name in names}
    return {
        name: column if name in WHOLE else _sha256([repr(column).encode()])
        for name, column in columns.items()
    }


def _columns(shards: list[Path]) -> dict[str, str]:
    """A digest of each column of some shards, as if they were one."""
    import pyarrow as pa

    digests: dict[str, Any] = {}

    def add(name: str, raw: bytes) -> None:
        digests.setdefault(name, hashlib.sha256()).update(raw)

    for shard in shards:
        with pa.memory_map(str(shard)) as source:
            table = pa.ipc.open_file(source).read_all()
        numbers = [name for name in table.schema.names if table.schema.field(name).type == pa.uint32()]
        for row in table.to_pylist():
            at = 0
            for name in numbers:
                end = at + row[name] * ITEM_BYTES[name]
                add(name, row["values"][at:end])
                at = end
            for name in {"sample_id", "finish_reason"} & row.keys():
                add(name, row[name].encode() + b"\n")
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _tensors(checkpoint: Path) -> dict[str, str]:
    """A digest of the weights in a training checkpoint, and one of the optimizer's state."""
    import torch
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    state = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in sorted(reader.read_metadata().state_dict_metadata.items())
        if isinstance(about, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {
        what: _sha256(
            part
            for key, tensor in state.items()
            if key.startswith("optimizer.") == (what == "optimizer")
            for part in (key.encode(), tensor.numpy().tobytes())
        )
        for what in ("weights", "optimizer")
    }


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    if not os.environ.items() >= PINNED.items():
        # Before any library is loaded, and glibc itself.
        command = [sys.executable, "-m", "tests.golden.record", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | PINNED)
    main(Path(sys.argv[1]), sys.argv[2:])
