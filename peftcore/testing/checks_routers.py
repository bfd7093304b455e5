"""Checks of the statistics that routers of mixtures report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftcore.errors import NoRouters
from peftcore.forward.context.routers import Router
from peftcore.injection.injection import Injection
from peftcore.injection.router_report import RouterReport
from peftcore.testing.kit import Case, check
from peftcore.testing.tools import raises

PADS = 3
"""The number of padding tokens that are added to each input sequence."""


@check(
    "the tag `routes` is claimed exactly when operators give shares of experts, and says to what",
    cause="an operator is a `Router` and the tag was forgotten, or the tag says tokens where rows have a task",
    remedy="say the same in the tag and in the class attribute `routes` of the operators",
    hosts=("mlp", "llama", "encoder"),
)
def routers_are_declared(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    found = {each.routes for each in injection.operators.values() if isinstance(each, Router)}
    claimed = set() if case.tags.routes is None else {case.tags.routes}
    case.expect(found == claimed, f"routes={case.tags.routes}, but operators route {sorted(found) or 'nothing'}")
    if not claimed:
        with raises(case, NoRouters, "report() of an adapter without routers"):
            injection.report()


@check(
    "a report of routers counts each token once: no padding, nothing that a cache holds; and changes no output",
    cause="`noted` is given gates in another layout than that of the module's output, not at all, or several times",
    remedy="call `noted` once in each forward, with gates [rows, tokens, ..., experts] of all its tokens",
    when=lambda tags: tags.routes is not None,
    hosts=("llama", "gpt2", "mistral"),
)
def reports_count_tokens(case: Case) -> None:
    model, inputs = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    ids = inputs["input_ids"]
    rows, count = ids.shape
    mask = torch.ones_like(ids)
    output = case.quiet(model, {"input_ids": ids, "attention_mask": mask})

    def whole() -> None:
        found = case.quiet(model, {"input_ids": ids, "attention_mask": mask})
        case.expect_equal(found, output, "outputs while somebody watches")

    def padded() -> None:
        more = ids.new_zeros(rows, PADS)
        longer = {"input_ids": torch.cat([ids, more], 1), "attention_mask": torch.cat([mask, more], 1)}
        case.quiet(model, longer)

    def in_pieces() -> None:
        case.tell(model)
        cut = count - 1 if case.tags.routes == "sequence" else 2  # what is routed by its text is given that at once
        with torch.no_grad():
            first = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
            model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)

    plain = _watched(injection, whole)
    ran = [row for row in plain.routers if row.choices]
    case.expect(bool(ran), "no router noted any gates")
    for row in ran:
        shares = sum(row.shares) * row.choices + row.dropped
        case.expect(abs(shares - row.choices) < 1e-6 * row.choices, f"{row.path}: shares of {sum(row.shares)}")
        case.expect(row.padding == 0, f"{row.path}: {row.padding} choices are padding where there is none")
        times = row.choices / (rows * count if row.routes == "token" else rows)
        case.expect(times == int(times) > 0, f"{row.path}: {row.choices} choices for {rows} rows of {count} tokens")
    for name, run in {"padding": padded, "a cache": in_pieces}.items():
        _expect_same(case, ran, _watched(injection, run), name)


def _watched(injection: Injection, run: Callable[[], None]) -> RouterReport:
    with injection.reporting():
        run()
    return injection.report()


def _expect_same(case: Case, rows: list[Any], other: RouterReport, name: str) -> None:
    found = {row.path: row for row in other.routers}
    for row in rows:
        again = found[row.path]
        if row.routes == "token":
            case.expect(again.choices == row.choices, f"{row.path}: {again.choices} choices with {name}, {row.choices}")
        case.expect_close(torch.tensor(again.shares), torch.tensor(row.shares), f"{row.path}: shares with {name}", 1e3)
