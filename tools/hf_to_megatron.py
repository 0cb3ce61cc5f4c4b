"""Hugging Face checkpoint -> Megatron distributed checkpoint, readable at any TP and PP.

    python tools/hf_to_megatron.py HF_DIR OUT_DIR [--family MODULE:NAME]

One process, no GPU, tensor by tensor. Exit codes: 0 done; 1 failed; 2 bad usage or configuration.
"""

from __future__ import annotations

import argparse
import sys

try:
    from megatron_lopd.convert.offline import hf_to_megatron
    from megatron_lopd.errors import LopdError
    from megatron_lopd.registry import FAMILIES, allowing_user_code
    from megatron_lopd.runtime.display import say
except ModuleNotFoundError as error:
    print(
        f"hf_to_megatron: {error}: run it in the environment that megatron-lopd is installed in",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Hugging Face checkpoint -> Megatron distributed checkpoint")
    parser.add_argument("hf_dir", help="Hugging Face checkpoint directory (safetensors)")
    parser.add_argument("out_dir", help="Megatron checkpoint directory to make; must not exist or be empty")
    parser.add_argument("--family", help="model family of your own, as module:NAME: its code is run")
    arguments = parser.parse_args()
    try:
        if arguments.family is not None:
            with allowing_user_code(True):
                FAMILIES[arguments.family]  # its model_type is known from here on
        hf_to_megatron(arguments.hf_dir, arguments.out_dir)
    except LopdError as error:
        say(f"hf_to_megatron: {error}", error=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
