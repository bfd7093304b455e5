"""Tables with a row for each token: of models that name them, and of no others."""

from typing import Any

import pytest
from torch import nn

from peftcore.roles.token_tables import tables_by_path, token_count, token_tables


class Named(nn.Module):
    """A model that names its tables."""

    def __init__(self, embeds: Any, head: Any) -> None:
        super().__init__()
        self.embeds, self.head = embeds, head

    def get_input_embeddings(self) -> Any:
        if self.embeds is None:
            raise NotImplementedError
        return self.embeds

    def get_output_embeddings(self) -> Any:
        return self.head


def test_the_embeddings_and_a_head_of_as_many_rows() -> None:
    model = Named(nn.Embedding(9, 4), nn.Linear(4, 9))
    assert token_tables(model) == [model.embeds, model.head]
    assert token_count(model) == 9
    assert list(tables_by_path(model)) == ["embeds", "head"]


@pytest.mark.parametrize("head", [None, nn.Linear(4, 3), nn.Identity(), "head"])
def test_other_heads_are_none(head: Any) -> None:
    model = Named(nn.Embedding(9, 4), head)
    assert token_tables(model) == [model.embeds]


@pytest.mark.parametrize("embeds", [None, nn.Conv2d(3, 4, 2), nn.Identity()])
def test_models_of_pictures_have_none(embeds: Any) -> None:
    assert token_tables(Named(embeds, None)) == []
    assert token_count(Named(embeds, None)) == 0
    assert tables_by_path(Named(embeds, None)) == {}


def test_models_that_name_none_have_none() -> None:
    assert token_tables(nn.Sequential(nn.Embedding(9, 4))) == []


def test_all_that_hold_the_weight_of_a_table() -> None:
    model = Named(nn.Embedding(9, 4), None)
    model.stack = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model.stack[0].weight = model.embeds.weight
    assert list(tables_by_path(model)) == ["embeds", "stack.0"]
