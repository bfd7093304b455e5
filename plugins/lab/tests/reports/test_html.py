"""The report of a comparison as a page and as a picture: from made-up results, nothing is trained."""

import base64
import hashlib
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_up import TOTAL, report, seeds, trial
from PIL import Image

from peftcore.utils.numbers import SPACE
from peftcore_lab.reports import html, plots
from peftcore_lab.reports.labels import plain, shorten
from peftcore_lab.reports.report_text import findings
from peftcore_lab.reports.trials import ComparisonReport

NASTY = '<script>alert(1)</script> & "quotes" $x^\x07'
LONG = "lora on every projection of every block with a rank of sixteen, and a scale that is learned"


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
def compared() -> ComparisonReport:
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
        "800 for training, 400 for validation",
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
        ("Majority baseline", "", "0.600"),
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
    assert "bitfit" in names and "full" in names and "majority baseline 0.600" in names
    assert shorten(LONG, html.WIDE.name) in names
    assert LONG not in names


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


# What is no number.


def test_a_score_that_is_no_number_is_said_and_not_drawn():
    bad = [trial("bad", math.nan, 10), trial("bad", 0.5, 10, seed=1)]
    broken = report(trial("good", 0.8, 20), *bad, trial("worse", 0.7, 30))
    assert [entry.label for entry in broken.front()] == ["good"]
    assert [point.entry.label for point in plots.points(broken, plots.PARAMETERS)] == ["good", "worse"]
    page = Page(html.page(broken))
    assert "not a number" in page.said and f"not a number{SPACE}±" not in page.text
    assert "nan" not in [value for value in page.values("data-value") if value]


# The picture.


def test_picture(compared, tmp_path: Path):
    plots.draw_picture(compared, tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    plots.draw_picture(report(), tmp_path / "nothing.png")


@pytest.mark.slow
def test_what_models_drew_is_in_the_page(tmp_path: Path) -> None:
    """As data: the page asks for no file."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "samples.png")
    drawn = report(trial("lora", 0.9, 10, picture="samples.png"), trial("other", 0.8, 10))
    images = [attributes for tag, attributes in Page(html.page(drawn, tmp_path)).tags if tag == "img"]
    (image,) = images
    source = str(image["src"])
    assert source.startswith("data:image/png;base64,") and "lora" in str(image["alt"])
    assert base64.b64decode(source.partition(",")[2]) == (tmp_path / "samples.png").read_bytes()
    assert not [tag for tag, _ in Page(html.page(drawn)).tags if tag == "img"]
