"""One look for every figure of the report: palette, matplotlib style, and SVG fit to be put inline.

Figures are drawn in the light palette; on the way out each colour becomes a CSS variable, so the same
SVG follows the reader's light or dark setting without a script.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

# name -> (light, dark). Every foreground has a contrast of at least 4.5:1 on its surface (WCAG 2.2 AA).
PALETTE = {
    "ink": ("#1f2430", "#e8eaee"),
    "muted": ("#586173", "#a3acba"),
    "rule": ("#d9dde4", "#363c47"),
    "surface": ("#fdfdfe", "#1a1d23"),
    "page": ("#f3f4f6", "#111317"),
    "before": ("#3566b0", "#7fb0ee"),
    "after": ("#b84a12", "#f0935a"),
    "proved": ("#197547", "#4cc38a"),
    "declared": ("#8a5d00", "#e3b341"),
    "overridden": ("#bf2f28", "#ff7b72"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}

RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a model's name is a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the layout is the same on every machine
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["rule"],
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

_VARIABLE = {light: f"var(--{name})" for name, light in LIGHT.items()}


def css_variables() -> str:
    """The palette as CSS, dark where the reader's system asks for it."""
    light, dark = ("".join(f"--{name}:{shades[i]};" for name, shades in PALETTE.items()) for i in range(2))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def printable(text: str) -> str:
    """`text` on one line, without characters that XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(text: str, limit: int) -> str:
    """The first `limit` characters of `text`, the last of them an ellipsis when something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def render(name: str, label: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw on fresh axes and give the picture as an `<svg>` element for an HTML page.

    `name` prefixes the ids, so that it must be unique on the page; `label` is read out in place of the
    picture; `size` is width and height in points (1/72 inch). The same input gives the same bytes.
    """
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", RC, {"svg.hashsalt": name}]):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure.subplots())
        with warnings.catch_warnings():
            # Text stays text in the SVG: the reader's fonts draw it, whatever matplotlib's own lack.
            warnings.filterwarnings("ignore", message="Glyph")
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=metadata)
    return _inline(buffer.getvalue().decode(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # matplotlib's "*" rule would reach the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _localise(key, value, name) for key, value in element.attrib.items()
        }
    for key in ("width", "height", "version"):
        root.attrib.pop(key)
    root.attrib |= {"role": "img", "aria-label": printable(label)}
    return ET.tostring(root, encoding="unicode")


def _localise(key: str, value: str, name: str) -> str:
    """An attribute with its id or reference prefixed by `name`, or its colours made CSS variables."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"^#|(?<=url\()#", f"#{name}-", value)
    if key == "style":
        return re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLE.get(found[0], found[0]), value)
    return value
