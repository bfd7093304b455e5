"""Values are followed through assignments, conditions and calls of source code, which never runs."""

import ast
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from peftcore.roles.code_frames import CodeFrame, Value, either, parameters
from peftcore.roles.source_code import UNKNOWN, definition_of


class Follow(CodeFrame):
    """Notes what modules are called, and says "seen" of what they return."""

    def called(
        self, call: ast.Call, callee: Value, owner: Value | None, given: list[Value], named: dict[str, Value]
    ) -> Value:
        if isinstance(callee.known, nn.Module):
            self.question.append(callee.known)
            return Value(state="seen")
        if callee.known is not UNKNOWN and owner is not None and owner.state is None:
            return (
                self.entered(callee.known.__func__, [Value(callee.known.__self__), *given], named, Value()) or Value()
            )
        return Value() if owner is None else owner

    def looped(self, target: ast.expr | None, each: ast.expr | None, body: Callable[[], None]) -> None:
        body()


class Model(nn.Module):
    flag, limit = True, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.several = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Any: ...

    def helper(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(x)
        return found


class OneInAMethod(Model):
    def forward(self, x: Tensor) -> Any:
        return self.one(x).view(2, -1).transpose(0, 1)


class Decided(Model):
    def forward(self, x: Tensor) -> Any:
        if self.limit > 0:
            return self.one(x)
        return self.helper(x)


class Undecided(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.one(x) if x.sum() > 0 else x
        if x.mean() > 0:
            y = self.two(x)
        return y


class Last(Model):
    def forward(self, x: Tensor) -> Any:
        return (self.several[-1](x), x)


class Unseen(Model):
    def forward(self, x: Tensor) -> Any:
        return x, self.one(x)


CASES: dict[type[Model], tuple[list[str], Any]] = {
    OneInAMethod: (["one"], "seen"),
    Decided: (["two"], "seen"),
    Undecided: (["one", "two"], "seen"),
    Last: (["several.1"], "seen"),
    Unseen: (["one"], None),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_each_call_is_met_once_and_its_value_is_followed(kind: type[Model]) -> None:
    model, met = kind(), list[nn.Module]()
    vars(model)["limit"] = 0.0
    tree = definition_of(kind.forward)
    assert tree is not None and parameters(tree) == ["self", "x"]
    value = Follow(met, kind.forward, tree, {"self": Value(model), "x": Value()}, type).run()
    paths = {id(module): path for path, module in model.named_modules()}
    assert ([paths[id(each)] for each in met], value.state) == CASES[kind]


def test_of_two_values_what_is_known_of_both_is_known() -> None:
    assert either(Value(3), Value(3)).known == 3
    assert either(Value(3), Value(4)).known is UNKNOWN
    assert either(Value(), Value(state="seen")).state == "seen"
