"""``apply(..., data=...)``: what data may be, what is said when it is wrong, and that looking leaves no trace."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from training_toys import WIDTH, Looks, LowRank, Plain, batch, found, method, toy

import peftcore
from peftcore import Injection
from peftcore.author import Batches, Method, MethodConfig, Operator, Site
from peftcore.errors import CalibrationError, ConfigError, PluginError
from peftcore.testing.tools import differences, trace


def expected(model: nn.Module, seeds: tuple[int, ...]) -> float:
    with torch.no_grad():
        return float(torch.stack([model(**batch(seed))["loss"] for seed in seeds]).mean())


def test_batches_are_mappings_tuples_or_functions() -> None:
    results = []
    for data in (
        [batch(1), batch(2)],
        [tuple(batch(1).values()), list(batch(2).values())],
        [lambda model: model(**batch(1)), lambda model: model(**batch(2))["loss"]],
        (batch(seed) for seed in (1, 2)),
    ):
        model = toy()
        injection = peftcore.apply(model, Looks, seed=0, data=data)
        results.append(found(injection))
    assert results == [pytest.approx(expected(model, (1, 2)))] * 4


def test_a_scalar_output_is_the_loss() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).square().mean()

    model = Scalar()
    injection = peftcore.apply(model, Looks, target="up", data=[(batch()["x"],)])
    assert found(injection) == pytest.approx(model(batch()["x"]).item())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"x": batch()["x"]}], "has no loss"),
        ([(batch()["x"],)], "has no loss"),
        ([lambda model: None], "has no loss"),
        ([batch()["x"]], "a batch is a Tensor"),
        ([3], "a batch is a int"),
        ([], "no batches"),
    ],
)
def test_wrong_data_is_refused_and_leaves_no_trace(data: list[Any], message: str) -> None:
    model = toy().train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, gradient = trace(model), next(model.parameters()).grad
    with pytest.raises(CalibrationError, match=message):
        peftcore.apply(model, Looks, data=data)
    assert differences(before, trace(model)) == ""
    assert next(model.parameters()).grad is gradient


def test_data_is_asked_for_and_not_taken_where_it_is_useless() -> None:
    model = toy()
    before = trace(model)
    with pytest.raises(CalibrationError, match="data=batches"):
        peftcore.apply(model, Looks)
    with pytest.raises(CalibrationError, match="remove data="):
        peftcore.apply(model, Plain, data=[batch()])
    assert differences(before, trace(model)) == ""


def test_a_failure_beside_another_injection_leaves_that_one_alone() -> None:
    model = toy()
    first = peftcore.apply(model, Plain)
    model.down.weight.requires_grad_(True)
    model(**batch())  # the witness has seen the first
    before = trace(model)
    with pytest.raises(CalibrationError):
        peftcore.apply(model, Looks, data=[])
    assert differences(before, trace(model)) == ""
    assert list(peftcore.injections(model)) == ["plain"]
    assert first.active


def test_loading_looks_at_no_data(tmp_path: Any) -> None:
    injection = peftcore.apply(toy(), peftcore.register(Looks), data=[batch()])
    injection.save(tmp_path / "saved")
    loaded = peftcore.load(toy(), tmp_path / "saved")
    assert found(loaded) == found(injection) != 0


def test_planning_looks_at_no_data() -> None:
    def never() -> Iterator[Any]:
        raise AssertionError
        yield

    assert peftcore.plan(toy(), Looks, data=never()).trainable == peftcore.plan(toy(), Looks).trainable > 0


def meddles(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
    """Does all that a calibration may do, and puts nothing back."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for each in data:
        each.loss().backward()
    for operator in injection.operators.values():
        if isinstance(operator, LowRank):
            operator.get_buffer("found").copy_(operator.A.grad.abs().sum())


def test_gradients_modes_flags_and_the_generator_are_put_back() -> None:
    model = toy()
    model.down.train()
    kept = model.up.weight.grad = torch.ones_like(model.up.weight)
    generator = torch.random.get_rng_state()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    injection = peftcore.apply(model, method("meddles", {"needs_data": True}, calibrate=meddles), data=[batch()])
    assert all(operator.get_buffer("found") > 0 for operator in injection.operators.values())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert model.up.weight.grad is kept
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "up.weight")
    assert not any(model.get_parameter(name).requires_grad for name in ("up.weight", "down.weight"))
    assert all(parameter.requires_grad for parameter in injection.parameters())
    assert (model.training, model.up.training, model.down.training) == (False, False, True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())


def test_the_operators_act_and_train_while_data_is_looked_at() -> None:
    seen: list[bool] = []

    def look(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        seen.append(injection.active and all(parameter.requires_grad for parameter in injection.parameters()))
        for operator in injection.operators.values():
            operator.get_buffer("found").fill_(1)

    peftcore.apply(toy(), method("watches", {"needs_data": True}, calibrate=look), data=[batch()])
    assert seen == [True]


def test_data_can_be_read_twice_where_it_can_be() -> None:
    def twice(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        count = sum(1 for _ in data) + sum(1 for _ in data)
        next(iter(injection.operators.values())).get_buffer("found").fill_(count)

    twice_method = method("twice", {"needs_data": True}, calibrate=twice)
    injection = peftcore.apply(toy(), twice_method, data=[batch(1), batch(2)])
    assert next(iter(injection.operators.values())).get_buffer("found") == 4
    with pytest.raises(CalibrationError, match="used up"):
        peftcore.apply(toy(), twice_method, data=iter([batch(1), batch(2)]))


def test_batches_go_to_the_device_of_the_host() -> None:
    """A batch on another device is moved; here the meta device stands for it."""
    model = toy()
    placed: list[str] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: placed.append(str(kwargs["x"].device)), with_kwargs=True
    )
    peftcore.apply(model, Looks, data=[batch()])
    assert placed == ["cpu"]


def test_a_look_at_data_changes_no_shapes() -> None:
    """What is loaded looks at no data, so a file of other shapes would load nowhere."""

    def grows(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
        for loss in data:
            loss.loss()
        for operator in injection.operators.values():
            operator.A = nn.Parameter(torch.zeros(5, operator.A.shape[1]))

    host = toy()
    before = trace(host)
    with pytest.raises(PluginError, match="calibrate changed the shape of"):
        peftcore.apply(host, method("grows", {"needs_data": True}, calibrate=grows), data=[batch()])
    assert not differences(before, trace(host))


def ranks(self: Method, model: nn.Module, data: Batches, config: Any, sites: Any) -> dict[str, Any]:
    """One number for the first site, by the data; nothing for the others."""
    model.train()
    loss = sum(each.loss().detach() for each in data)
    loss_is = {"rank": int(loss > 0) + 2}
    return {site.path: loss_is if n == 0 else None for n, site in enumerate(sites)}


class RankedConfig(MethodConfig):
    method: Literal["ranked"] = "ranked"
    rank: int = 1


class Ranked(Operator):
    def __init__(self, site: Site, config: RankedConfig) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.randn(config.rank, site.in_features))
        self.B = nn.Parameter(torch.randn(site.out_features, config.rank))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) + x @ self.A.T @ self.B.T


def ranked(self: Method, model: nn.Module, config: Any, surgeon: Any) -> None:
    for site in surgeon.sites():
        surgeon.graft(site, Ranked, config)


def ranked_method(structure: Any = ranks) -> type[Method]:
    return method(
        "ranked",
        {"needs_data": True},
        Config=RankedConfig,
        inject=ranked,
        structure=structure,
        calibrate=lambda self, model, data, config, injection: None,
        parameter_count=staticmethod(lambda site, config: config.rank * (site.in_features + site.out_features)),
        target=["up", "re:down"],
    )


def test_structure_found_in_data_is_in_options_plan_count_and_file(tmp_path: Path) -> None:
    model, cls = toy(), ranked_method()
    generator = torch.random.get_rng_state()
    peftcore.register(cls)
    injection = peftcore.apply(model, cls, data=[batch()])
    assert torch.equal(torch.random.get_rng_state(), generator) and not model.training
    assert [site.path for site in injection.sites] == ["up"]
    assert injection.config.overrides == {"up": {"rank": 3}} and injection.operators["up"].A.shape == (3, WIDTH)
    planned = peftcore.plan(toy(), injection.config, target="up")
    assert planned.trainable == sum(parameter.numel() for parameter in injection.parameters()) == 3 * (WIDTH + 8)
    injection.save(tmp_path)
    other = toy()
    loaded = peftcore.load(other, tmp_path)
    x = batch()["x"]
    torch.testing.assert_close(other(x), model(x))
    assert [site.path for site in loaded.sites] == ["up"]


def test_overrides_of_the_user_come_before_what_data_says() -> None:
    injection = peftcore.apply(toy(), ranked_method(), data=[batch()], overrides={"up": {"rank": 5}})
    assert injection.operators["up"].A.shape == (5, WIDTH)


def test_structure_that_fails_leaves_the_model_alone() -> None:
    host = toy()
    before = trace(host)
    for wrong, error in (
        (lambda *_: {"nowhere": {"rank": 1}}, PluginError),
        (lambda *_: {"up": {"rank": "big"}}, ConfigError),
        (lambda self, model, data, config, sites: {str(each): {} for each in data}, CalibrationError),
    ):
        with pytest.raises(error):
            peftcore.apply(host, ranked_method(wrong), data=[])
        assert not differences(before, trace(host))
