"""How a batch repeats the entries of what calls tell: as told, as known from `generate` or a route, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import transformers
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import call, route, using
from peftcore.author import Method, MethodConfig, Operator, Tags, forward_context
from peftcore.errors import ConfigError, MissingContext, RouteError
from peftcore.forward.context.repeats import Repeats, of_batch, told_repeats


class Shifted(Operator):
    """Adds the number of its row to what a module gives."""

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y, running = call(x), forward_context()
        value = torch.as_tensor(running.told("number"), dtype=y.dtype) if running.told("number") is not None else None
        own = running.for_rows("number", len(x), value)
        own = own.repeat_interleave(len(x) // len(own), 0)
        return y + self.gain * own.view(-1, *[1] * (y.dim() - 1))


class NumbersConfig(MethodConfig):
    """No options."""

    method: Literal["numbers"] = "numbers"


class Numbers(Method):
    """Adds numbers that calls tell."""

    name = "numbers"
    Config = NumbersConfig
    tags = Tags("additive", "none", identity_at_init=False)
    target = "all-layers"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, Shifted, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 1


class Windows(nn.Module):
    """Gives its layer three rows for each of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.repeat_interleave(3, 0))[::3, 0]


def windows() -> Windows:
    model = Windows()
    peftcore.apply(model, Numbers, name="numbers")
    return model


def test_entries_are_repeated_as_said() -> None:
    value = torch.tensor([1, 2])
    assert of_batch("number", value, 2, Repeats(2, 3)).tolist() == [1, 2], "one for each row"
    assert of_batch("number", value, 4, Repeats(2)).tolist() == [1, 2, 1, 2]
    assert of_batch("number", value, 4, Repeats(1, 2)).tolist() == [1, 1, 2, 2]
    assert of_batch("number", value, 8, Repeats(2, 2)).tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
    assert of_batch("number", value[:, None], 4, Repeats(2)).tolist() == [[1], [2], [1], [2]]
    for repeats in (Repeats(), Repeats(3), Repeats(1, 3)):
        with pytest.raises(RouteError, match=r"number has 2 entries, but the batch has 4 rows.*guidance=True.*copies="):
            of_batch("number", value, 4, repeats)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({}, None),
        ({"guidance": True}, (2, 1)),
        ({"guidance": 3, "copies": 2}, (3, 2)),
        ({"guidance": False}, (1, 1)),
        ({"copies": 4}, (1, 4)),
    ],
)
def test_what_a_call_says(told: dict[str, Any], wanted: tuple[int, int] | None) -> None:
    assert told_repeats(told) == wanted


@pytest.mark.parametrize("told", [{"guidance": 0}, {"copies": True}, {"copies": 1.5}, {"guidance": "both"}])
def test_what_is_no_number_of_times_is_refused_when_it_is_said(told: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not a number of repetitions"):
        call(windows(), number=1, **told)


@torch.no_grad()
def test_a_module_may_see_several_rows_of_each_of_the_batch() -> None:
    model, x = windows(), torch.ones(4, 4)
    with call(model, number=[5.0]):
        assert model(x).tolist() == [5, 5, 5, 5]
    with call(model, number=[1.0, 2.0, 3.0, 4.0]):
        assert model(x).tolist() == [1, 2, 3, 4]
    with call(model, number=[1.0, 2.0]):
        with pytest.raises(RouteError, match="number has 2 entries, but the batch has 4 rows"):
            model(x)
        with call(model, guidance=True):
            assert model(x).tolist() == [1, 2, 1, 2]
            assert model(x[:2]).tolist() == [1, 2], "a batch that repeats nothing"
    assert using(model, number=[1.0, 2.0], copies=2)(model, x).tolist() == [1, 1, 2, 2]
    assert using(model, number=[1.0, 2.0], guidance=2)(model, x).tolist() == [1, 2, 1, 2]
    with pytest.raises(MissingContext, match="number"):
        model(x)


@torch.no_grad()
def test_a_part_that_runs_by_itself_has_a_row_for_each_entry_or_is_told() -> None:
    model = windows()
    with call(model, number=[1.0, 2.0]):
        assert model.layer(torch.ones(2, 4))[:, 0].tolist() == [1, 2]
        with pytest.raises(RouteError, match="number has 2 entries, but the batch has 6 rows"):
            model.layer(torch.ones(6, 4))
        with call(model, copies=1):  # a batch of two, of which the part sees three rows each
            assert model.layer(torch.ones(6, 4))[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


@torch.no_grad()
def test_rows_of_a_route_have_their_own_entries() -> None:
    model = windows()
    x, names = torch.ones(4, 4), ["numbers", None, "numbers", None]
    with route(model, names):
        with call(model, number=[1.0, 2.0, 3.0, 4.0]):
            assert model(x).tolist() == [1, 0, 3, 0]
        with call(model, number=[1.0, 2.0], guidance=True):
            assert model(x).tolist() == [1, 0, 1, 0]
    with route(model, names[:2], copies=2), call(model, number=[1.0, 2.0]):
        assert model(x).tolist() == [1, 1, 0, 0], "the route says how rows are repeated"


@torch.no_grad()
def test_generate_repeats_what_it_was_given() -> None:
    """Of beams, which stand next to each other."""
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=24)).eval()
    peftcore.apply(model, Numbers, name="numbers", target="down_proj")
    ids = token_ids(2)
    options = {"max_new_tokens": 3, "num_beams": 2, "pad_token_id": 0, "do_sample": False}
    with call(model, number=[0.5, 3.0]):
        found = model.generate(ids, **options)
        with pytest.raises(RouteError, match="number has 2 entries, but the batch has 4 rows"):
            model(ids.repeat_interleave(2, 0))
    alone = []
    for row, number in zip(ids, (0.5, 3.0), strict=True):
        with call(model, number=[number]):
            alone.append(model.generate(row[None], **options))
    assert torch.equal(found, torch.cat(alone))
