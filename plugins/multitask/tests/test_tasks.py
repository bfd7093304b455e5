"""How a call tells tasks: by number, by name, one for all rows or one for each; defaults; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, RouteError
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NAMES = ["rte", "sst", "mrpc"]


def test_numbers_names_and_a_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    model.eval()
    injection = peftcore.apply(model, "polytropon", tasks=NAMES, task="sst")
    fill(injection)

    def told(**context: Any) -> Tensor:
        with peftcore.call(model, **context), torch.no_grad():
            return model(**inputs).logits

    apart = [told(task=each) for each in range(3)]
    assert torch.equal(told(), apart[1]) and torch.equal(told(task="mrpc"), apart[2])
    assert torch.equal(told(task=torch.tensor(2)), apart[2])
    wanted = torch.stack([apart[2][0], apart[0][1]])
    for task in (["mrpc", "rte"], [2, 0], ("mrpc", 0), torch.tensor([2, 0], dtype=torch.int32)):
        torch.testing.assert_close(told(task=task), wanted)
    assert min((apart[a] - apart[b]).abs().max() for a, b in ((0, 1), (1, 2), (2, 0))) > 1e-3
    injection.save(tmp_path / "adapter")
    injection.remove()
    peftcore.load(model, tmp_path / "adapter")
    assert torch.equal(told(task="mrpc"), apart[2]) and torch.equal(told(), apart[1])


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    injection = peftcore.apply(model, "polytropon", target="0", tasks=2)
    x = torch.randn(4, 6)
    with pytest.raises(MissingContext, match=r"peftcore\.call\(model, task="):
        model(x)
    unknown = (2, -1, "rte", [0, 1, 2, 0], torch.tensor([0, 5, 1, 0]), torch.zeros(4), torch.zeros(2, 2).long())
    for told, error in [*((each, ConfigError) for each in unknown), ([0, 1, 1], RouteError), ([], RouteError)]:
        with pytest.raises(error), peftcore.call(model, task=told):
            model(x)
    injection.remove()
    for options in ({"tasks": ["a", "a"]}, {"tasks": []}, {"tasks": 2, "task": 2}, {"tasks": ["a"], "task": "b"}):
        with pytest.raises(ConfigError):
            peftcore.apply(model, "polytropon", target="0", **options)
    peftcore.apply(model, "polytropon", target="0")
    assert model(x).shape == (4, 4)  # one task need not be told


def test_rows_that_cannot_be_told_apart() -> None:
    """A table of positions is looked up once for all rows: one task is fine there, several are not."""
    model, inputs = HOSTS["gpt2"].build()
    peftcore.apply(model, "polytropon", target="embed.pos", tasks=2)
    with peftcore.call(model, task=1):
        model(**inputs)
    with pytest.raises(RouteError, match="cannot be assigned to 2 tasks"), peftcore.call(model, task=[1, 1]):
        model(**inputs)
