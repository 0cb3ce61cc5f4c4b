"""Write worked problems of the arithmetic task, as conversations to fine-tune the teacher on.

python examples/quickstart/make_data.py runs/teacher.jsonl --count 20000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_lopd.prompts.arithmetic import problems


def main() -> None:
    parser = argparse.ArgumentParser(description="Write worked problems as JSONL conversations.")
    parser.add_argument("path", type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=20_000, help="problems (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="which problems are drawn (default 0)")
    arguments = parser.parse_args()
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    with arguments.path.open("w", encoding="utf-8") as stream:
        for problem in problems(arguments.count, arguments.seed, "sft"):
            turns = (("user", problem.prompt), ("assistant", problem.solution))
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"id": problem.id, "messages": messages}) + "\n")


if __name__ == "__main__":
    main()
