"""The tables of a model with one row for each token: its embeddings, and its head if it has as many rows."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasTables(Protocol):
    """A model with methods that return its tables, like models of transformers."""

    def get_input_embeddings(self) -> Any:
        """Return the module that embeds tokens."""

    def get_output_embeddings(self) -> Any:
        """Return the head; None if the model lacks one."""


def token_tables(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose weight has one row for each token, the embeddings first; empty if the model does not
    declare them."""
    found: list[Any] = []
    if isinstance(model, HasTables):
        for get in (model.get_input_embeddings, model.get_output_embeddings):
            with suppress(NotImplementedError, AttributeError):  # as models of pictures have it
                found.append(get())
    tables = [each for each in found if isinstance(each, nn.Module) and _rows(each)]
    return [each for each in tables if _rows(each) == _rows(tables[0])]


def token_count(model: nn.Module) -> int:
    """Returns the number of rows that the tables have; 0 for a model that does not declare them."""
    return next((_rows(each) for each in token_tables(model)), 0)


def tables_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of `token_tables` by path, and all other modules that hold the same weights, such as tied
    heads."""
    weights = {id(each._parameters["weight"]) for each in token_tables(model)}
    modules = model.named_modules() if weights else ()
    return {path: each for path, each in modules if id(each._parameters.get("weight")) in weights}


def _rows(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 else 0
