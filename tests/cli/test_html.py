"""The report of a comparison as a page and as a picture: from made-up results, nothing is trained."""

import base64
import hashlib
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Annotation
from PIL import Image

from peftcore.comparing.numbers import SPACE, decimals, digits, duration, fixed, listed, percent, short, size
from peftcore.comparing.reports import curves, html, plots
from peftcore.comparing.reports.labels import plain, shorten, spread
from peftcore.comparing.reports.summary import findings
from peftcore.comparing.reports.trials import Report, Trial, front

TOTAL = 1_000_000
NASTY = '<script>alert(1)</script> & "quotes" $x^\x07'
LONG = "lora on every projection of every block with a rank of sixteen, and a scale that is learned"


def trial(label: str, score: float, trainable: int, seed: int = 0, metric: str = "accuracy", **changed) -> Trial:
    curve = [(10, 0.9 * score), (20, score)]
    values = {
        "label": label,
        "method": "full" if label == "full" else "lora",
        "options": {"rank": 8, "target": "a\"b'c<i>"},
        "seed": seed,
        "learning_rate": 1e-3,
        "trainable": trainable,
        "total": TOTAL,
        "before": {metric: 0.25},
        "after": {metric: score, "loss": 1.25},
        "curve": curve,
        "losses": [(10, 1.5), (20, 1.25)],
        "seconds_per_step": 0.1 + trainable / TOTAL,
        "peak_memory": 10**9 + 1000 * trainable,
        "file_size": 4 * trainable,
        "folder": f"runs/{seed}",
    }
    return Trial(**{**values, **changed})


def report(*trials: Trial, metric: str = "accuracy", greater: bool = True, **changed) -> Report:
    values = {
        "model": "models/tiny-encoder",
        "task": "text-classification",
        "data": "texts.csv",
        "train_size": 800,
        "held_out_size": 400,
        "training": {"steps": 20, "epochs": None, "batch_size": 16, "accumulate": 2, "learning_rate": 1e-3},
        "seconds": 4210.0,
    }
    return Report(metric=metric, greater=greater, trials=trials, **{**values, **changed})


def seeds(label: str, score: float, trainable: int) -> list[Trial]:
    return [trial(label, score + shift, trainable, seed) for seed, shift in enumerate((-0.01, 0.01))]


class Page(HTMLParser):
    """What a browser makes of it: elements, cells of tables, words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def cells(self, count: int) -> list[list[str]]:
        """Of rows with so many, the head first."""
        return [[" ".join(cell.split()) for cell in row] for row in self.rows if len(row) == count]

    def values(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def compared() -> Report:
    trials = [
        *seeds("bitfit", 0.70, 1_000),
        *seeds(NASTY, 0.80, 20_000),
        *seeds(LONG, 0.75, 30_000),
        *seeds("full", 0.90, TOTAL),
    ]
    return report(*trials, floor=0.6, failed={"gptq <b>": 'no module matches "attn"'})


@pytest.fixture(scope="module")
def page(compared) -> Page:
    return Page(html.page(compared))


@pytest.fixture(scope="module")
def drawings(page) -> list[ElementTree.Element]:
    """The charts, read as strictly as XML is."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg [^>]*role=.*?</svg>", page.text, re.S)]


# The page.


def test_asks_nothing_of_any_network_and_runs_nothing_but_its_own_script(page):
    assert "://" not in page.text
    assert not page.values("src")
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert set(re.findall(r"url\((.)", page.text)) <= {"#"} and "@import" not in page.text
    script = re.search(r"<script>(.*?)</script>", page.text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in page.text


def test_what_users_wrote_is_text(page):
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == 1 and not tags["b"] and not tags["i"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert NASTY in page.said
    assert """rank=8, target=a"b'c<i>, lr=0.001""" in page.said
    assert NASTY in page.values("data-value")


def test_says_what_was_compared(page):
    for words in (
        "5 ways to fine-tune tiny-encoder",
        "Model models/tiny-encoder Task text-classification Data texts.csv",
        "800 to train on, 400 held out",
        "20 steps of 2 × 16 examples",
        "Seeds 0 and 1",
        "accuracy (more is better)",
        "one standard error of the mean over seeds",
        "1 h 10 min",
        "peftcore 0.",
    ):
        assert words in page.said, words


def test_the_table_has_every_configuration_and_marks_the_front_and_the_best(compared, page):
    heads, *rows = page.cells(9)
    assert heads[5:] == ["accuracy after", "s/step", "peak memory", "file size"]
    assert rows[0][2:6] == ["1,000", "0.100%", "0.250", "0.700 ± 0.010"]
    labels = [row[1].partition(" rank=")[0] for row in rows]
    assert labels == ["bitfit front", f"{NASTY} front", LONG, "full front"]
    assert [entry.label for entry in compared.front()] == ["bitfit", NASTY, "full"]
    bold = re.findall(r"<td[^>]*><strong>(.*?)</strong>", page.text)
    assert [text.replace(SPACE, " ") for text in bold] == [
        "1,000", "0.100%", "0.101", "1.00 GB", "4.00 kB", "0.900 ± 0.010",
    ]  # fmt: skip


def test_the_table_can_be_sorted_by_keyboard_too(page):
    heads = [attributes for tag, attributes in page.tags if tag == "th" and "data-first" in attributes]
    assert len(heads) == 9
    assert [head.get("aria-sort") for head in heads] == ["ascending", *[None] * 8]
    assert [head["data-first"] for head in heads].index("descending") == 5, "the best accuracy comes first"
    assert sum(tag == "button" for tag, _ in page.tags) == 9
    values = [float(value) for value in page.values("data-value") if value and value.startswith("0.8")]
    assert values == [pytest.approx(0.80)], "what is sorted has all digits"


def test_findings_are_the_best_the_best_of_those_that_train_less_and_the_floor(compared):
    assert [(each.name, each.label, each.score.replace(SPACE, " ")) for each in findings(compared)] == [
        ("Best", "full", "0.900 ± 0.010"),
        ("Best of those that train less", NASTY, "0.800 ± 0.010"),
        ("Floor", "", "0.600"),
    ]


def test_the_smallest_within_the_error_of_the_best_is_a_finding():
    found = findings(report(trial("lora", 0.900, 500), trial("dora", 0.905, 900), trial("ia3", 0.6, 10)))
    assert [(each.name, each.label) for each in found] == [
        ("Best", "dora"),
        ("Smallest within one ± of the best", "lora"),
    ]


def test_failed_ones_are_listed_with_the_reason(page):
    assert 'gptq <b> no module matches "attn"' in page.said


def test_nothing_ran():
    nothing = Page(html.page(report(failed={"lora": "out of memory"})))
    assert "1 way to fine-tune" in nothing.said and "lora out of memory" in nothing.said
    assert not [tag for tag, _ in nothing.tags if tag in ("table", "figure")]


# The charts.


def test_charts_are_well_formed_named_and_in_the_colours_of_the_theme(drawings, page):
    assert len(drawings) == 10, "five charts, for wide windows and narrow ones"
    for drawing in drawings:
        assert drawing.get("role") == "img" and drawing.get("aria-label")
        ids = {element.get("id") for element in drawing.iter()} - {None}
        assert drawing.get("aria-describedby") in ids and drawing[0].tag == "desc" and drawing[0].text
        text = ElementTree.tostring(drawing, encoding="unicode")
        assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', text)) <= ids
        assert not re.search(r"#[0-9a-f]{6}\b", text) and "var(--blue)" in text
        assert drawing.find(".//text") is not None, "text is text"
    ids = page.values("id")
    assert len(ids) == len(set(ids))


def test_every_theme_has_every_colour(page):
    used = set(re.findall(r"var\(--(\w+)\)", page.text))
    for theme in re.findall(r":root \{(.*?)\}", page.text, re.S)[:2]:
        assert used <= set(re.findall(r"--(\w+):", theme))
    assert len(set(vars(plots.LIGHT).values())) == len(vars(plots.LIGHT)), "colours are told apart by their values"


def test_points_tell_their_numbers_and_belong_to_their_row(compared, drawings):
    for number, entry in enumerate(compared.entries(), 1):
        marks = [mark for mark in drawings[0].iter("g") if mark.get("data-entry") == str(number)]
        assert len(marks) >= 3
        assert {mark.findtext("title").splitlines()[0] for mark in marks} == {plain(entry.label)}
        assert f"{entry.trainable:,} trainable parameters" in marks[0].findtext("title")


def test_names_are_short_enough_for_their_chart(drawings):
    names = [text.text.strip() for text in drawings[0].iter("text")]
    assert "bitfit" in names and "full" in names and "floor 0.600" in names
    assert shorten(LONG, html.WIDE.name) in names
    assert LONG not in names


@pytest.mark.parametrize("shape", [html.WIDE, html.HALF, html.NARROW], ids=["wide", "half", "narrow"])
@pytest.mark.parametrize("cost", [plots.PARAMETERS, plots.MEMORY], ids=["parameters", "memory"])
def test_no_name_covers_a_point_or_another_name(shape, cost):
    crowd = [trial(f"method number {n}", 0.8 + 0.01 * (7 * n % 11), 2_000 + 150 * (5 * n % 23)) for n in range(20)]
    with plots.style():
        figure = plots.trade_off(report(*crowd, floor=0.3), cost, shape)
        (axes,) = figure.axes
        boxes = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        points = axes.transData.transform([(cost.of(e), e.score) for e in report(*crowd).entries()])
    assert len(boxes) >= 18, "those without a name have a number, but for a few"
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes if box.count_contains(points)]
    assert all(min(box.x0, box.y0) >= 0 and box.x1 <= shape.width and box.y1 <= shape.height for box in boxes)


def test_one_far_worse_than_all_others_is_drawn_at_the_edge():
    tight = [trial(f"lora {n}", 0.85 + 0.01 * n, 1_000 * (n + 1)) for n in range(4)]
    drawn, beyond = plots.split(report(), plots.points(report(*tight, trial("probe", 0.3, 10)), plots.PARAMETERS))
    assert [point.entry.label for point in beyond] == ["probe"] and len(drawn) == 4
    assert not plots.split(report(), drawn)[1]
    with plots.style():
        figure = plots.trade_off(report(*tight, trial("probe", 0.3, 10)), plots.PARAMETERS, html.WIDE)
    assert figure.axes[0].get_ylim()[0] > 0.8
    assert "probe (0.300)" in [text.get_text() for text in figure.axes[0].texts]


def test_a_front_of_each_chart_is_that_of_its_cost():
    slow = trial("slow", 0.9, 10, seconds_per_step=9.0)
    quick = trial("quick", 0.8, 20, seconds_per_step=1.0)
    both = report(slow, quick)
    assert [point.best for point in plots.points(both, plots.PARAMETERS)] == [True, False]
    assert [point.best for point in plots.points(both, plots.SECONDS)] == [True, True]


# Less is better.


def test_less_is_better():
    lower = report(
        *(trial(label, score, size, metric="perplexity") for label, score, size in (("a", 9.0, 10), ("b", 7.5, 99))),
        trial("c", 8.0, 500, metric="perplexity"),
        metric="perplexity",
        greater=False,
    )
    page = Page(html.page(lower))
    labels = [row[1].partition(" rank=")[0] for row in page.cells(9)[1:]]
    assert labels == ["a front", "b front", "c"]
    assert "<strong>7.500</strong></td>" in page.text
    assert "Best 7.500 b" in page.said and "perplexity (less is better)" in page.said
    assert "±" not in page.said, "one seed says nothing of the error of a perplexity"
    head = next(attributes for tag, attributes in page.tags if "data-first" in attributes)
    assert head["data-first"] == "ascending"
    assert "descending" not in page.values("data-first")


def test_perplexities_far_apart_are_drawn_by_their_ratios():
    trials = [trial("a", 20.0, 10, metric="perplexity", before={"perplexity": 5_000.0})]
    given = report(*trials, metric="perplexity", greater=False)
    with plots.style():
        figure = curves.draw(curves.scores(given), "perplexity", True, html.WIDE)
    assert figure.axes[0].get_yscale() == "log"


# What is no number.


def test_a_score_that_is_no_number_is_said_and_not_drawn():
    bad = [trial("bad", math.nan, 10), trial("bad", 0.5, 10, seed=1)]
    broken = report(trial("good", 0.8, 20), *bad, trial("worse", 0.7, 30))
    assert [entry.label for entry in broken.front()] == ["good"]
    assert [point.entry.label for point in plots.points(broken, plots.PARAMETERS)] == ["good", "worse"]
    page = Page(html.page(broken))
    assert "not a number" in page.said and f"not a number{SPACE}±" not in page.text
    assert "nan" not in [value for value in page.values("data-value") if value]


# Curves.


def test_a_mean_stops_where_one_of_its_seeds_stopped():
    early = trial("lora", 0.8, 10, seed=0, curve=[(10, 0.6), (20, 0.8)])
    late = trial("lora", 0.9, 10, seed=1, curve=[(10, 0.7), (20, 0.6), (30, 0.9)])
    (curve,) = curves.scores(report(early, late))
    assert curve.steps == (0, 10, 20)
    assert curve.mean == pytest.approx((0.25, 0.65, 0.7))
    assert (curve.low[1], curve.high[1]) == (0.6, 0.7)
    assert curve.result == pytest.approx(0.85), "what is written beside it is the score of the table"


def test_many_curves_have_a_chart_each():
    few = curves.losses(report(*(trial(f"m{n}", 0.8, 10 + n) for n in range(6)), trial("full", 0.9, TOTAL)))
    many = curves.losses(report(*(trial(f"m{n}", 0.8, 10 + n) for n in range(7))))
    with plots.style():
        together = curves.draw(few, "training loss", True, html.HALF)
        apart = curves.draw(many, "training loss", True, html.NARROW)
    assert len(together.axes) == 1 and len(apart.axes) == 7
    assert {text.get_text().strip() for text in together.axes[0].texts} == {*(f"m{n}" for n in range(6)), "full"}
    colours = {line.get_color() for line in together.axes[0].lines}
    assert len(colours) == 7
    assert [axes.get_title("left") for axes in apart.axes] == [f"m{n}" for n in range(7)]


# The picture.


def test_picture(compared, tmp_path: Path):
    plots.draw_picture(compared, tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    plots.draw_picture(report(), tmp_path / "nothing.png")


# Small parts.


def test_numbers():
    assert [size(n).replace(SPACE, " ") for n in (999, 1_200, 3_600_000_000)] == ["999 B", "1.20 kB", "3.60 GB"]
    assert [short(n) for n in (512, 10_000, 2_500_000)] == ["512", "10k", "2.5M"]
    assert [percent(n) for n in (1, 0.0236, 0.0000034)] == ["100%", "2.36%", "0.000340%"]
    assert [digits(n) for n in (0.2, 12, 345.6)] == ["0.200", "12.0", "346"]
    assert [fixed(v, decimals([v])) for v in (0.91234, 12.345, 54_321.0, math.inf)] == ["0.912", "12.35", "54,321", "∞"]
    assert decimals([2.1, 224.9]) == 2, "the best perplexity keeps its digits beside the worst"
    times = [duration(seconds).replace(SPACE, " ") for seconds in (45, 720, 3599.9, 4210)]
    assert times == ["45 s", "12 min", "1 h 0 min", "1 h 10 min"]
    assert [listed(range(n)) for n in (1, 2, 3)] == ["0", "0 and 1", "0, 1 and 2"]


def test_shortened_names_keep_both_ends():
    assert shorten("lora, rank 8, on queries", 40) == "lora, rank 8, on queries"
    assert shorten("lora\nrank\t8\x00", 40) == "lora rank 8"
    assert shorten("lora, rank 8, on queries", 12) == "lora,…ueries"


def test_heights_are_spread_no_more_than_needed():
    assert spread([5, 50], 10, 0, 100) == [5, 50]
    assert spread([50, 50, 52], 10, 0, 100) == [50, 60, 70]
    assert spread([98, 99, 100], 10, 0, 100) == [80, 90, 100]


def test_front_by_another_cost():
    entries = report(trial("a", 0.9, 10, peak_memory=9), trial("b", 0.8, 20, peak_memory=5)).entries()
    better = report().better
    assert [entry.label for entry in front(entries, better)] == ["a"]
    assert [entry.label for entry in front(entries, better, lambda entry: entry.peak_memory)] == ["b", "a"]
