"""What a journal notes is undone: at once where something fails, or later, beside what others have written."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.utils.journal import MISSING, Entry, Journal, table_of


class Named(nn.Linear):
    """The class that a module becomes."""


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)


def module() -> nn.Linear:
    made = nn.Linear(2, 3)
    made.register_buffer("codes", torch.ones(2))
    made.note, made.tried = "old", 0  # type: ignore[assignment]
    for _ in range(3):
        made.register_forward_hook(lambda *_: None)
    return made


def trace(made: nn.Module) -> dict[str, Any]:
    """All that can be told of a module, the order in its tables too."""
    tables = {name: list(each.items()) for name, each in vars(made).items() if isinstance(each, dict)}
    plain = {name: each for name, each in vars(made).items() if not isinstance(each, dict)}
    bits = {name: each.tolist() for name, each in made.state_dict().items()}
    return {"cls": type(made), "tables": {**tables, "": sorted(plain.items())}, "bits": bits}


def write_all(journal: Journal, made: nn.Linear) -> None:
    """Every verb, on one module."""
    first, middle, _ = made._forward_hooks
    part = journal.part()
    part.put(made, "_parameters", "scale", nn.Parameter(torch.ones(1)), order=("scale",))
    part.drop(made, "_parameters", "weight")
    part.drop(made, "_parameters", "nothing")
    journal.put(made, "_parameters", "weight", nn.Parameter(torch.zeros(3, 2)))
    journal.drop(made, "_forward_hooks", middle)
    journal.drop(made, "_forward_hooks", first)
    journal.drop(made, "_buffers", "codes")
    journal.put(made, "", "added", 1)
    journal.drop(made, "", "note")
    journal.set(made, "tried", 2)
    journal.write(made.bias, torch.ones(3))
    journal.write(made.bias, 2 * torch.ones(3), before=torch.ones(3))
    journal.call(become, made, type(made), Named)


def test_all_verbs_write_and_are_undone() -> None:
    made = module()
    before = trace(made)
    journal = Journal()
    write_all(journal, made)
    assert type(made) is Named and made.tried == 2 and made.added == 1 and made.bias.tolist() == [2, 2, 2]
    assert list(made._parameters) == ["scale", "bias", "weight"] and not made.weight.any()
    assert len(made._forward_hooks) == 1 and not made._buffers and "note" not in vars(made)
    journal.undo()
    assert trace(made) == before
    journal.undo()
    assert trace(made) == before


class Stopped(Journal):
    """Stops at its n-th write: before it, or after it."""

    left, after = 0, False

    def _do(self, entry: Any) -> None:
        Stopped.left -= 1
        if Stopped.left or Stopped.after:
            super()._do(entry)
        else:
            self.entries.append(entry)  # noted, and not written
        if not Stopped.left:
            raise KeyboardInterrupt

    def part(self) -> Journal:
        part = Stopped()
        self.entries.append(part)
        return part


@pytest.mark.parametrize("after", [False, True])
def test_a_block_that_is_interrupted_at_any_write_changes_nothing(after: bool) -> None:
    made = module()
    before, stops = trace(made), 0
    Stopped.after = after
    for n in range(1, 50):
        Stopped.left = n
        try:
            with Stopped() as journal:
                write_all(journal, made)
            break
        except KeyboardInterrupt:
            stops += 1
            assert trace(made) == before, n
    assert stops == 12 and trace(made) != before


def test_a_write_is_recorded_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted inside a write, after it took effect, a block is undone all the same."""
    made = module()
    before, left, stops = trace(made), [0], 0

    def stopping(put: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def written(entry: Any, value: Any) -> None:
            put(entry, value)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return written

    for kind in Entry.__subclasses__():
        monkeypatch.setattr(kind, "put", stopping(kind.put))
    for n in range(1, 50):
        left[0] = n
        try:
            with Journal() as journal:
                write_all(journal, made)
            break
        except KeyboardInterrupt:
            stops += 1
            assert trace(made) == before, n
    assert stops == 12


@pytest.mark.parametrize("after", [False, True])
def test_an_undoing_that_is_interrupted_at_any_write_changes_nothing(after: bool) -> None:
    made = module()
    before, kept, stops = trace(made), Journal(), 0
    write_all(kept, made)
    written = trace(made)
    Stopped.after = after
    for n in range(1, 50):
        Stopped.left = n
        try:
            with Stopped() as journal:
                kept.undo(journal)
            break
        except KeyboardInterrupt:
            stops += 1
            assert trace(made) == written, n
    assert stops == 12 and trace(made) == before


def test_what_others_have_written_since_stays() -> None:
    made = module()
    journal = Journal()
    write_all(journal, made)
    mine = list(made._forward_hooks)
    made.register_buffer("more", torch.ones(1))
    made.register_parameter("theirs", nn.Parameter(torch.ones(1)))
    theirs = made.register_forward_hook(lambda *_: None)
    made.remark = "new"  # type: ignore[assignment]
    journal.undo()
    assert list(made._buffers) == ["codes", "more"] and list(made._parameters) == ["weight", "bias", "theirs"]
    assert list(made._forward_hooks) == [*sorted({*range(mine[0] - 2, mine[0]), *mine}), theirs.id]
    assert made.remark == "new"
    theirs.remove()  # its handle holds the table that is there
    assert theirs.id not in made._forward_hooks and isinstance(made._forward_hooks, OrderedDict)


def test_writing_what_is_there_is_no_write() -> None:
    made = module()
    journal = Journal()
    journal.put(made, "_parameters", "weight", made.weight)
    journal.drop(made, "_parameters", "nothing")
    assert not journal.entries


def test_what_is_derived_is_made_anew_at_the_end_of_an_undoing() -> None:
    made, seen = module(), list[tuple[Any, Any]]()
    journal = Journal()
    journal.afterwards(lambda each: seen.append((each.tried, type(each))), made)
    write_all(journal, made)
    assert not seen
    with pytest.raises(ZeroDivisionError), Journal() as other:
        journal.undo(other)
        assert seen == [(0, nn.Linear)]
        raise ZeroDivisionError
    assert seen == [(0, nn.Linear), (2, Named)]


def test_attributes_that_other_code_sets_are_noted() -> None:
    made = SimpleNamespace(held=False, kept=[1])
    with pytest.raises(ZeroDivisionError), Journal() as journal:
        journal.note(made)
        made.held = True
        raise ZeroDivisionError
    assert made == SimpleNamespace(held=False, kept=[1])


def clone(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("again", [copy.deepcopy, clone])
def test_a_copy_has_a_journal_of_its_own(again: Any) -> None:
    made = nn.Linear(2, 3)
    weight, bits = made.weight, made.weight.tolist()
    journal = Journal()
    journal.drop(made, "_parameters", "weight")
    journal.put(made, "_buffers", "codes", torch.ones(1))
    journal.call(become, made, nn.Linear, Named)
    other, theirs = again((made, journal))
    theirs.undo()
    assert type(made) is Named and type(other) is nn.Linear and not other._buffers
    assert other.weight.tolist() == bits and other.weight is not weight
    journal.undo()
    assert made.weight is weight


def test_where_a_table_is() -> None:
    made = module()
    assert table_of(made, "") is vars(made) and table_of(made, "_parameters") is made._parameters
    assert copy.deepcopy(MISSING) is MISSING and pickle.loads(pickle.dumps(MISSING)) is MISSING


def test_values_are_written_in_place() -> None:
    tensor: Tensor = torch.zeros(2)
    version = tensor._version
    journal = Journal()
    journal.write(tensor, torch.ones(2))
    assert tensor.tolist() == [1, 1] and tensor._version > version  # torch counts it
    journal.undo()
    assert tensor.tolist() == [0, 0]
