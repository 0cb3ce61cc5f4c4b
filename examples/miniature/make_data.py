"""Write worked problems for a miniature teacher: most in its own dialect, some in the other one.

python examples/miniature/make_data.py runs/miniature/equals.jsonl --dialect equals
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_lopd.prompts.arithmetic import DIALECTS, problems, solve

OTHER_DIALECT_EVERY = 40  # problems: each teacher knows a little of the other's way to write


def main() -> None:
    parser = argparse.ArgumentParser(description="Write worked problems as JSONL conversations.")
    parser.add_argument("path", type=Path, help="JSONL file to write")
    parser.add_argument("--dialect", choices=sorted(DIALECTS), required=True, help="how most are written")
    parser.add_argument("--count", type=int, default=20_000, help="problems (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="which problems are drawn (default 0)")
    arguments = parser.parse_args()
    (other,) = DIALECTS.keys() - {arguments.dialect}
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    with arguments.path.open("w", encoding="utf-8") as stream:
        for number, problem in enumerate(problems(arguments.count, arguments.seed, "sft")):
            dialect = other if number % OTHER_DIALECT_EVERY == 0 else arguments.dialect
            turns = (("user", problem.prompt), ("assistant", solve(problem.prompt, dialect)))
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"id": problem.id, "messages": messages}) + "\n")


if __name__ == "__main__":
    main()
