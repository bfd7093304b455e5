"""What the README says in figures is what other places have found; and it stays short where it sells."""

import json
import re
from pathlib import Path

import peftcore
from benchmarks import page
from benchmarks.page import plain
from benchmarks.rows import Row
from benchmarks.timing import Estimate
from peftcore.cli.inspection import methods_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCREEN = README.partition("\n## ")[0]
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| \[(\w+)\]\((docs/[\w.#-]+)\) \|$", re.MULTILINE)
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
MEASURED = re.compile(r"^\| (step, [^|]+): time [^|]+ \| [^|]+ \| ([^|]+) \| (-?[\d.]+) \(", re.MULTILINE)
"""A figure of a step, what peft's is, and the ratio of what both add."""
READ = ("as it is", "as a LoRA")
SECTIONS = {
    "everyday": "python -m benchmarks.everyday",
    "real": "python -m benchmarks.everyday real",
    "bench": "python -m benchmarks --threads 1 --page",
}
"""Of the page of figures, by what the last column calls them."""


def measured(section: str) -> dict[str, tuple[str, str]]:
    """Both figures of each row that a command has written."""
    table = PAGE.partition(f"<!-- begin: {section} -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| ")]
    return {label: (plain(ours), plain(theirs)) for label, ours, theirs in rows}


def test_figures_beside_peft_are_those_of_the_page_of_figures() -> None:
    rows = ROW.findall(README)
    assert 1 <= len(rows) <= 10
    for label, ours, theirs, command, _ in rows:
        assert measured(SECTIONS[command])[label] == (plain(ours), plain(theirs)), label


def test_a_command_writes_its_rows_into_the_table(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("| a step | 1 ms | 2 ms | [x](y) |\n| a stepladder | 1 ms | 2 ms | [x](y) |\n")
    page.sell([Row("a step", "3.1e+03 ms", "4 ms", Estimate(1.0, 1.0, 1.0), 1.0)], file)
    assert file.read_text() == "| a step | 3100 ms | 4 ms | [x](y) |\n| a stepladder | 1 ms | 2 ms | [x](y) |\n"


def test_what_is_slower_than_peft_is_said() -> None:
    slower = {name: float(ratio) for name, _, ratio in MEASURED.findall(PAGE) if float(ratio) > 1}
    assert set(slower) == {"step, dora, low memory", "step, randlora", "step, oft, compiled"}
    for name, ratio in slower.items():
        assert f"{ratio:g} times" in SCREEN, name


def test_figures_of_a_busy_machine_are_called_so() -> None:
    loads = [float(each) for each in re.findall(r"load of the machine before ([\d.]+);", PAGE)]
    assert ("are to be measured again" in SCREEN) == any(load > 0.5 for load in loads)
    found = PAGE.partition(f"<!-- begin: {SECTIONS['real']} -->")[2].partition("<!-- end -->")[0]
    ratios = re.findall(
        r": a (?:training step|token) with LoRA \|[^|]+\|[^|]+\| ([\d.]+) \([\d.]+ to ([\d.]+)\)", found
    )
    said = f"({' and '.join(f'{float(ratio):.2f}' for ratio, _ in ratios)}, both intervals reach beyond 1)"
    assert (said in SCREEN) == all(float(high) > 1 for _, high in ratios)


def test_methods_are_counted_by_what_they_do() -> None:
    """As `peftcore methods` counts them, and the table of what other programs read."""
    told = re.findall(r"\d+", methods_table.tally(methods_table.records(peftcore.methods(), False)))
    assert len(peftcore.methods()) == int(told[0])
    methods, trains, combines, quantized, merges, rows, _, checked = told
    assert SCREEN.startswith(f"# peftcore\n\n{methods} methods of parameter-efficient fine-tuning")
    assert f"{trains} train parameters of their own, {combines} combine trained adapters, and {quantized} are" in SCREEN
    assert (
        f"{merges} merge into the weights, {rows} take samples" in SCREEN and f"and {checked} are\n[checked" in SCREEN
    )
    readers = (ROOT / "docs/readers.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| `\w+` \| ([^|]+) \| ([^|]+) \|(?: [^|]+ \|){6}$", readers, re.MULTILINE)
    assert len(cells) == int(methods)
    peft, vllm = (sum(each in READ for each in column) for column in zip(*cells, strict=True))
    assert f"peft reads {peft} as they were trained, and [vLLM](docs/readers.md#every-method) {vllm}." in SCREEN


def test_what_is_said_of_dora_beside_lora_is_what_was_measured() -> None:
    text = (ROOT / "docs/choose.md").read_text(encoding="utf-8")
    found = {
        row["method"]: row["accuracy"] for row in json.loads((ROOT / "docs/generate/demo.json").read_text())["rows"]
    }
    assert f"| tweets, MiniLM, one seed: accuracy | {found['lora']:.3f} | {found['dora']:.3f} |" in text
    lora, dora = (
        re.findall(rf"^\| ViT \| `{name}` \| ([\d.]+) \|", text, re.MULTILINE)[0] for name in ("lora", "dora")
    )
    assert f"| digits, a small ViT: accuracy | {lora} | {dora} |" in text


def test_the_command_for_a_clone_names_all_packages() -> None:
    """What it installs is what the extra `all` wants, from here: `tests/packaging` installs these packages."""
    assert 'pip install ".[all]" ./plugins/*/ ' in SCREEN
    names = {
        re.findall(r'^name = "([^"]+)"', each.read_text(), re.M)[0] for each in ROOT.glob("plugins/*/pyproject.toml")
    }
    plugins = re.search(r"^plugins = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert plugins is not None and set(re.findall(r'"(peftcore-\w+)', plugins[1])) == names - {"peftcore-lab"}
    assert 'train = ["peftcore-lab' in (ROOT / "pyproject.toml").read_text()


def test_the_first_screen_installs_applies_and_shows_a_picture() -> None:
    code = re.findall(r"```python\n(.*?)```", SCREEN, re.DOTALL)[0].split("\n\n")[-1]
    assert len(code.strip().splitlines()) == 8
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", SCREEN)
    assert (ROOT / picture).stat().st_size < 200_000
