"""The memory that operations take beyond the model's and the adapter's, in bytes: the table in docs/promises.md.

Each number is the most bytes of tensors that are alive at once, in units: `T` the tensors that change, as they are
stored dense, and `w` the largest of them in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import peftcore
from peftcore.injection.merging import merge_bytes
from peftcore.models.resource_counters import StorageCounter

WIDTH, LAYERS = 512, 4
W = 4 * WIDTH**2
Operation = Callable[[nn.Module, Path], object]


class Peak(NamedTuple):
    """How an operation is prepared and run, and its peak in units of T and w, for float32 and for bfloat16."""

    before: Operation
    operation: Operation
    T: float
    w: float
    w_of_half: float | None = None
    T_of_half: float | None = None

    def of(self, dtype: torch.dtype) -> tuple[float, float]:
        if dtype is torch.float32:
            return self.T, self.w
        return (
            self.T if self.T_of_half is None else self.T_of_half,
            self.w if self.w_of_half is None else self.w_of_half,
        )


def model(dtype: torch.dtype = torch.float32, width: int = WIDTH, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(width, width, bias=False, dtype=dtype, device=device) for _ in range(LAYERS))
    return nn.Sequential(*layers).requires_grad_(False)


def adapt(host: nn.Module, name: str = "a", method: str = "lora") -> peftcore.Injection:
    injection = peftcore.apply(host, method, name=name, rank=2, target=[str(each) for each in range(LAYERS)])
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)
    return injection


def a(host: nn.Module) -> peftcore.Injection:
    return peftcore.injections(host)["a"]


def one(host: nn.Module, _: Path) -> None:
    adapt(host)


def two(host: nn.Module, _: Path) -> None:
    adapt(host), adapt(host, "b")


def merged(keep: str) -> Operation:
    return lambda host, _: adapt(host).merge(keep)


def packed(host: nn.Module, _: Path) -> None:
    peftcore.quantize(host, "int8", target=nn.Linear)
    adapt(host)


def combined(how: str, **options: int) -> Operation:
    return lambda host, _: peftcore.combine(host, {"a": 0.5, "b": 0.5}, how=how, name="new", **options)


def saved(host: nn.Module, folder: Path) -> None:
    adapt(host).save(folder / "a")
    a(host).remove()


PEAKS: dict[str, Peak] = {
    "apply": Peak(lambda *_: None, one, 0, 0),
    "load": Peak(saved, lambda host, folder: peftcore.load(host, folder / "a"), 0, 0),
    "save": Peak(one, lambda host, folder: a(host).save(folder / "a"), 0, 0),
    "merge": Peak(one, lambda host, _: a(host).merge(), 1, 0, 2),
    "merge, keep=None": Peak(one, lambda host, _: a(host).merge(None), 1, 0, 2),
    "merge, keep='record'": Peak(one, lambda host, _: a(host).merge("record"), 1, 2, 3),
    "merge, weight=0.5": Peak(one, lambda host, _: a(host).merge(weight=0.5), 1, 1, 3),
    "merge of DoRA": Peak(lambda host, _: adapt(host, method="dora"), lambda host, _: a(host).merge(), 1, 1, 2.5),
    "merge of int8": Peak(packed, lambda host, _: a(host).merge(), 1, 2, 2.5),
    "merge of int8, into='same'": Peak(
        packed, lambda host, _: a(host).merge(into="same", max_error=9.0), 1, 3.25, 4.75
    ),
    "unmerge": Peak(merged("cpu"), lambda host, _: a(host).unmerge(), 0, 0),
    "unmerge, keep='record'": Peak(merged("record"), lambda host, _: a(host).unmerge(), 1, 3, 2.5),
    "bake": Peak(one, lambda host, _: a(host).bake(), 1, 0, 2),
    "quantize to int8": Peak(
        lambda *_: None, lambda host, _: peftcore.quantize(host, "int8", target=nn.Linear), 0.25, 1.75, 2.75, 0.5
    ),
    "dequantize from int8": Peak(packed, lambda host, _: peftcore.dequantize(host), 1, 2, 1.5),
    "combine, how='linear'": Peak(two, combined("linear"), 0, 0),
    "combine, how='cat'": Peak(two, combined("cat"), 0, 0, 2),
    "combine, how='svd'": Peak(two, combined("svd", rank=2), 0, 5),
    "to_lora of DoRA": Peak(
        lambda host, _: adapt(host, method="dora"), lambda host, _: peftcore.to_lora(a(host), 2, name="new"), 1, 2, 2, 2
    ),
}


def beyond(host: nn.Module, operation: Operation, folder: Path) -> int:
    """The most bytes at once within an operation, beyond those of before."""
    counter = StorageCounter([*host.parameters(), *host.buffers()])
    begin = counter.alive
    with counter:
        operation(host, folder)
    return counter.peak - begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_an_operation(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    peak, host = PEAKS[name], model(dtype)
    stored, (T, w) = sum(each.nbytes for each in host.parameters()), peak.of(dtype)
    peak.before(host, tmp_path)
    found = beyond(host, peak.operation, tmp_path)
    assert abs(found - T * stored - w * W) < 0.2 * W, f"{(found - T * stored) / W:.3f} w beyond {T} T"


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_a_merge_of_200_megabytes(dtype: torch.dtype, half: int, tmp_path: Path) -> None:
    width = 3584 if dtype is torch.float32 else 5056
    host = model(dtype, width)
    one(host, tmp_path)
    (needed,) = merge_bytes(a(host)).values()
    assert needed == LAYERS * width**2 * dtype.itemsize > 200_000_000
    found = beyond(host, lambda host, _: a(host).merge(), tmp_path)
    assert 0 <= found - needed - half * 4 * width**2 < 1_000_000


def test_a_merge_of_a_gigabyte_is_known_on_the_meta_device() -> None:
    host = model(width=8192, device="meta")
    injection = peftcore.apply(host, "lora", name="a", target=[str(each) for each in range(LAYERS)])
    assert merge_bytes(injection) == {torch.device("meta"): 2**30}
