"""The report page: what it says, that it holds nothing foreign, and that it is the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lopd.artifacts.lineage import Proof
from megatron_lopd.errors import DataError
from megatron_lopd.evaluation.answers import GradedAnswer
from megatron_lopd.registry import OBJECTIVES
from megatron_lopd.report import theme
from megatron_lopd.report.examples import examples
from megatron_lopd.report.figures import smooth
from megatron_lopd.report.lineage_graph import (
    GAP,
    Edge,
    LineageGraph,
    Node,
    _width,
    lay_out,
    lineage_figure,
)
from megatron_lopd.report.page import render_page
from megatron_lopd.report.spacing import spread

HOSTILE = "<script>alert('x')</script> \" onload=\"y & $z_1$ #1f2430"

PAIRED = {"problems": 2048, "better": 400, "worse": 200, "p": 1e-9}


def grades(
    sampled: float, sampled_error: float | None, greedy: float, greedy_error: float | None, n: int
) -> dict[str, Any]:
    """Of four samples a prompt, as summary.json has them after a round through JSON: k are text."""
    pass_at = {"1": sampled, "2": 0.95, "4": 0.96}
    return {
        "sampled": sampled,
        "sampled_error": sampled_error,
        "greedy": greedy,
        "greedy_error": greedy_error,
        "n": n,
        "k": 4,
        "pass_at_k": 0.96,
        "pass_at": {k: {"share": share, "error": 0.011} for k, share in pass_at.items()},
        "majority": {"share": 0.931, "error": 0.012},
        "entropy": 0.25,
        "length": 31.4,
        "cut": 0.125,
        "ungraded": 3,
    }


def summary() -> dict[str, Any]:
    return {
        "accuracy": {
            "eval": {
                "sft": grades(0.823, 0.0084, 0.902, 0.0066, 2048),
                "lightning_opd": grades(0.941, 0.0074, 0.972, 0.0052, 1024),
            }
        },
        "paired": {"eval": PAIRED},
        "seconds": {"train": 130.4, "generate": 42.3, "export": 0.6},
        "tokens": {"train": 1812345, "generate": 612345},
        "lineage": "proved",
        "seed": 17,
        "settings": {"train.optimizer.lr": "0.001"},
    }


def rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    keys = ["loss", "reverse_kl_sampled", "drift_kl", "effective_sample_size", "entropy"]
    keys += ["advantage_mean", "advantage_p05", "advantage_p95"]
    return [
        {"step": step, "skipped": 0, **{key: float(rng.random()) for key in keys}}
        for step in range(1, count + 1)
    ]


def graph(status: Any = "proved", text: str = "teacher") -> LineageGraph:
    nodes = tuple(Node(name, "model", f"{name} {text}", f"{name}:{text}", text) for name in "abcd")
    edges = tuple(Edge(p, c, text) for p, c in ("ab", "bc", "cd", "ad", "bd"))
    proof = Proof(f"claim {text}", status, f"why {text}")
    return LineageGraph(nodes, edges, (proof,), {proof.statement: ("a", "d")})


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(summary(), {"sft": rows(40), "train": rows(60)}, graph())


def test_says_what_was_gained(html: str) -> None:
    # 94.1 - 82.3 = 11.8
    headline = re.search(r"<h1>(.*)</h1>", html)
    assert headline is not None
    assert headline[1].replace("\u00a0", " ") == (
        "Lightning OPD raised sampled accuracy from 82.3 % (n = 2,048, standard error 0.8) "
        "to 94.1 % (n = 1,024, standard error 0.7) (+11.8 points, p &lt; 0.001)"
    )
    text = Page(html).text
    for label in ("sampled 82.3 ± 0.8", "greedy 90.2 ± 0.7", "sampled 94.1 ± 0.7", "greedy 97.2 ± 0.5"):
        assert label in text
    for line in (
        "avg@482.3 ± 0.894.1 ± 0.7",
        "pass@295.0 ± 1.195.0 ± 1.1",
        "pass@496.0 ± 1.1",
        "maj@493.1 ± 1.2",
    ):
        assert line in text
    for line in ("prompts2,0481,024", "length31.4", "entropy0.250", "cut12.5", "ungraded3"):
        assert line in text
    assert "14,476" in text  # 612345 tokens / 42.3 s
    table = text[text.index("tokens/s") :]
    assert table.index("generate") < table.index("train") < table.index("export")  # not the dict's order


def test_a_change_is_called_one_only_where_the_paired_test_says_so() -> None:
    def says(after: float, **test: float) -> str:
        other = summary()
        other["accuracy"]["eval"]["lightning_opd"]["sampled"] = after
        other["paired"]["eval"] = PAIRED | test
        return Page(render_page(other, {}, graph())).text

    assert "Lightning OPD lowered sampled accuracy" in says(0.7, better=200, worse=400)
    none = "no difference that 2,048 problems can show (p = 0.38)"
    for after in (0.7, 0.823, 0.9):
        text = says(after, better=10, worse=7, p=0.38)
        assert none in text
        assert not re.search("raised|lowered", text)
    # More problems got worse than better, and the mean rose all the same: neither is claimed.
    assert "no difference" in says(0.9, better=200, worse=400)


def test_a_few_answers_are_shown_and_a_long_one_cut() -> None:
    def answer(at: int, verdict: Any, text: str = "so 7") -> GradedAnswer:
        return GradedAnswer(
            f"p{at}/0", "sampled", [{"role": "user", "content": "3+4"}], "7", text, "7", verdict
        )

    given = [answer(at, "right") for at in range(5)] + [answer(9, "cut", f"{HOSTILE}{'x' * 9_999}END")]
    found = examples("SFT", iter(given))
    assert [row[0] for row in found.rows] == ["right", "right", "cut"]
    html = render_page(summary(), {}, graph(), [found])
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.text
    assert "xEND" in page.text
    assert len(html) < len(render_page(summary(), {}, graph())) + 3_000


def test_several_sets_each_have_a_chart_and_a_table() -> None:
    several = summary()
    rows_of = several["accuracy"].pop("eval")
    teacher = grades(0.97, None, 1.0, None, 1) | {"majority": None}  # one prompt: no error to give
    several["paired"] = {"math500": PAIRED}
    several["accuracy"] = {"math500": rows_of, "aime24": {"teacher": teacher, **rows_of}}
    page = Page(render_page(several, {}, graph()))
    assert "raised sampled accuracy on math500 from" in page.text
    assert "Share of correct answers: math500" in page.text
    assert "Share of correct answers: aime24" in page.text
    assert "sampled 97.0" in page.text
    assert "nan" not in page.text
    assert "SFTLightning OPDTeacher" in page.text  # the order they are made in, not the summary's
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1


def test_is_self_contained(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html))
    assert references  # clip paths and markers: the next line checks something
    assert references <= set(ids)
    assert max(ids.values()) == 1


def test_headings_stand_over_their_columns(html: str) -> None:
    """Where cells are set left and headings right, a wide column's heading is over the next one."""
    css = html[: html.index("</style>")].rpartition("<style>")[2]
    for align in ("left", "right"):
        (selectors,) = (rule.partition("{")[0] for rule in css.split("}") if f"{{text-align:{align}" in rule)
        names = selectors.strip().split(",")
        assert {each for each in names if "th" in each} == {each.replace("td", "th") for each in names}


def test_colours_follow_the_reader(html: str) -> None:
    drawn = " ".join(attrs.get("style") or "" for _, attrs in Page(html).tags)
    assert "var(--after)" in drawn
    assert not re.search(r"(?:fill|stroke): #", drawn)  # a fixed colour would be lost on a dark page
    for shade in range(2):
        for name in ("ink", "muted", "before", "after", "proved", "declared", "overridden"):
            for ground in ("surface", "page"):
                assert contrast(theme.PALETTE[name][shade], theme.PALETTE[ground][shade]) >= 4.5  # WCAG AA


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio of two colours "#rrggbb"."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_same_bytes_in_another_process_and_environment(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("axes.linewidth: 5\nsvg.fonttype: path\n")
    arguments = json.dumps([summary(), {"train": rows(60)}])
    program = (
        "import hashlib, json, sys, test_stages_report_page as t\n"
        "page = t.render_page(*json.loads(sys.stdin.read()), t.graph())\n"
        "print(hashlib.sha256(page.encode()).hexdigest())"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "MPLCONFIGDIR": str(tmp_path),
        "MATPLOTLIBRC": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "TZ": "Asia/Tokyo",
    }
    there = subprocess.run(
        [sys.executable, "-c", program],
        input=arguments,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    here = render_page(*json.loads(arguments), graph())
    assert there.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # HOSTILE as a label is too wide
def test_every_string_is_escaped() -> None:
    poisoned = summary()
    poisoned["seed"] = HOSTILE
    poisoned["settings"] = {f"key {HOSTILE}": f"value {HOSTILE}"}
    poisoned["accuracy"]["eval"][HOSTILE] = grades(0.5, 0.01, 0.5, 0.01, 1000)
    poisoned["accuracy"][HOSTILE] = dict(poisoned["accuracy"]["eval"])
    for key in ("seconds", "tokens"):
        poisoned[key][HOSTILE] = 5
    page = Page(render_page(poisoned, {}, graph(text=HOSTILE)))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onload" in attrs for _, attrs in page.tags)
    for expected in ("key ", "value ", "claim ", "why ", "a "):  # settings, proof, node: whole, and as text
        assert expected + HOSTILE in page.text


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # any text: more than one font holds
@given(text=st.text(max_size=40), status=st.sampled_from(["proved", "declared", "overridden"]))
@settings(max_examples=15)  # a figure takes 0.1 s
def test_any_text_gives_a_well_formed_lineage(text: str, status: str) -> None:
    root = ET.fromstring(lineage_figure(graph(status, text)))
    assert "script" not in {element.tag for element in root.iter()}


@pytest.mark.parametrize("status", ["proved", "declared", "overridden"])
def test_proofs_mark_the_boxes_they_are_about(status: str) -> None:
    root = ET.fromstring(lineage_figure(graph(status, "$z_1$")))
    written = [("".join(element.itertext()), element) for element in root.iter("text")]
    marks = [element for text, element in written if text.endswith(" 1")]
    assert len(marks) == 2  # graph() has one proof, about two of its four boxes
    assert all(f"var(--{status})" in mark.get("style", "") for mark in marks)
    outlines = [e for e in root.iter("path") if f"stroke: var(--{status})" in e.get("style", "")]
    assert len(outlines) == 2
    assert "a $z_1$" in {text for text, _ in written}  # a dollar is a dollar, not mathematics


def test_what_was_not_measured_is_absent() -> None:
    bare = summary()
    del bare["settings"]
    kept = [{k: v for k, v in row.items() if k in ("step", "loss")} for row in rows(30)]
    kept[4]["loss"] = None  # a skipped step
    html = render_page(bare, {"train": kept}, LineageGraph((), (), ()))
    for absent in ("SFT loss", "Reverse KL", "Advantage spread", "Settings", "nan"):
        assert absent not in html
    assert "OPD loss" in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lineage": "hoped"}, "lineage is 'hoped'"),
        ({"accuracy": {}}, "accuracy holds no set"),
        ({"accuracy": {"aime": {"sft": grades(0.8, 0.1, 0.9, 0.1, 10)}}}, "aime.lightning_opd is missing"),
        (
            {"accuracy": {"aime": dict.fromkeys(("sft", "lightning_opd"), grades(82, 0.1, 0.9, 0.1, 10))}},
            "accuracy.aime.sft needs shares",
        ),
    ],
)
def test_bad_summary_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        render_page(summary() | change, {}, graph())


def test_headline_cannot_claim_more_than_the_proofs() -> None:
    with pytest.raises(DataError, match=r"lineage is 'proved', but 'claim teacher' is overridden"):
        render_page(summary(), {}, graph("overridden"))


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [("ab", ["ac"], "names 'c'"), ("aa", [], "two nodes have the id 'a'"), ("ab", ["ab", "ba"], "itself")],
)
def test_bad_graph_is_named(nodes: str, edges: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LineageGraph(
            tuple(Node(n, "model", n, n, n) for n in nodes), tuple(Edge(p, c, "role") for p, c in edges), ()
        )


@given(st.data())
@settings(max_examples=40)
def test_layout_points_down_and_never_overlaps(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    pairs = [(p, c) for c in range(count) for p in range(c)]
    drawn = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    names = data.draw(st.permutations(range(count)))  # the order of `nodes` is not that of the edges
    layout = lay_out(
        LineageGraph(
            tuple(Node(str(n), "artifact", "", "", "") for n in names),
            tuple(Edge(str(p), str(c), "") for p, c in drawn),
            (),
        )
    )
    row_of = {key: r for r, row in enumerate(layout.rows) for key in row}
    assert {key for key in row_of if isinstance(key, str)} == {str(n) for n in range(count)}
    for lane in layout.lanes:
        assert all(row_of[lower] == row_of[upper] + 1 for upper, lower in pairwise(lane))
    for row in layout.rows:
        for one, other in pairwise(row):
            room = (_width(one) + _width(other)) / 2 + GAP
            assert layout.x[other] - layout.x[one] >= room - 1e-6  # rounding of sums of up to 1e3 points


@given(
    st.lists(
        st.tuples(st.floats(-100, 100), st.floats(0, 30), st.sampled_from([1.0, 8.0])), min_size=1, max_size=7
    )
)
def test_spread_is_the_nearest_without_overlap(items: list[tuple[float, float, float]]) -> None:
    wanted, gaps, weights = ([item[i] for item in items] for i in range(3))
    taken = np.concatenate([[0.0], np.cumsum(gaps[:-1])])
    target, weight = np.array(wanted) - taken, np.array(weights)

    def mean(first: int, last: int) -> float:
        return float(np.average(target[first : last + 1], weights=weight[first : last + 1]))

    n = len(items)  # isotonic regression by its max-min formula, exact and slow
    oracle = [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    found = spread(wanted, gaps[:-1], weights)
    np.testing.assert_allclose(found, np.array(oracle) + taken, atol=1e-9)  # fp64 sums of at most 7 terms


def test_smoothing_is_a_centred_mean_over_what_is_finite() -> None:
    values = np.random.default_rng(0).random(80)  # a window of 80 // 25 = 3
    values[[10, 40, 41, 42]] = np.nan
    trend = smooth(values)
    for i in range(80):
        window = values[max(0, i - 1) : i + 2]
        if np.isfinite(window).any():
            assert trend[i] == pytest.approx(np.nanmean(window), rel=1e-12)  # fp64, three terms
        else:
            assert np.isnan(trend[i])


def test_captions_are_of_the_objective_that_was_trained() -> None:
    pages = {
        name: render_page(summary() | {"objective": name}, {"train": rows(5)}, graph())
        for name in OBJECTIVES.things()
    }
    assert len(set(pages.values())) == len(pages)
    assert "its sign carries no meaning" in pages["sampled_reverse_kl"]
    assert "its sign carries no meaning" not in pages["topk_reverse_kl"]
