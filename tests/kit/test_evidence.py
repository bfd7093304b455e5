"""What a test must have done for a method to count as checked against somebody else's numbers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.registry.evidence import EvidenceRow, Source
from peftcore.testing import HOSTS, CheckFailed, against, frozen, gathering
from peftcore.testing.checkouts import flags, load
from peftcore.testing.declared_evidence import MADE, declarations, freeze

AUTHORS: dict[str, Any] = {"repository": "owner/code", "commit": "abc123", "script": "model.py"}


def ours(method: str = "lora") -> Tensor:
    model = nn.Sequential(nn.Linear(4, 4))
    peftcore.apply(model, method, target="0")
    output: Tensor = model(torch.randn(2, 4))
    return output


def theirs() -> Tensor:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    output: Tensor = model(torch.randn(2, 4))
    return output


def numbers(folder: Path, **changed: Any) -> Path:
    file = folder / "numbers.json"
    file.write_text(json.dumps({**AUTHORS, "versions": {}, "numbers": [1.0], **changed}))
    file.with_suffix(".py").write_text("")
    return file


def test_a_library_is_met_when_it_returned_numbers() -> None:
    @against("peft 0.21", "lora")
    def compares() -> None:
        ours(), theirs()

    compares()
    assert [each.named({}) for each in declarations(compares)] == [("lora",)]


@pytest.mark.parametrize("method", ["unipelt", "lst"])
def test_a_declaration_alone_proves_nothing(method: str, tmp_path: Path) -> None:
    """These have no other numbers; to import a library, or to make its config, is not to compare with it."""

    @against("peft 0.21", method)
    def says_so() -> None:
        peft.LoraConfig(r=2)
        peftcore.plan(HOSTS["llama"].build()[0], method)

    @against("authors", method, **AUTHORS)
    def reads_nothing() -> None:
        peftcore.plan(HOSTS["llama"].build()[0], method)

    for test in (says_so, reads_nothing):
        with pytest.raises(CheckFailed, match=r"returned numbers|reads no numbers"):
            test()


def test_the_method_itself_has_to_run() -> None:
    @against("peft 0.21", "dora")
    def compares() -> None:
        ours("lora"), theirs()

    with pytest.raises(CheckFailed, match="no code of it ran"):
        compares()


def test_a_library_has_to_be_the_one_that_is_named() -> None:
    @against("peft 0.20", "lora")
    def compares() -> None:
        ours(), theirs()

    with pytest.raises(CheckFailed, match="is installed"):
        compares()


def test_frozen_numbers_have_to_be_those_that_are_named(tmp_path: Path) -> None:
    @against("authors", "lora", **AUTHORS)
    def reads(**changed: Any) -> None:
        ours()
        assert frozen(numbers(tmp_path, **changed)) == [1.0]

    reads()
    with pytest.raises(CheckFailed, match="reads no numbers"):
        reads(commit="another")


def test_a_part_is_read_that_is_declared(tmp_path: Path) -> None:
    """Outputs are no start, and the start of an adapter is met only by what was frozen as such."""

    @against("authors", "lora", **AUTHORS, part="start")
    def reads(*parts: Any, run: bool = True) -> None:
        if run:
            ours()
        for part in parts:
            frozen(numbers(tmp_path, start=[2.0], trains=["w"]), part)

    reads("start")
    reads("outputs", "start")
    for parts in ((), ("outputs",), ("trains", "outputs")):
        with pytest.raises(CheckFailed, match=r"compares start with owner/code, .* frozen\(path, 'start'\)"):
            reads(*parts)
    with pytest.raises(CheckFailed, match="no code of it ran"):
        reads("start", run=False)
    with pytest.raises(CheckFailed, match="lacks defaults"):
        frozen(numbers(tmp_path), "defaults")


def test_code_of_others_is_frozen_and_named(tmp_path: Path) -> None:
    @against("others", "lora", **AUTHORS)
    def reads(**changed: Any) -> None:
        ours()
        frozen(numbers(tmp_path, **changed))

    reads(source="others")
    with pytest.raises(CheckFailed, match="reads no numbers"):
        reads()
    assert str(Source("others", "owner/code")) == "code of owner/code"


def test_a_library_may_be_frozen(tmp_path: Path) -> None:
    """One that cannot be installed beside the others; its numbers are no authors' ones."""

    @against("adapters 1.3", "lora", **AUTHORS)
    def reads(**changed: Any) -> None:
        ours()
        assert frozen(numbers(tmp_path, **changed)) == [1.0]

    reads(source="adapters 1.3")
    for changed in ({}, {"source": "adapters 1.2"}):
        with pytest.raises(CheckFailed, match="reads no numbers"):
            reads(**changed)


def test_frozen_numbers_say_where_they_are_from(tmp_path: Path) -> None:
    file = numbers(tmp_path)
    file.with_suffix(".py").unlink()
    with pytest.raises(CheckFailed, match=r"needs numbers\.py"):
        frozen(file)
    file.write_text("{}")
    with pytest.raises(CheckFailed, match="lacks repository"):
        frozen(file)


def test_a_declaration_is_whole() -> None:
    for wrong in (("authors", "lora"), ("others", "lora"), ("peft", "lora"), ("peft 0.21",)):
        with pytest.raises(ValueError, match=r"frozen numbers need|named with the version|name the methods"):
            against(*wrong)
    with pytest.raises(ValueError, match="frozen numbers need"):
        against("peft 0.21", "lora", commit="abc123")
    with pytest.raises(ValueError, match="of which only outputs"):
        against("peft 0.21", "lora", part="start")


def test_each_declaration_of_a_test_is_watched() -> None:
    """The library, or the method, of the outer one may run after the inner one has seen all, or never."""

    @against("peft 0.21", "lora")
    @against("transformers 5.24", "dora")
    def compares(*methods: str, peft: bool = True) -> None:
        HOSTS["llama"].output(HOSTS["llama"].build()[0](**HOSTS["llama"].build()[1]))
        for method in methods:
            ours(method)
        if peft:
            theirs()

    compares("dora", "lora")
    with pytest.raises(CheckFailed, match="no code of it ran"):
        compares("dora")
    with pytest.raises(CheckFailed, match=r"peft 0\.21, but no function of it returned numbers"):
        compares("dora", "lora", peft=False)


def test_the_method_may_be_an_argument() -> None:
    @against("peft 0.21", of="method")
    def compares(method: str) -> None:
        ours(method), theirs()

    compares("lora")
    with pytest.raises(CheckFailed, match="no code of it ran"):

        @against("peft 0.21", of="method")
        def other(method: str) -> None:
            ours("lora"), theirs()

        other("dora")


def test_numbers_are_made_by_the_script_beside_them(tmp_path: Path) -> None:
    script = tmp_path / "numbers.py"
    script.write_text(
        "from peftcore.registry.evidence import Source\n"
        "SOURCE, VERSIONS = Source('authors', 'owner/code', 'abc123', 'model.py'), ('torch',)\n"
        "def numbers(checkout): return (checkout / SOURCE.script).read_text()\n"
    )
    (tmp_path / "model.py").write_text("theirs")
    file = script.with_suffix(".json")
    file.write_text(freeze(script, tmp_path))
    assert frozen(file) == "theirs" and json.loads(file.read_text())["versions"]["torch"]
    script.write_text(script.read_text().replace("'authors'", "'peft 0.21'"))
    assert json.loads(freeze(script, tmp_path))["source"] == "peft 0.21"
    script.write_text(script.read_text().replace("0.21", "0.20"))
    with pytest.raises(CheckFailed, match="is installed"):
        freeze(script, tmp_path)


def test_parts_are_made_by_the_functions_of_their_names(tmp_path: Path) -> None:
    """Each with the same draws, whatever ran before."""
    script = tmp_path / "numbers.py"
    head = (
        "import random, torch\nfrom peftcore.registry.evidence import Source\n"
        "SOURCE, VERSIONS = Source('authors', 'owner/code', 'abc123', 'model.py'), ()\n"
    )
    script.write_text(head)
    with pytest.raises(CheckFailed, match="has none of the functions numbers, start, trains, defaults"):
        freeze(script, tmp_path)
    start = "def start(checkout): return [torch.rand(()).item(), random.random()]\n"
    script.write_text(f"{head}{start}def trains(checkout): return ['w']\n")
    torch.rand(3)
    file = script.with_suffix(".json")
    file.write_text(freeze(script, tmp_path))
    assert frozen(file, "trains") == ["w"] and json.loads(file.read_text()).keys() & MADE.values() == {
        "start",
        "trains",
    }
    first = frozen(file, "start")
    script.write_text(f"{head}{start}def numbers(checkout): return torch.rand(()).item()\n")
    assert json.loads(freeze(script, tmp_path))["start"] == first


class Item:
    """What pytest has of a test."""

    def __init__(self, function: Any) -> None:
        self.function = function


def test_files_and_tests_say_the_same(tmp_path: Path) -> None:
    @against("peft 0.21", "lora")
    def compares() -> None: ...

    items: Any = [Item(compares)]
    ((file, told),) = gathering.declared(items).items()
    assert file.name == "evidence.json" and told == {"lora": {EvidenceRow(Source("peft 0.21"))}}
    (tmp_path / "evidence.json").write_text('{"lst": [{"name": "peft 0.21"}]}')
    wrong = gathering.differences([], [tmp_path])
    assert wrong == [f"{tmp_path / 'evidence.json'}: lst: peft 0.21 is compared with in no test"]


def test_a_file_of_a_checkout_is_imported_without_what_it_does_not_need(tmp_path: Path) -> None:
    folder = tmp_path / "checkout_of_a_test" / "models"
    folder.mkdir(parents=True)
    (folder / "beside.py").write_text("TWO = 2\n")
    (folder / "model.py").write_text(
        "import wanting.engine\nfrom .beside import TWO\nclass Model(wanting.engine.Base): pass\n"
    )
    module = load(folder / "model.py", root=tmp_path, absent=["wanting", "wanting.engine"])
    assert module.TWO == 2


def test_options_of_a_command_are_read() -> None:
    text = """
#!/bin/bash
RANK=8  # or --rank 4
export NAME="rte"
python run.py --rank ${RANK} --lr=1e-3 -s -1 --task $NAME --bias --names a \\
    --alpha 2. --path $HOME/out
"""
    assert flags(text) == {
        **{"rank": 8, "lr": 1e-3, "s": -1, "task": "rte", "bias": True, "names": "a", "alpha": 2.0},
        "path": "$HOME/out",
    }
