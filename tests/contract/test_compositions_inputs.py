"""Compositions that mix what branches give a module, in place of what it returns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore import Average, Fuse, Stack, Sum
from peftcore.errors import CompositionError, MergeError
from peftcore.testing.kit import fill


class Options(peftcore.author.MethodConfig):
    method: str = "toy"
    kind: str = "around"


class Around(peftcore.author.Operator):
    """Reads what the module returns, and adds to what it is given."""

    only_inputs = True

    def __init__(self, site: peftcore.author.Site) -> None:
        super().__init__(site)
        self.w = nn.Parameter(torch.zeros(6, 6))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x + call(x) @ self.w)


class Untrue(Around):
    """Says what it does not do."""

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return 2 * super().forward(call, x)


class Behind(Around):
    only_inputs = False

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) @ self.w


class Mixer(peftcore.author.Combiner):
    """Weighs by what the module returns."""

    mixes_inputs = True

    def combine_inputs(self, inputs: list[Tensor], base: Tensor, output: Tensor) -> Tensor:
        return base + output * torch.stack([each - base for each in inputs]).sum(0)


KINDS = {"around": Around, "untrue": Untrue, "behind": Behind, "mixer": Mixer}


class Toy(peftcore.author.Method):
    name, target, Config = "toy", ("norm",), Options
    tags = peftcore.author.Tags(category="multitask", paper="none")

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(replace(site, form="around"), lambda site: KINDS[config.kind](site))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 36


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.first(x))


@pytest.fixture
def host() -> Any:
    """A norm with adapters around it, and one that fuses them."""
    torch.manual_seed(0)
    model = Norm().double()
    kinds = {"a": "around", "b": "around", "c": "around", "untrue": "untrue", "behind": "behind"}
    for name, kind in {**kinds, "by": "mixer", "by2": "mixer"}.items():
        fill(peftcore.apply(model, Toy, name=name, kind=kind, target="norm", dtype="float64"), ord(name[-1]))
    fill(peftcore.apply(model, "ln_tuning", name="gains", dtype="float64"), 1)
    fill(peftcore.apply(model, "lora", name="lora", target="first", dtype="float64"), 2)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, 6, dtype=torch.float64)


def added(host: Any, norm: Callable[[Tensor], Tensor], name: str, s: Tensor) -> Tensor:
    """What an adapter adds to the input of the norm."""
    (operator,) = peftcore.injections(host)[name].operators.values()
    return norm(s) @ operator.w


def by_hand(host: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The input of the norm without adapters, and the norm."""
    norm, w, b = nn.functional.layer_norm, host.norm.weight, host.norm.bias
    s = x + nn.functional.linear(x, host.first.weight, host.first.bias)
    return s, lambda given: norm(given, (6,), w, b, host.norm.eps)


def test_inputs_are_mixed_and_the_module_runs_on_the_mix(host: Any, x: Tensor) -> None:
    s, norm = by_hand(host, x)
    mixed = s + norm(s) * (added(host, norm, "a", s) + added(host, norm, "b", s))
    peftcore.activate(host, Fuse("a", "b", by="by"))
    torch.testing.assert_close(host(x), norm(mixed), rtol=1e-12, atol=1e-12)
    assert (host(x) - norm(s)).abs().max() > 1e-2
    host(x).square().sum().backward()
    got = [p.grad.clone() for name in "ab" for p in peftcore.injections(host)[name].parameters()]
    leaves = [p for name in "ab" for p in peftcore.injections(host)[name].parameters()]
    expected = torch.autograd.grad(norm(mixed).square().sum(), leaves)
    torch.testing.assert_close(got, [*expected], rtol=1e-10, atol=1e-10)


def test_what_stands_around_and_inside(host: Any, x: Tensor) -> None:
    """A stack inside, one around it, a fusion of fusions, and a sum of outputs with a part that does more."""
    s, norm = by_hand(host, x)

    def behind(name: str, inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What is given to the norm by an adapter behind those of `inner`, from what it is given."""
        return lambda given: inner(given + norm(inner(given)) @ weight(name))

    def weight(name: str) -> Tensor:
        (operator,) = peftcore.injections(host)[name].operators.values()
        w: Tensor = operator.w
        return w

    def alone(given: Tensor) -> Tensor:
        return given

    def mix(base: Tensor, *inputs: Tensor) -> Tensor:
        return base + norm(base) * sum(each - base for each in inputs)

    a, b, c = (behind(name, alone) for name in "abc")
    inner = mix(s, a(s), b(s))
    cases = {
        Fuse(Stack("a", "b"), "c", by="by"): norm(mix(s, behind("b", a)(s), c(s))),
        Stack(Fuse("a", "b", by="by"), "c"): norm(mix(c(s), behind("c", a)(s), behind("c", b)(s))),
        Fuse(Fuse("a", "b", by="by"), "c", by="by2"): norm(mix(s, inner, c(s))),
        Sum("behind", Fuse("a", "b", by="by")): norm(s) @ weight("behind") + norm(inner) - norm(s),
        Fuse("a", Sum("lora", "lora"), by="by"): None,
    }
    for composition, expected in cases.items():
        with peftcore.activate(host, composition):
            if expected is None:  # the sum has no part at the norm, and acts at another layer
                assert torch.isfinite(host(x)).all()
            else:
                torch.testing.assert_close(host(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        (Fuse("a", "behind", by="by"), "'behind' changes more than the input there"),
        (Fuse("a", "gains", by="by"), "'gains' changes more than the input there"),
        (Stack(Fuse("a", "b", by="by"), "gains"), "'gains' changes more than the input there"),
        (Stack(Fuse("a", "b", by="by"), Sum("c")), r"Sum\('c', .*\) inside it combines outputs"),
        (Fuse("a", Average("b", "c"), by="by"), r"Average\('b', 'c', .*\) inside it combines outputs"),
    ],
)
def test_what_cannot_be_mixed_so_is_refused_before_anything_runs(
    composition: Any, message: str, host: Any, x: Tensor
) -> None:
    peftcore.activate(host, "a")
    before, ran = host(x), []
    host.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(CompositionError, match=message):
        peftcore.activate(host, composition)
    assert not ran
    assert torch.equal(host(x), before)


def test_what_is_added_later_is_refused_in_the_forward(host: Any, x: Tensor) -> None:
    peftcore.activate(host, Fuse("a", "b", by="by"))
    before = host(x)
    with peftcore.injections(host)["gains"].enabled(), pytest.raises(CompositionError, match="'gains' changes more"):
        host(x)
    assert torch.equal(host(x), before)


def test_a_merged_part_is_refused(host: Any) -> None:
    peftcore.activate(host, "gains")
    peftcore.injections(host)["gains"].merge()
    with pytest.raises(MergeError, match="unmerge"):
        peftcore.activate(host, Fuse("a", "gains", by="by"))


def test_an_operator_that_says_what_it_does_not_do_is_found_out(host: Any, x: Tensor) -> None:
    peftcore.activate(host, Fuse("a", "untrue", by="by"))
    with pytest.raises(CompositionError, match="with `only_inputs` returned another output"):
        host(x)


def test_a_part_that_is_disabled_adds_nothing(host: Any, x: Tensor) -> None:
    s, norm = by_hand(host, x)
    peftcore.activate(host, Fuse("a", "b", by="by"))
    with peftcore.injections(host)["b"].disabled():
        expected = norm(s + norm(s) * added(host, norm, "a", s))
        torch.testing.assert_close(host(x), expected, rtol=1e-12, atol=1e-12)


class Whole(peftcore.author.Method):
    """Gives a block another input, and reads what it returns for the one it is given."""

    name, target = "toy_whole", ("norm",)
    tags = peftcore.author.Tags(category="multitask", paper="none", per_row=False)

    class Config(peftcore.author.MethodConfig):
        method: str = "toy_whole"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        surgeon.graft(surgeon.resolver.module_site("block"), lambda site: Around(site))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return 36


@pytest.mark.parametrize("parts", [("whole", "a"), ("a", "whole"), ("whole", Sum("a", "b"))], ids=repr)
def test_a_block_runs_again_where_one_branch_alone_acts(parts: tuple[Any, ...], x: Tensor) -> None:
    """Without a composition at the block there is nothing to put together, whatever acts inside of it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Norm()}).double()
    fill(peftcore.apply(model, Whole, name="whole", dtype="float64"), 1)
    for seed, name in enumerate("ab"):
        fill(peftcore.apply(model, "lora", name=name, target="block.first", dtype="float64"), seed)
    block: Any = model["block"]
    (operator,) = peftcore.injections(model)["whole"].operators.values()
    with peftcore.activate(model, *(part for part in parts if part != "whole")):
        expected = block(x + block(x) @ operator.w)
    with peftcore.activate(model, Stack(*parts)):
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
