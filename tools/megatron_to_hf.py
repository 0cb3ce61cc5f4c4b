"""Megatron distributed checkpoint -> Hugging Face checkpoint.

    python tools/megatron_to_hf.py MEGATRON_DIR OUT_DIR [--hf-dir HF_DIR] [--max-shard-bytes N]
        [--family MODULE:NAME]

Reads what hf_to_megatron.py wrote, and training checkpoints (their optimizer state is left alone).
One process, no GPU, tensor by tensor. Exit codes: 0 done; 1 failed; 2 bad usage or configuration.
"""

from __future__ import annotations

import argparse
import sys

try:
    from megatron_lopd.convert.offline import megatron_to_hf
    from megatron_lopd.errors import LopdError
    from megatron_lopd.registry import FAMILIES, allowing_user_code
    from megatron_lopd.runtime.display import say
except ModuleNotFoundError as error:
    print(
        f"megatron_to_hf: {error}: run it in the environment that megatron-lopd is installed in",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Megatron distributed checkpoint -> Hugging Face checkpoint")
    parser.add_argument("megatron_dir", help="Megatron checkpoint directory (torch_dist)")
    parser.add_argument("out_dir", help="Hugging Face directory to make; must not exist or be empty")
    parser.add_argument("--hf-dir", help="where config and tokenizer come from (default: MEGATRON_DIR/hf)")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=4_000_000_000, help="largest safetensors file, bytes (4e9)"
    )
    parser.add_argument("--family", help="model family of your own, as module:NAME: its code is run")
    arguments = parser.parse_args()
    try:
        if arguments.family is not None:
            with allowing_user_code(True):
                FAMILIES[arguments.family]  # its model_type is known from here on
        megatron_to_hf(arguments.megatron_dir, arguments.out_dir, arguments.max_shard_bytes, arguments.hf_dir)
    except LopdError as error:
        say(f"megatron_to_hf: {error}", error=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
