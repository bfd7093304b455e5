"""A forward that Ctrl-C or an exit ends leaves no open context, whatever runs next: the host, or a part of it."""

from typing import Any

import pytest
import torch
from call_toys import fill
from torch import Tensor, nn

import peftcore
from peftcore.forward.context.context import HERE, forward_context


class Host(nn.Module):
    """Stops in its middle when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.stop: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.stop is not None:
            raise self.stop
        output: Tensor = self.second(x)
        return output


X = torch.linspace(-1, 1, 8).view(2, 4)


def interrupted(method: str, **options: Any) -> tuple[Host, peftcore.Injection]:
    torch.manual_seed(0)
    model = Host()
    injection = peftcore.apply(model, method, target=nn.Linear, **options)
    fill(injection, 0)
    return model, injection


def stop(model: Host, error: type[BaseException]) -> None:
    model.stop = error
    with pytest.raises(error):
        model(X)
    model.stop = None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_next_forward_has_a_context_of_its_own(error: type[BaseException]) -> None:
    model, _ = interrupted("lora", rank=2)
    expected = model(X)
    stop(model, error)
    stop(model, error)
    assert torch.equal(model(X), expected)
    assert not HERE.calls and HERE.calm is None
    assert forward_context().inputs == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", ["oft", "dora", "lora"])
def test_a_part_that_trains_after_it_learns(method: str, error: type[BaseException]) -> None:
    model, injection = interrupted(method, **({"block_size": 2} if method == "oft" else {"rank": 2}))
    model(X)
    stop(model, error)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=0.1, fused=True)
    losses = []
    for _ in range(3):
        loss = model.first(X).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(model.first(X).square().sum()))
    assert len(set(losses)) == 3
    assert forward_context().inputs == {}


def test_a_context_of_a_forward_around_stays() -> None:
    """A model that calls itself: the inner forward is interrupted, and the outer one goes on."""
    model, _ = interrupted("lora", rank=2)
    outer = nn.ModuleDict({"model": model})
    seen: list[Any] = []

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = outer["model"], nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                stop(self.inner, KeyboardInterrupt)
            finally:
                seen.append(forward_context().inputs)
            output: Tensor = self.last(x)
            return output

    around = Around()
    peftcore.apply(around, "lora", target="last", rank=2)
    around(X)
    assert [list(inputs) for inputs in seen] == [["x"]]
    assert not HERE.calls
