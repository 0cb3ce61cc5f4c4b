"""Pieces of the report page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def figure(title: str, svg: str, caption: str) -> str:
    """A chart under its title and caption."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{note}{svg}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A table of plain text; `text` for long cells that may break anywhere."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="text"' if text else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
