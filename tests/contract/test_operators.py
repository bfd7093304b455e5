"""State that sites share is registered, saved, copied and removed once."""

import copy
from typing import Any

import pytest
import torch
from core_toys import SharedBases, Shift, ShiftOperator, snapshot, stir, token_ids, transformer

import peftcore
from peftcore.errors import TrainingError


def test_owned_state_is_registered_and_saved_once() -> None:
    model = transformer()
    injection = peftcore.apply(model, SharedBases)
    assert [key for key in model.state_dict() if key.endswith(".A")] == ["peft.shared__bases.toy_shared.A"]
    assert {"shared:bases.A", "shared:bases.B"} <= set(injection.state_dict())
    assert len(injection.state_dict()) == 2 + 2 * 4
    assert set(injection.shared) == {"bases"}
    assert all(operator.bases.module is injection.shared["bases"] for operator in injection.operators.values())


def test_owned_state_round_trips_through_a_file(tmp_path: Any, fresh_registry: None) -> None:
    peftcore.register(SharedBases)
    model, ids = transformer(), token_ids()
    injection = peftcore.apply(model, "toy_shared", seed=1)
    stir(injection, 0.5)
    injection.save(tmp_path / "adapter")
    again = transformer()
    torch.manual_seed(77)  # the bases come from the file, not from a seed
    loaded = peftcore.load(again, tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(loaded.shared["bases"].A, injection.shared["bases"].A)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_owned_state_is_copied_with_the_host() -> None:
    model, ids = transformer(), token_ids()
    injection = peftcore.apply(model, SharedBases)
    stir(injection, 0.5)
    twin = copy.deepcopy(model)
    (theirs,) = peftcore.injections(twin).values()
    bases = {id(operator.bases.module) for operator in theirs.operators.values()}
    assert bases == {id(theirs.shared["bases"])} == {id(twin.get_submodule("peft.shared__bases.toy_shared"))}
    assert id(injection.shared["bases"]) not in bases
    output = model(ids)
    assert torch.equal(twin(ids), output)
    with torch.no_grad():
        theirs.shared["bases"].A.zero_()
    assert torch.equal(model(ids), output) and not torch.allclose(twin(ids), output, atol=1e-3)


def test_owned_state_leaves_with_the_injection() -> None:
    model = transformer()
    before = snapshot(model)
    injection = peftcore.apply(model, SharedBases)
    other = peftcore.apply(model, SharedBases, name="other")
    assert injection.shared["bases"] is not other.shared["bases"]
    injection.remove()
    assert [key for key in model.state_dict() if "shared__" in key] == [
        "peft.shared__bases.other.A",
        "peft.shared__bases.other.B",
    ]
    other.remove()
    assert snapshot(model) == before


def test_owned_state_follows_the_host_to_another_dtype_and_device() -> None:
    model = transformer()
    injection = peftcore.apply(model, SharedBases)
    model.to(torch.float64)
    assert injection.shared["bases"].A.dtype == torch.float64
    assert model(token_ids()).dtype == torch.float64


def test_which_operators_change_the_bias_beside_their_weight() -> None:
    class Moves(ShiftOperator):
        def merged_bias(self, bias: Any, weight: Any) -> Any:
            return bias

    (site,) = peftcore.plan(transformer(), Shift, target="layers.0.mlp.up_proj").sites
    config = Shift.Config()
    assert peftcore.author.changes_bias(Moves(site, config)) and not peftcore.author.changes_bias(
        ShiftOperator(site, config)
    )


def test_hooks_of_opacus_are_refused_and_others_see_the_operator_run() -> None:
    """Opacus would fail in forward: it takes the forward that an operator wraps for a tensor."""

    class Samples:
        def capture(self, *_: Any) -> None:
            raise AssertionError

    Samples.capture.__module__ = "opacus.grad_sample.grad_sample_module"
    model, ids = transformer(), token_ids()
    injection = peftcore.apply(model, Shift)
    [operator, *_] = [each for each in injection.operators.values() if isinstance(each, ShiftOperator)]
    with pytest.raises(TrainingError, match="PerExample"):
        operator.register_forward_hook(Samples().capture)
    seen: list[Any] = []
    handle = operator.register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids)
    handle.remove()
    assert len(seen) == 1
