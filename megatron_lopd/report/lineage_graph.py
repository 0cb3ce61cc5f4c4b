"""What was made from what, and what of it was proved: the data of the lineage graph and its picture.

The picture is layered top to bottom (Sugiyama, Tagawa and Toda 1981): every node a row below its
parents, long edges led through the rows between as lanes of their own, rows ordered by barycentre to
cross seldom, and places in a row chosen near the neighbours' (spacing.spread).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, Literal

from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from megatron_lopd.artifacts.lineage import Proof, short, worst
from megatron_lopd.artifacts.manifest import LineageStatus
from megatron_lopd.errors import DataError
from megatron_lopd.report.spacing import spread
from megatron_lopd.report.theme import LIGHT, printable, render, shorten

MARKS: dict[LineageStatus, str] = {"proved": "✓", "declared": "?", "overridden": "✗"}

BOX_WIDTH, BOX_HEIGHT, ROW_STEP = 138.0, 54.0, 104.0  # points
LANE_WIDTH, GAP = 6.0, 14.0  # points: an edge passing a row, and the room between neighbours
LANE_WEIGHT = 8.0  # a lane is worth keeping straight at the price of moving a box
SWEEPS = 24  # of ordering and of placing; graphs of this size settle in far fewer


@dataclass(frozen=True)
class Node:
    """A model or an artifact; `digest` is its full content digest."""

    id: str
    kind: Literal["model", "artifact"]
    title: str
    digest: str
    path: str


@dataclass(frozen=True)
class Edge:
    """`child` was made from `parent`, which was its `role` ("teacher", "rollouts", ...)."""

    parent: str
    child: str
    role: str


@dataclass(frozen=True)
class LineageGraph:
    """`about`: a proof's statement -> the ids of the nodes it speaks of, which carry its mark.

    Raises DataError when an edge or `about` names what is not there, an id is taken twice, or something
    was made from itself.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    proofs: tuple[Proof, ...]
    about: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [node.id for node in self.nodes]
        twice = next((node_id for node_id in ids if ids.count(node_id) > 1), None)
        if twice is not None:
            raise DataError(f"lineage graph: two nodes have the id {twice!r}: give each its own")
        for edge in self.edges:
            for end in (edge.parent, edge.child):
                if end not in ids:
                    raise DataError(f"lineage graph: edge {edge.role!r} names {end!r}, which is no node")
        statements = [proof.statement for proof in self.proofs]
        for statement, subjects in self.about.items():
            if statement not in statements:
                raise DataError(f"lineage graph: {statement!r} is about nodes, but is no proof's statement")
            for node_id in subjects:
                if node_id not in ids:
                    raise DataError(f"lineage graph: {statement!r} is about {node_id!r}, which is no node")
        try:
            TopologicalSorter(self.parents()).prepare()
        except CycleError as error:
            raise DataError(f"lineage graph: made from itself: {' -> '.join(error.args[1])}") from error

    def parents(self) -> dict[str, list[str]]:
        """Ids of the nodes each node was made from."""
        return {node.id: [edge.parent for edge in self.edges if edge.child == node.id] for node in self.nodes}


Key = str | tuple[int, int]  # a node's id, or (edge number, row) where a long edge passes a row


@dataclass
class Placement:
    """`rows[r]` left to right; `lanes[e]` all keys edge e runs through, both ends included; `x` centres."""

    rows: list[list[Key]]
    lanes: list[list[Key]]
    x: dict[Key, float] = field(default_factory=dict)

    def neighbours(self, above: bool, below: bool) -> dict[Key, list[Key]]:
        found: dict[Key, list[Key]] = {key: [] for row in self.rows for key in row}
        for lane in self.lanes:
            for upper, lower in pairwise(lane):
                if above:
                    found[lower].append(upper)
                if below:
                    found[upper].append(lower)
        return found


def lay_out(graph: LineageGraph) -> Placement:
    """Rows, order and places of every node and lane; the same graph always gives the same layout."""
    row_of = _assign_rows(graph)
    rows: list[list[Key]] = [[] for _ in range(1 + max(row_of.values(), default=-1))]
    for node in graph.nodes:
        rows[row_of[node.id]].append(node.id)
    lanes: list[list[Key]] = []
    for number, edge in enumerate(graph.edges):
        between: list[Key] = [(number, row) for row in range(row_of[edge.parent] + 1, row_of[edge.child])]
        for key in between:
            assert isinstance(key, tuple)
            rows[key[1]].append(key)
        lanes.append([edge.parent, *between, edge.child])
    layout = Placement(rows, lanes)
    _order(layout)
    _place(layout)
    return layout


def _assign_rows(graph: LineageGraph) -> dict[str, int]:
    """One below the lowest parent; a node without parents just above its first child."""
    parents = graph.parents()
    row_of: dict[str, int] = {}
    for node_id in TopologicalSorter(parents).static_order():
        row_of[node_id] = 1 + max((row_of[parent] for parent in parents[node_id]), default=-1)
    for node_id in row_of:
        children = [row_of[edge.child] for edge in graph.edges if edge.parent == node_id]
        if children and not parents[node_id]:
            row_of[node_id] = min(children) - 1
    return row_of


def _order(layout: Placement) -> None:
    best, fewest = [list(row) for row in layout.rows], _crossings(layout)
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        near = layout.neighbours(above=downwards, below=not downwards)
        for row in layout.rows if downwards else reversed(layout.rows):
            place = {key: i for other in layout.rows for i, key in enumerate(other)}
            weight = {
                key: sum(place[n] for n in near[key]) / len(near[key]) if near[key] else place[key]
                for key in row
            }
            row.sort(key=lambda key: weight[key])
        crossings = _crossings(layout)
        if crossings < fewest:
            best, fewest = [list(row) for row in layout.rows], crossings
    layout.rows = best


def _crossings(layout: Placement) -> int:
    place = {key: i for row in layout.rows for i, key in enumerate(row)}
    row_of = {key: r for r, row in enumerate(layout.rows) for key in row}
    links = [(row_of[a], place[a], place[b]) for lane in layout.lanes for a, b in pairwise(lane)]
    return sum(
        first[0] == second[0] and (first[1] - second[1]) * (first[2] - second[2]) < 0
        for i, first in enumerate(links)
        for second in links[:i]
    )


def _place(layout: Placement) -> None:
    near = layout.neighbours(above=True, below=True)
    for lane in layout.lanes:
        near |= dict.fromkeys(lane[1:-1], lane)  # a lane wants to be straight, not merely smooth
    layout.x = {key: float(i) for row in layout.rows for i, key in enumerate(row)}
    for sweep in range(SWEEPS):
        for row in layout.rows if sweep % 2 == 0 else reversed(layout.rows):
            wanted = [
                sum(layout.x[n] for n in near[key]) / len(near[key]) if near[key] else layout.x[key]
                for key in row
            ]
            room = [(_width(a) + _width(b)) / 2 + GAP for a, b in pairwise(row)]
            weights = [1.0 if isinstance(key, str) else LANE_WEIGHT for key in row]
            layout.x.update(zip(row, spread(wanted, room, weights), strict=True))


def _width(key: Key) -> float:
    return BOX_WIDTH if isinstance(key, str) else LANE_WIDTH


def lineage_figure(graph: LineageGraph) -> str:
    """Boxes for models (round) and artifacts (square), arrows to what was made from them, and a mark with
    the number of each proof on the boxes it is about; a box has the colour of its weakest proof."""
    layout = lay_out(graph)
    left = min(layout.x[key] - _width(key) / 2 for key in layout.x) - 6
    right = max(layout.x[key] + _width(key) / 2 for key in layout.x) + 6
    height = (len(layout.rows) - 1) * ROW_STEP + BOX_HEIGHT + 24

    def draw(axes: Any) -> None:
        axes.figure.set_layout_engine("none")  # the layout is ours: one unit is one point
        axes.set_position([0, 0, 1, 1])
        axes.set_xlim(left, right)
        axes.set_ylim(height - 12, -12)
        axes.set_axis_off()
        top_of = {key: r * ROW_STEP for r, row in enumerate(layout.rows) for key in row}
        for number in range(len(graph.edges)):
            _draw_edge(axes, graph, layout, number, top_of)
        for node in graph.nodes:
            _draw_node(axes, graph, node, layout.x[node.id], top_of[node.id])

    label = "Lineage: " + "; ".join(f"{edge.child} made from {edge.parent}" for edge in graph.edges)
    return render("lineage", label, (right - left, height), draw)


def _port(layout: Placement, number: int, outgoing: bool) -> tuple[float, int]:
    """Where edge `number` meets its box, x in points, and its place among the edges on that side."""
    end, towards = (0, 1) if outgoing else (-1, -2)
    box = layout.lanes[number][end]
    same = [e for e, lane in enumerate(layout.lanes) if lane[end] == box]
    same.sort(key=lambda e: (layout.x[layout.lanes[e][towards]], e))
    place = same.index(number)
    return layout.x[box] + BOX_WIDTH * ((place + 1) / (len(same) + 1) - 0.5), place


def _draw_edge(
    axes: Any, graph: LineageGraph, layout: Placement, number: int, top_of: dict[Key, float]
) -> None:
    lane = layout.lanes[number]
    x, _ = _port(layout, number, outgoing=True)
    y = top_of[lane[0]] + BOX_HEIGHT
    arrival, place = _port(layout, number, outgoing=False)
    points, codes = [(x, y)], [Path.MOVETO]
    for key in lane[1:]:
        last = key == lane[-1]
        next_x = arrival if last else layout.x[key]
        next_y = top_of[key] - (6 if last else 0)  # room for the arrow's head
        middle = (y + next_y) / 2 - 8
        points += [(x, middle), (next_x, middle), (next_x, next_y)]
        codes += [Path.CURVE4] * 3
        x, y = next_x, next_y
        if not last:
            y += BOX_HEIGHT
            points.append((x, y))
            codes.append(Path.LINETO)
    axes.add_patch(PathPatch(Path(points, codes), facecolor="none", edgecolor=LIGHT["muted"], linewidth=1.1))
    axes.plot(x, y + 2, marker="v", markersize=6, color=LIGHT["muted"], markeredgewidth=0)
    axes.text(
        x,
        y - 8 - 11 * (place % 2),  # neighbouring roles at two heights, so that long ones do not touch
        shorten(printable(graph.edges[number].role), 16),
        ha="center",
        va="center",
        fontsize=8,
        color=LIGHT["muted"],
        bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "pad": 0.8},
    )


def _draw_node(axes: Any, graph: LineageGraph, node: Node, x: float, top: float) -> None:
    about = [
        (number, proof.status)
        for number, proof in enumerate(graph.proofs, start=1)
        if node.id in graph.about.get(proof.statement, ())
    ]
    colour = LIGHT[worst(status for _, status in about)] if about else LIGHT["muted"]
    axes.add_patch(
        FancyBboxPatch(
            (x - BOX_WIDTH / 2, top),
            BOX_WIDTH,
            BOX_HEIGHT,
            linewidth=1.4,
            edgecolor=colour,
            facecolor=LIGHT["surface"],
            boxstyle=f"round,pad=0,rounding_size={14 if node.kind == 'model' else 2}",
        )
    )
    axes.text(
        x, top + 14, shorten(printable(node.title), 20), ha="center", va="center", fontsize=10, weight="bold"
    )
    digest = shorten(printable(short(node.digest)), 24)
    axes.text(x, top + 29, digest, ha="center", va="center", fontsize=8.5, color=LIGHT["muted"])
    for place, (number, status) in enumerate(about):
        axes.text(
            x + 24 * (place - (len(about) - 1) / 2),
            top + 43,
            f"{MARKS[status]} {number}",
            ha="center",
            va="center",
            fontsize=8.5,
            color=LIGHT[status],
            weight="bold",
        )
