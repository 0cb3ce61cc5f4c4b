#!/usr/bin/env python3
"""Print `name==version` of the packages that the container image must leave as its base has them.

The list is a pip constraint file, and the image's proof: it is the same before and after the installs.
Exits 1 when torch or Megatron-Core is not there, as then the base is not one to build on.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

# Compiled against the base's torch or CUDA, or (transformers) held to a range by one that is.
PINNED = (
    "torch",
    "torchvision",
    "triton",
    "pytorch-triton",
    "transformer-engine",
    "apex",
    "megatron-core",
    "flash-attn",
    "vllm",
    "nvidia-modelopt",
    "transformers",
    "numpy",
)
REQUIRED = ("torch", "megatron-core")


def main() -> int:
    found = {}
    for name in PINNED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for name, text in found.items():
        print(f"{name}=={text}")
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        print(f"the base image has no {' and no '.join(missing)}: choose another BASE_TAG", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
