"""An extra pass of a forward, without one injection or as it was: in routes, compositions, checkpoints, and with what
it leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from call_toys import TapMethod, TwiceMethod, fill, gradients, host, separately
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import Average, Sum, activate, call, route
from peftcore.author import ForwardContext, Method, Operator, Tap, forward_context
from peftcore.errors import MissingContext, UnknownInjection

IDS = token_ids(3)


def adapted(reentrant: bool | None = None) -> tuple[nn.Module, peftcore.Injection, peftcore.Injection]:
    model = host(reentrant)
    twice, lora = peftcore.apply(model, TwiceMethod, name="twice"), peftcore.apply(model, "lora", name="lora")
    fill(twice, 1), fill(lora, 2)
    return model, twice, lora


def test_in_a_route_each_row_is_as_alone() -> None:
    model, *_ = adapted()
    names = ["twice", "lora", None]
    with torch.no_grad(), call(model.eval(), strength=1.0):
        expected = separately(model, IDS, names)
        with route(model, names):
            torch.testing.assert_close(model(IDS)["logits"], expected)


@pytest.mark.parametrize("kind", [Sum, Average])
def test_in_a_composition_each_branch_is_as_alone(kind: type[Sum] | type[Average]) -> None:
    model, *_ = adapted()
    with torch.no_grad(), call(model.eval(), strength=1.0):
        with activate(model, "twice"):
            expected = model(IDS)["logits"]
        with activate(model, kind("twice")):
            torch.testing.assert_close(model(IDS)["logits"], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_pass_as_it_was(reentrant: bool) -> None:
    found: list[list[Tensor]] = []
    for way in (None, reentrant):
        model, twice, lora = adapted(way)
        with call(model, strength=1.0):
            model(IDS, IDS)["loss"].backward()
        found.append(gradients(twice, lora))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_operators_leave_in_the_pass_ends_with_it() -> None:
    """A tap would be read by the forward itself, and a loss be added twice."""
    model = host()
    fill(peftcore.apply(model, TapMethod, name="taps"), 1)
    expected = model(IDS, IDS)
    twice = peftcore.apply(model, TwiceMethod, name="twice")
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.zero_()
    with call(model, strength=1.0):
        found = model(IDS, IDS)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_the_pass_leaves_the_cache_as_it_is(kind: str) -> None:
    """Blocks of GPT-2 are given it by position."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    shape = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = cls(cls.config_class(**shape, bos_token_id=0, eos_token_id=1)).eval()
    fill(peftcore.apply(model, TwiceMethod, name="twice"), 1)
    ids = torch.randint(3, 30, (1, 6))
    with torch.no_grad(), call(model, strength=1.0):
        expected, cache = model(ids, use_cache=False).logits, transformers.DynamicCache()
        first = model(ids[:, :5], cache=cache)
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(first.logits, expected[:, :5])


def test_an_operator_of_another_model_is_no_injection_of_this_one() -> None:
    model, twice, _ = adapted()
    refused: list[UnknownInjection] = []

    def once(*_: object) -> None:
        try:
            forward_context().without(nn.Linear(1, 1), lambda: None)
        except UnknownInjection as error:
            refused.append(error)
        assert forward_context().without("lora", lambda: twice.active and not peftcore.injections(model)["lora"].active)

    model.layers[0].register_forward_hook(once)
    with torch.no_grad(), call(model, strength=1.0):
        model(IDS)
    assert "does not belong to an adapter" in str(refused[0])


class AgainMethod(Method):
    """Adds the difference to another pass, whatever the host returns, to the loss."""

    name = "toy_again"
    Config, target, tags = TapMethod.Config, TapMethod.target, TapMethod.tags

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, Noisy, config)

    def output_loss(self, injection: Any, output: Any, call: ForwardContext) -> Tensor:
        other = call.again()
        self.seen = output["logits"], other["logits"]
        return (self.seen[0] - self.seen[1]).square().mean()

    parameter_count = staticmethod(TapMethod.parameter_count)


class Noisy(Operator):
    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.full((site.out_features,), 0.5))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        return y + self.gain * torch.randn_like(y)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_the_host_runs_again_under_the_same_choice_with_draws_of_its_own(reentrant: bool | None) -> None:
    """Beside two forwards, one after the other; what others leave and add in the second pass ends with it."""

    def adapt(model: nn.Module, *methods: Any) -> list[peftcore.Injection]:
        made = [peftcore.apply(model, each, name=each.name) for each in methods]
        for seed, each in enumerate(made):
            fill(each, seed)
        return made

    model, twin = host(reentrant), host()
    own = adapt(model, AgainMethod, *([] if reentrant else [TapMethod]))
    theirs = adapt(twin, AgainMethod, *([] if reentrant else [TapMethod]))
    torch.manual_seed(3)
    found = model(IDS, IDS)
    found["loss"].backward()
    theirs[0].method.output_loss = lambda *_: None  # type: ignore[method-assign]
    torch.manual_seed(3)
    one, other = twin(IDS, IDS), twin(IDS, IDS)
    torch.testing.assert_close(own[0].method.seen, (one["logits"], other["logits"]))  # type: ignore[attr-defined]
    expected = one["loss"] + (one["logits"] - other["logits"]).square().mean()
    torch.testing.assert_close(found["loss"], expected)
    expected.backward()
    for mine, its in zip(gradients(*own), gradients(*theirs), strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.any()
    with activate(model, *[each.name for each in own[1:]]):
        torch.testing.assert_close(model(IDS), model(IDS))


class ToldMethod(Method):
    """Adds the product with a pass in which its operators read another factor."""

    name = "toy_told"
    Config, target, tags = TapMethod.Config, TapMethod.target, TapMethod.tags

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        self.factor = Tap(until_backward=True)
        for site in surgeon.sites():
            surgeon.graft(site, lambda at, own: Told(at, self.factor), config)

    def output_loss(self, injection: Any, output: Any, call: ForwardContext) -> Tensor:
        return (output["logits"] * call.again({self.factor: 3.0})["logits"]).mean()

    parameter_count = staticmethod(TapMethod.parameter_count)


class Told(Operator):
    def __init__(self, site: Any, factor: Tap) -> None:
        super().__init__(site)
        self.gain, self.factor, self.usual = nn.Parameter(torch.zeros(site.out_features)), factor, 1.0

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) + (self.factor.get() or self.usual) * self.gain


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_operators_read_in_another_pass_what_taps_hold_from_its_beginning(reentrant: bool | None) -> None:
    """Also where blocks run again; beside forwards of a twin, whose operators have that factor."""
    model, twin = host(reentrant), host()
    injection, theirs = peftcore.apply(model, ToldMethod), peftcore.apply(twin, ToldMethod)
    fill(injection, 1), fill(theirs, 1)
    found = model(IDS, IDS)
    found["loss"].backward()
    theirs.method.output_loss = lambda *_: None  # type: ignore[method-assign]
    one = twin(IDS, IDS)
    for operator in theirs.operators.values():
        operator.usual = 3.0  # type: ignore[assignment]
    expected = one["loss"] + (one["logits"] * twin(IDS, IDS)["logits"]).mean()
    torch.testing.assert_close(found["loss"], expected)
    expected.backward()
    for mine, its in zip(gradients(injection), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.any()


def test_a_part_of_a_model_does_not_run_again() -> None:
    with pytest.raises(MissingContext, match="only the whole model"):
        forward_context().again()
