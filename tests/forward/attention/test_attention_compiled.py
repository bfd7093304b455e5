"""torch.compile follows edited attention without a break in the graph, and routes without a new graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_hosts import METHODS, host, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import peftcore


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: Any, injection: peftcore.Injection, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    output = model(**given).logits
    return output.detach(), list(torch.autograd.grad(output.square().sum(), list(injection.parameters())))


CASES = [
    (name, method, implementation)
    for name, method in (
        ("llama", "in_front"),
        ("llama", "beside"),
        ("gpt2", "in_front"),
        ("bert", "in_front"),
        ("t5", "in_front"),
        ("t5", "beside"),
    )
    for implementation in ("eager", "sdpa")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "implementation"), CASES)
def test_one_graph_with_the_same_numbers(name: str, method: str, implementation: str) -> None:
    model, given = host(name, implementation), inputs(name)
    injection = peftcore.apply(model, METHODS[method])
    plain = step(model, injection, given)  # the witness looks at the first forward, and goes
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), injection, given)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@pytest.mark.slow
def test_any_assignment_of_rows_is_one_graph() -> None:
    model, given = host("llama", "sdpa"), inputs("llama")
    peftcore.apply(model, METHODS["in_front"], name="long", length=5)
    peftcore.apply(model, METHODS["in_front"], name="short", length=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        model(**given)
        for rows in (["long", "short"], ["short", "long"], ["long", "long"]):
            with peftcore.route(model, rows):
                torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2, "the sets of names differ twice, the assignments do not matter"


@pytest.mark.slow
def test_a_later_implementation_is_compiled_anew() -> None:
    model, given = host("llama", "sdpa"), inputs("llama")
    peftcore.apply(model, METHODS["in_front"])
    model(**given)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    before = compiled(**given).logits
    assert counter.frame_count == 1
    model.set_attn_implementation("eager")
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(compiled(**given).logits[valid], before[valid], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
