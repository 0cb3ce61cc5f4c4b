"""Print docs/recipe.md, every key of a recipe and of a cluster file."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lopd.config import Cluster, Recipe
from megatron_lopd.config.describe import KeyText
from megatron_lopd.config.help import Group, choices, groups

HEAD = """# Recipe reference

<!-- Made by `python -m tools.docs.recipe_reference > docs/recipe.md`. Change the keys' own help instead. -->

A recipe is a YAML file. Every key is below, by section; `lopd <command> --help` prints those of one command.
A key is given on the command line by its dotted name: `lopd run recipe.yaml train.optimizer.lr=1e-6`.

An *operational* key says how the work is done: it may be changed between an interrupted run and its
resumption, and changes results by rounding at most. All others decide what comes out: a stage that has begun
refuses to go on with another value.

Where a key takes the name of something (an objective, an engine), it also takes `module:name`, an import path
of your own: see [extending](extending.md). Its options stand in a section of its name, beside the key.
Paths are relative to the directory that `lopd` is started in. In a path `~`, `$NAME` and `${NAME}` stand for
what they do in a shell, on the machine that reads the recipe; `--dry-run` prints it written out, and a name
that is not set is refused. A count may be written `1e3` or `1_000`; dates and words such as `yes` are text.
Aliases (`*name`) are copies; merging (`<<`) and tags are refused.
"""
CLUSTER = """
# Cluster file

What `launcher/submit.py` is told of a SLURM cluster: see [SLURM](slurm.md).
"""


def page() -> str:
    """The whole page, of what the project itself has behind its doors."""
    recipe = [line for group in groups(Recipe) for line in _lines(group, "The recipe's own keys")]
    cluster = [line for group in groups(Cluster) for line in _lines(group, "The file's own keys")]
    return "\n".join([HEAD, *recipe, CLUSTER, *cluster]).rstrip() + "\n"


def _lines(group: Group, own: str) -> Iterator[str]:
    places = [section.place for section in group.sections]
    yield f"## {', '.join(f'`{place}`' for place in places) if places[0] else own}"
    yield ""
    if help := "; ".join(dict.fromkeys(section.help for section in group.sections)):
        yield _sentence(help)
        yield ""
    operational = [f"`{section.place}`" for section in group.sections if section.operational]
    if operational:
        where = "" if len(operational) == len(places) else f" in {', '.join(operational)}"
        yield f"*Operational{where}.*"
        yield ""
    yield "| key | type | default | what it is |"
    yield "|---|---|---|---|"
    for key in group.keys:
        yield f"| `{key.name}` | {_cell(key.kind)} | {_cell(key.default)} | {_help(key)} |"
    yield ""
    for key in group.keys:
        if named := list(choices(key)):
            yield f"What `{key.name}` may name:"
            yield ""
            yield from (f"- `{name}`: {caption}" for name, caption in named)
            yield ""


def _help(key: KeyText) -> str:
    return f"{_cell(key.help)}{' *Operational.*' if key.operational else ''}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _cell(text: str) -> str:
    """Text that cannot end a table's cell, nor be taken for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
