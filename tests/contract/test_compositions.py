"""Compositions: each against what its parts return one by one, put together by hand."""

from typing import Any

import pytest
import torch
from composition_toys import several_adapters
from torch import Tensor, nn

import peftcore
from peftcore import Average, Fuse, Split, Stack, Sum
from peftcore.errors import CompositionError, MergeError, UnknownInjection
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill


@pytest.fixture
def host() -> nn.Module:
    return several_adapters()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, 6, dtype=torch.float64)


def layer(model: Any, index: int, x: Tensor, *names: str) -> Tensor:
    """What one layer returns with these injections acting one after the other, in the order of their application."""
    with peftcore.activate(model, *names):
        return (model.first, model.second)[index](x)


def by_hand(model: nn.Module, x: Tensor, put: Any) -> Tensor:
    """Both layers, each with its outputs put together by `put(output of names)`."""
    first = put(lambda *names: layer(model, 0, x, *names))
    return put(lambda *names: layer(model, 1, torch.tanh(first), *names))


CASES = {
    "stack": (Stack("a", "b", "c"), lambda y: y("a", "b", "c")),
    "sum": (Sum("a", "b", weights=[0.5, -2.0]), lambda y: y() + 0.5 * (y("a") - y()) - 2 * (y("b") - y())),
    "average": (Average("a", "b", "c", weights=[1, 2, 5]), lambda y: (y("a") + 2 * y("b") + 5 * y("c")) / 8),
    "split": (Split("a", "d", lengths=[3, 4]), lambda y: torch.cat([y("a")[:, :3], y("d")[:, 3:]], 1)),
    "the rest": (Split("a", "d", lengths=[3, None]), lambda y: torch.cat([y("a")[:, :3], y("d")[:, 3:]], 1)),
    "nested": (
        Average(Stack("a", Sum("b", "c")), Split("c", "d", lengths=[1, 6])),
        lambda y: (
            ((y("a") + (y("a", "b") - y("a")) + (y("a", "c") - y("a"))) + torch.cat([y("c")[:, :1], y("d")[:, 1:]], 1))
            / 2
        ),
    ),
    "before a stack's end": (Stack(Average("a", "b"), "c"), lambda y: (y("a", "c") + y("b", "c")) / 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_composition_is_its_parts_put_together_at_each_module(name: str, host: nn.Module, x: Tensor) -> None:
    composition, put = CASES[name]
    expected = by_hand(host, x, put)
    with peftcore.activate(host, composition):
        output = host(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    with peftcore.activate(host):
        assert not torch.allclose(output, host(x), rtol=1e-3)


def test_a_stack_acts_in_its_own_order(host: nn.Module, x: Tensor) -> None:
    """Names alone act in the order of their application; gains and bottlenecks do not commute."""
    with peftcore.activate(host, Stack("d", "c")):
        turned = host.first(x)
    assert not torch.allclose(turned, layer(host, 0, x, "c", "d"), rtol=1e-6)


def test_w_and_minus_w_cancel(host: nn.Module, x: Tensor) -> None:
    with peftcore.activate(host):
        base = host(x)
    with peftcore.activate(host, Sum("a", "a", weights=[0.7, -0.7])):
        torch.testing.assert_close(host(x), base, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_part(host: nn.Module, x: Tensor) -> None:
    with peftcore.activate(host, Average("a", Sum("b", "d"))):
        host(x).square().sum().backward()
    for name in "abd":
        assert all(p.grad is not None for p in peftcore.injections(host)[name].parameters()), name
    assert all(p.grad is None for p in peftcore.injections(host)["c"].parameters())


def test_it_compiles(host: nn.Module, x: Tensor) -> None:
    with peftcore.activate(host, Average("a", "b")), torch.no_grad():
        eager = host(x)
        torch.testing.assert_close(torch.compile(host, fullgraph=True, backend="eager")(x), eager)


@pytest.mark.parametrize("name", ["llama", "bert", "moe", "unet", "encoder"])
def test_whole_models(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    model.eval()
    for each in ("lora", "ia3"):
        fill(peftcore.apply(model, each), ord(each[0]))

    def run() -> Tensor:
        with torch.no_grad():
            return HOSTS[name].output(model(**inputs))

    with peftcore.activate(model, "lora"):
        one = run()
    with peftcore.activate(model, Sum("lora", "ia3", weights=[1.0, 0.0])):
        torch.testing.assert_close(run(), one, rtol=1e-4, atol=1e-4)
    with peftcore.activate(model, Average("lora", "ia3")):
        assert not torch.allclose(run(), one, rtol=1e-3)
    peftcore.injections(model)["ia3"].remove()
    assert peftcore.injections(model)["lora"].active


def test_generation_with_a_cache() -> None:
    model, inputs = HOSTS["llama"].build()
    for each in ("lora", "houlsby_adapter"):
        fill(peftcore.apply(model.eval(), each), ord(each[0]))
    ids = inputs["input_ids"][:1]
    with peftcore.activate(model, Average("lora", "houlsby_adapter")):
        cached, plain = (
            model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)
            for cache in (True, False)
        )
    assert torch.equal(cached, plain)


def test_what_makes_no_sense_is_refused_and_changes_nothing(host: nn.Module, x: Tensor) -> None:
    before = host(x)
    with pytest.raises(UnknownInjection, match="zzz"):
        peftcore.activate(host, Sum("a", "zzz"))
    with pytest.raises(CompositionError, match="2 parts need 2 weights"):
        Sum("a", "b", weights=[1.0])
    with pytest.raises(CompositionError, match="add up to 0"):
        Average("a", "b", weights=[1.0, -1.0])
    with pytest.raises(CompositionError, match="lengths"):
        Split("a", "b", lengths=[3, 0])
    with pytest.raises(CompositionError, match="got nothing"):
        Stack()
    with (
        pytest.raises(CompositionError, match=r"returns \[2, 7, 5\]"),
        peftcore.activate(host, Split("a", "b", lengths=[3, 3])),
    ):
        host(x)
    peftcore.injections(host)["a"].merge()
    with pytest.raises(MergeError, match="unmerge"):
        peftcore.activate(host, Sum("a", "b"))
    peftcore.injections(host)["a"].unmerge()
    torch.testing.assert_close(host(x), before)


def test_prefixes_stack_and_are_not_averaged() -> None:
    model, inputs = HOSTS["llama"].build()
    model.eval()
    for each in ("prefix_tuning", "lora", "ia3"):
        fill(peftcore.apply(model, each), ord(each[0]))
    with pytest.raises(CompositionError, match=r"use peftcore\.Stack"):
        peftcore.activate(model, Average("prefix_tuning", "lora"))
    with torch.no_grad():
        with peftcore.activate(model, "prefix_tuning", "lora"):
            both = model(**inputs).logits
        with peftcore.activate(model, Stack("prefix_tuning", Sum("lora", "ia3", weights=[1.0, 0.0]))):
            torch.testing.assert_close(model(**inputs).logits, both, rtol=1e-4, atol=1e-4)


def test_fuse_asks_the_combiner_that_stands_there_and_averages_elsewhere(host: nn.Module, x: Tensor) -> None:
    class Largest(peftcore.author.Combiner):
        def combine(self, outputs: list[Tensor], base: Tensor) -> Tensor:
            return torch.stack([output - base for output in outputs]).amax(0) + base

    class Options(peftcore.author.MethodConfig):
        method: str = "toy_largest"

    class LargestMethod(peftcore.author.Method):
        name, target, Config = "toy_largest", ("first",), Options
        tags = peftcore.author.Tags(category="multitask", paper="none")

        def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
            for site in surgeon.sites():
                surgeon.graft(site, lambda site: Largest(site))

        @staticmethod
        def parameter_count(site: Any, config: Any) -> int:
            return 0

    peftcore.apply(host, LargestMethod, name="by", target="first")
    y = [layer(host, 0, x, *names) for names in ((), ("a",), ("b",))]
    expected = torch.tanh(torch.stack(y[1:]).sub(y[0]).amax(0) + y[0])
    expected = (layer(host, 1, expected, "a") + layer(host, 1, expected, "b")) / 2
    with peftcore.activate(host, Fuse("a", "b", by="by")):
        torch.testing.assert_close(host(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_each_branch_reads_what_was_left_in_front_of_its_module(backend: str | None) -> None:
    """The bypass of a gated feed-forward reads its input at one matrix and adds to another, which runs in branches."""
    model, inputs = HOSTS["llama"].build()
    for name in ("parallel_adapter", "lora", "dora"):
        options = {} if name == "parallel_adapter" else {"target": "mlp.down"}
        fill(peftcore.apply(model.double().eval(), name, dtype=torch.float64, **options), ord(name[0]))
    forward = model if backend is None else torch.compile(model, backend=backend)

    def run(*chosen: Any) -> tuple[Tensor, list[Tensor]]:
        with peftcore.activate(model, *chosen):
            logits = forward(**inputs).logits
            bypass = [*peftcore.injections(model)["parallel_adapter"].parameters()]
            return logits, [*torch.autograd.grad(logits.square().sum(), bypass)]

    expected, gradients = run("parallel_adapter", "lora")
    logits, found = run(Stack("parallel_adapter", Sum("lora", "dora", weights=[1.0, 0.0])))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(found, gradients)
