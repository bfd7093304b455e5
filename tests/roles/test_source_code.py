"""Code is read, not run: its tree, and what an attribute runs when it is called."""

import ast
from typing import Any

from peftcore.roles.source_code import called, definition_of


def twice(x: int) -> int:
    return 2 * x


class Doubles:
    def __call__(self, x: int) -> int:
        return 2 * x


def test_a_function_has_the_tree_of_its_source() -> None:
    tree = definition_of(twice)
    assert tree is not None and tree.name == "twice"
    assert ast.unparse(tree.body[0]) == "return 2 * x"


def test_without_source_there_is_no_tree() -> None:
    made: dict[str, Any] = {}
    exec("def twice(x): return 2 * x", made)
    assert definition_of(made["twice"]) is None and definition_of(len) is None


def test_objects_run_the_method_that_calls_them() -> None:
    doubles = Doubles()
    assert called(doubles).__func__ is Doubles.__call__ and called(doubles).__self__ is doubles
    assert called(twice) is twice
