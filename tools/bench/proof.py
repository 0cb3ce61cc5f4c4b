"""What a proof costs: models hashed, or looked at where nothing is begun; an artifact checked.

    python tools/bench/proof.py [--gb N] [--models N] [--dir DIR] [--quick]

The models are of bf16 tensors as a Qwen3-32B's, in files of 4 GB. The files are sparse: they have the size
and no content, so that no disk is measured: reading them costs what it costs the system to fill a page. A
smaller model, committed as an artifact's part, is of random bytes that lie in the page cache. Each step is a
process of its own, as a command is.

The last line is one JSON object. `read_gb_s`: the floor, the models' files read by as many threads and not
hashed; `first_read_gb_s`, when the file system has just been given them and looks for their blocks.
`hashed_gb_s`: the models' weights, as a command does that begins something. Also by seconds of CPU,
`..._gb_cpu_s`, which other work disturbs less: times the cores, it is what a quiet machine does. `looked_s`:
wall seconds of a process that begins nothing, with its imports, and `looked_cpu_s` its CPU seconds.
`artifact_gb_s`: an artifact of which this machine knows nothing, checked against its manifest, from the page
cache; `weights_gb_s`: that model's weights, from there. `sha256_gb_s`, `blake3_gb_s`: one thread, from
memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_lopd.artifacts.manifest import commit

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 4_000_000_000
# Of a layer of a Qwen3-32B: h 5,120, 64 heads of 128 over 8 groups, feed-forward 25,600.
LAYER = {
    "q": [8192, 5120],
    "k": [1024, 5120],
    "v": [1024, 5120],
    "o": [5120, 8192],
    "norm": [5120],
} | {name: [25600, 5120] for name in ("gate", "up", "down")}
LOOK = """
import json, os, sys, time
from megatron_lopd.artifacts.digest_cache import relying_on_hints
from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.artifacts.weights_digest import weights_digest
begin, *models = sys.argv[1:]
started, before = time.perf_counter(), sum(os.times()[:2])
if begin == "begin":
    found = [weights_digest(model_files(model)) for model in models]
else:
    with relying_on_hints():
        found = [fingerprint_model(model).weights for model in models]
after = sum(os.times()[:2])
wall = time.perf_counter() - started
if begin == "begin":
    for model in models:
        fingerprint_model(model)  # config and tokenizer too, which take their time once
print(json.dumps([wall, after - before, after, found]))
"""
READ = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
def read(path):
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
started, before = time.perf_counter(), sum(os.times()[:2])
with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(read, [path for model in sys.argv[2:] for path in Path(model).glob("*.safetensors")]))
after = sum(os.times()[:2])
print(json.dumps([time.perf_counter() - started, after - before, after, []]))
"""
VERIFY = """
import json, os, sys, time
from pathlib import Path
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.artifacts.unchanged import verify_unchanged
directory = Path(sys.argv[2])
started, before = time.perf_counter(), sum(os.times()[:2])
verify_unchanged(directory, load_manifest(directory))
after = sum(os.times()[:2])
print(json.dumps([time.perf_counter() - started, after - before, after, []]))
"""


def main() -> None:
    """Print the measurements, and the JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=100, help="of all models together (100)")
    parser.add_argument("--models", type=int, default=3, help="that they are of (3)")
    parser.add_argument("--dir", help="where to make them; a temporary directory by default")
    parser.add_argument("--quick", action="store_true", help="8 GB")
    options = parser.parse_args()
    total = 8e9 if options.quick else options.gb * 1e9
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        root = Path(directory)
        models = [
            make_model(root / f"model-{number}", total / options.models) for number in range(options.models)
        ]
        size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
        print(f"{len(models)} models, {size / 1e9:.1f} GB, sparse")
        time.sleep(3)  # files that were written just now get no hints
        first_read, _, _, _ = look(root, "read", models, READ)
        hashed, hashing, _, first = look(root, "begin", models)
        read, _, _, _ = look(root, "read", models, READ)
        started = time.perf_counter()
        _, _, cpu, seen = look(root, "look", models)
        wall = time.perf_counter() - started
        assert first == seen
        size_of_artifact = make_artifact(root / "artifact")
        verified, verifying, _, _ = look(root, "verify", [root / "artifact"], VERIFY)
        met, meeting, _, _ = look(root, "begin", [root / "artifact"])
    result = {
        "gb": size / 1e9,
        "cores": len(os.sched_getaffinity(0)),
        "first_read_gb_s": size / first_read / 1e9,
        "read_gb_s": size / read / 1e9,
        "hashed_gb_s": size / hashed / 1e9,
        "hashed_gb_cpu_s": size / hashing / 1e9,
        "artifact_gb_s": size_of_artifact / verified / 1e9,
        "artifact_gb_cpu_s": size_of_artifact / verifying / 1e9,
        "weights_gb_s": size_of_artifact / met / 1e9,
        "weights_gb_cpu_s": size_of_artifact / meeting / 1e9,
        "looked_s": wall,
        "looked_cpu_s": cpu,
        "sha256_gb_s": rate(hashlib.sha256),
        "blake3_gb_s": rate(blake3),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def look(
    root: Path, how: str, models: list[Path], program: str = LOOK
) -> tuple[float, float, float, list[str]]:
    """(wall, CPU seconds of it, CPU seconds of all, digests), of a process that hashes weights, or looks."""
    environment = os.environ | {"LOPD_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("LOPD_SESSION", None)
    command = [sys.executable, "-c", program, how, *map(str, models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu, whole, found = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu, whole, found


def make_model(directory: Path, size: float) -> Path:
    """A model of about `size` bytes, sparse, with the quickstart's config and tokenizer."""
    directory.mkdir()
    for path in (ROOT / "examples/quickstart/teacher").iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "lopd_lineage.json":
            shutil.copy(path, directory)
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [151936, 5120]}
    while 2 * sum(map(elements, shapes.values())) < size:
        layer = len(shapes) // len(LAYER)
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    shards: list[dict[str, list[int]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(elements, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        places |= dict.fromkeys(shard, file)
        write_sparse(directory / file, shard)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return directory


def make_artifact(directory: Path) -> int:
    """Bytes of a committed model of random content, which the system has just been given to keep."""
    model = make_model(directory, 8e9)
    for path in model.glob("*.safetensors"):
        with path.open("r+b") as stream:
            stream.seek(1 << 20)  # past the header, at most in the first tensor
            while (left := path.stat().st_size - stream.tell()) > 0:
                stream.write(os.urandom(min(left, 1 << 24)))
    names = [path.name for path in directory.iterdir()]
    commit(directory, "sft", files=names, config={}, counts={}, versions={}, parents={}, lineage="declared")
    return sum(path.stat().st_size for path in directory.iterdir())


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bf16 zeros that takes no room."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * elements(shape)
        header[name], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)


def elements(shape: list[int]) -> int:
    """How many values a tensor has."""
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def rate(hasher: Callable[[], Any]) -> float:
    """GB/s of one thread, from memory."""
    data, rounds = bytes(1 << 20), 500
    state, started = hasher(), time.perf_counter()
    for _ in range(rounds):
        state.update(data)
    return rounds * len(data) / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
