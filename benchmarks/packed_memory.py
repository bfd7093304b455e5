"""Peak memory of a training step on a quantized model: ``python benchmarks/packed_memory.py`` (half a minute on two
cores).

Counts the bytes of all tensors that are alive after each operation, on a stack of linear layers: activations are small
beside weights. If every layer kept its dequantized weight until backward, the peak would rise by the dense size.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftcore

WIDTH, DEPTH, ROWS = 1024, 8, 32
METHODS = ("lora", "dora", "oft", "pissa", "vera", "qlora")
OPTIONS: dict[str, dict[str, Any]] = {"qlora": {"rank": 8}}
MEBIBYTE = 2**20


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, and the most that ever lived at once."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = {each.untyped_storage()._cdata for each in before}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._follow(each.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive or key in self.before:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def stack() -> nn.Sequential:
    """Build the host, a stack of linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


def peak(model: nn.Module) -> int:
    """Return the most bytes that lived in one step beside what lived before."""
    x = torch.randn(ROWS, WIDTH)
    model(x).square().mean().backward()  # gradients exist from here on
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    living = Living([x, *model.parameters(), *model.buffers(), *grads])
    with living:
        model(x).square().mean().backward()
    return living.peak


def main() -> None:
    """Print the table; with a path, write it as JSON too."""
    dense = sum(p.nbytes for p in stack().parameters())
    found: dict[str, Any] = {"dense MiB": dense / MEBIBYTE, "one weight MiB": WIDTH * WIDTH * 4 / MEBIBYTE}
    one = WIDTH * WIDTH * 4 / MEBIBYTE
    print(f"{DEPTH} layers of {WIDTH} x {WIDTH}: {dense / MEBIBYTE:.1f} MiB dense, {one:.1f} MiB each")
    print(f"{'method':8} {'on the dense base':>18} {'on nf4':>8}   peak of a step above what lived before, MiB")
    for name in METHODS:
        row = []
        for scheme in (None, "nf4"):
            model = stack()
            if scheme is not None:
                peftcore.quantize(model, scheme)
            peftcore.apply(model, name, target=[str(layer) for layer in range(DEPTH)], **OPTIONS.get(name, {}))
            row.append(peak(model) / MEBIBYTE)
        found[name] = row
        print(f"{name:8} {row[0]:18.1f} {row[1]:8.1f}")
    for path in sys.argv[1:]:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
