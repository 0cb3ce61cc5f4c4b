"""The date that a chat template is told, whenever it asks: a prompt is the same on any day."""

from __future__ import annotations

import datetime
from pathlib import Path

from megatron_lopd.files.reading import read_text

# The same in the shards before and after midnight, in training and in evaluation. It is the date that Llama
# 3.2's own template falls back on, the best known of those that ask.
TODAY = datetime.datetime(2024, 7, 26)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def prints_date(directory: Path) -> bool:
    """Whether a model directory's chat template asks for the date."""
    return any(_asks(read_text(path)) for name in _TEMPLATES if (path := directory / name).is_file())


def without_clock(template: str) -> str:
    """A chat template whose `strftime_now`, which transformers lets read the clock, is of TODAY.

    One that does not ask is left as it is. No function can be handed to a template, so this is a macro before
    it; the template's first line is its first line still, for Jinja2 to trim.
    """
    if not _asks(template):
        return template
    known = [f"%{pad}{letter}" for pad in ("", "-") for letter in "aAbBcdeDFHIjmMpSTuUwWxXyYZ"]
    filters = "".join(f"|replace('{each}', '{TODAY.strftime(each)}')" for each in [*known, "%%"])
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _asks(template: str) -> bool:
    return "strftime_now" in template
