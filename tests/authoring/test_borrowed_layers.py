"""A network that borrows its layers: beside a copy of the model's with the updates added to its weights."""

import functools
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import BorrowedLayer, Method, MethodConfig, Operator, Shared, Site, Surgeon, Tags, Tap, borrow
from peftcore.errors import MissingContext, UnsupportedHost, UnsupportedSite
from peftcore.layers.detect import dense_layer


class Layers(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.linear, self.conv = nn.Linear(6, 5), nn.Conv1d(4, 3, 3, padding=1, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.conv(torch.tanh(self.linear(self.norm(self.words(ids)))))
        return found


class Second(Layers):
    """The same layers, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.own(super().forward(ids))
        return found


class HostThatLendsConfig(MethodConfig):
    method: Literal["host_that_lends"] = "host_that_lends"
    vectors: bool = True


class Adds(Operator):
    def __init__(self, site: Site, network: Shared, lender: Tap) -> None:
        super().__init__(site)
        self.network, self.lender = network, lender

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return functools.partial(self._around, module)

    def _around(self, module: nn.Module, call: Callable[..., Tensor], ids: Tensor) -> Tensor:
        self.lender.put(module)
        added: Tensor = self.network.module(ids)
        return call(ids) + added


class HostThatLends(Method):
    """The smallest method with borrowed layers: a second network over the same ids, which is added."""

    name = "host_that_lends"
    Config = HostThatLendsConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False)
    target = ("re:layers",)

    def inject(self, model: nn.Module, config: HostThatLendsConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            lender = Tap(until_backward=True)

            def made(site: Site = site, lender: Tap = lender) -> nn.Module:
                with torch.device("meta"):
                    network = Second()
                borrow(network, site.module, lender, surgeon.resolver.layer_of, 2, config.vectors)
                return network

            network = surgeon.own("second", made)
            surgeon.graft(site, lambda at, parts=(network, lender): Adds(at, *parts))

    @staticmethod
    def parameter_count(site: Site, config: HostThatLendsConfig) -> int:
        return 0


IDS = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.layers(ids)
        return found


def adapted(**options: Any) -> tuple[nn.Module, peftcore.Injection, nn.Module]:
    """A host with the method, and its network with noise in every tensor."""
    torch.manual_seed(0)
    model = Host().double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    injection = peftcore.apply(model, HostThatLends, dtype="float64", **options)
    (network,) = (module for path, module in injection.modules() if path.startswith("shared"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, injection, network


def expected(base: nn.Module, network: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a network of the whole weights adds to the base, and these."""
    copy, tensors = Second().double(), dict(network.named_parameters())
    for path, layer in network.named_modules():
        if isinstance(layer, BorrowedLayer):
            lent = base.get_submodule(path)
            for name, held in lent.named_parameters():
                change = torch.zeros_like(held)
                if name == "bias" and layer.bias is not None:
                    change = layer.bias
                if name == "weight" and layer.down is not None and layer.up is not None:
                    product = layer.up @ layer.down.flatten(1)
                    change = (product.T if path == "words" else product).reshape(held.shape)
                tensors[f"{path}.{name}"] = held + change
    output: Tensor = torch.func.functional_call(copy, tensors, (IDS,), strict=False)
    return output, tensors


@pytest.mark.parametrize("vectors", [True, False])
def test_it_computes_what_a_copy_with_the_updates_in_its_weights_does(vectors: bool) -> None:
    model, injection, network = adapted(vectors=vectors)
    with injection.disabled():
        plain = model(IDS)
    found, (wanted, _) = model(IDS) - plain, expected(model.layers, network)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(found)
    both = [torch.autograd.grad((each * direction).sum(), list(network.parameters())) for each in (found, wanted)]
    for (name, _), one, other in zip(network.named_parameters(), *both, strict=True):
        assert one.any(), name
        torch.testing.assert_close(one, other)


def test_its_parameters_are_its_own_alone() -> None:
    sizes = {"words": 2 * (7 + 6), "linear": 2 * (6 + 5), "conv": 2 * (3 * 4 + 3), "own": 3 * 3 + 3}
    for vectors, others in ((True, {"norm": 12, "linear bias": 5, "conv bias": 3}), (False, {})):
        _, injection, _ = adapted(vectors=vectors)
        assert sum(each.numel() for each in injection.parameters()) == sum(sizes.values()) + sum(others.values())


def test_it_starts_as_the_model() -> None:
    """Its norms are those of the model, with the values that they have; updates are nothing."""
    torch.manual_seed(0)
    model = Host().double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    plain = model(IDS)
    injection = peftcore.apply(model, HostThatLends, dtype="float64")
    (network,) = (module for path, module in injection.modules() if path.startswith("shared"))
    with torch.no_grad():
        torch.nn.init.eye_(network.own.weight)
        network.own.bias.zero_()
    torch.testing.assert_close(model(IDS), 2 * plain)


def test_copies_and_pickles_borrow_of_their_own_host() -> None:
    model, *_ = adapted()
    found = model(IDS)
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(IDS), found)
        with torch.no_grad():
            twin.layers.linear.weight.add_(1.0)
        assert not torch.allclose(twin(IDS), found)
        torch.testing.assert_close(model(IDS), found)


def test_another_adapter_of_a_layer_does_not_act_in_it() -> None:
    model, _, network = adapted()
    wanted, _ = expected(model.layers, network)
    lora = peftcore.apply(model, "lora", target=["layers.linear", "layers.conv"], dtype="float64")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter))
    with peftcore.activate(model, "lora"):
        plain = model(IDS)
    with peftcore.activate(model, "host_that_lends", "lora"):
        torch.testing.assert_close(model(IDS) - plain, wanted)
    forward = model.layers.linear.forward
    model.layers.linear.forward = lambda x: forward(x)
    with (
        peftcore.activate(model, "host_that_lends", "lora"),
        pytest.raises(UnsupportedHost, match=r"linear.*remove\(\) that adapter"),
    ):
        model(IDS)
    lora.remove()


def test_what_cannot_be_borrowed_is_refused() -> None:
    def borrowed(layer: nn.Module) -> None:
        lender = nn.ModuleDict({"layer": layer})
        borrow(deepcopy(lender), lender, Tap(), dense_layer, 2)

    with pytest.raises(UnsupportedSite, match="layer computes more"):
        borrowed(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedSite, match=r"layer.*cannot be borrowed"):
        borrowed(nn.MultiheadAttention(4, 2))
    _, _, network = adapted()
    with pytest.raises(MissingContext, match="borrows"):
        network(IDS)
