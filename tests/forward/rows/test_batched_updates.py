"""Low-rank updates of several adapters in one product equal each adapter's own, row by row."""

import pytest
import torch
from torch import nn

import peftcore
from peftcore import route
from peftcore.forward.rows import batched_updates
from peftcore.testing.kit import fill


@pytest.mark.parametrize("names", [["a", "b", None, "a"], ["c", None, "c", "b"]])
def test_each_row_gets_the_update_of_its_adapter(names: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(256, 255)).double().eval()  # padding a rank by two costs little
    for seed, (name, rank) in enumerate({"a": 2, "b": 3, "c": 1}.items()):
        fill(peftcore.apply(model, "lora", name=name, target="0", rank=rank, alpha=rank + 1, dtype=torch.float64), seed)
    x = torch.randn(len(names), 7, 256, dtype=torch.float64)
    calls: list[int] = []
    batched = batched_updates.add_updates
    monkeypatch.setattr(
        "peftcore.forward.call.add_updates", lambda *args, **kwargs: (calls.append(1), batched(*args, **kwargs))[1]
    )
    with torch.no_grad():
        with route(model, names):
            output = model(x)
        for row, name in enumerate(names):
            with peftcore.activate(model, *([name] if name else [])):
                torch.testing.assert_close(output[row], model(x[row : row + 1])[0])
    assert len(calls) == 1
