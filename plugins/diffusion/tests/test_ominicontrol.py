"""OminiControl beside its authors' forward of a Flux, and LoRA for the condition alone on other transformers."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from dit_hosts import NAMES, dit_host, inputs_of
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, RouteError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "ominicontrol.json"
MADE = SimpleNamespace(**run_path(str(NUMBERS.with_suffix(".py"))))
AUTHORS = {"repository": "Yuanshi9815/OminiControl", "commit": "331dd34", "script": "omini/pipeline/flux_omini.py"}


def latents(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture[..., :8, :8].expand(-1, 2, -1, -1)}


FAILURES = {
    "modules_named_like_the_method_are_ordinary-dit": "the stream is at the transformer itself: its path is the very "
    "name without which the check compares",
    "every_trainable_tensor_learns-dit": "what the condition asks and puts out in the last block reaches nothing; the "
    "authors adapt it there too",
}


@conformance("ominicontrol", telling=["dit"], context=latents, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("case", MADE.CASES)
@against("authors", "ominicontrol", **AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors(case: str) -> None:
    """Diffusers rotates in float32, so gradients are equal up to that."""
    pytest.importorskip("diffusers")
    theirs, options = frozen(NUMBERS)[case], dict(MADE.CASES[case])
    shape, model, given = options.pop("shape"), MADE.host(), MADE.inputs()
    base = model(**given).sample
    injection = peftcore.apply(model, "ominicontrol", rank=MADE.RANK, dtype="float64", **options)
    factors = {path: (each.A, each.B) for path, each in sorted(injection.operators.items()) if hasattr(each, "A")}
    MADE.fill(list(factors.values()))
    image, condition = given["hidden_states"].requires_grad_(), MADE.condition(case).requires_grad_()
    with peftcore.call(model, condition=condition, condition_ids=MADE.grid(*shape)):
        output = model(**given).sample
    (output * MADE.wave(*output.shape, phase=6.0)).sum().backward()
    found = {"output": output.detach(), "image": image.grad, "condition": condition.grad}
    for path, (A, B) in factors.items():
        found |= {f"{path}.A": A.grad, f"{path}.B": B.grad}
    assert (output - base).abs().max() > 1e-2
    assert found.keys() == theirs.keys()
    for name, wanted in theirs.items():
        expected, ours = torch.tensor(wanted, dtype=torch.float64), found[name]
        ours = torch.zeros_like(expected) if ours is None else ours.flatten()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    moving = [name for name, wanted in theirs.items() if max(map(abs, wanted)) > 1e-6]
    assert len(moving) > len(theirs) - 8  # what makes queries and outputs of the last block counts for nothing


@against("authors", "ominicontrol", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    pytest.importorskip("diffusers")
    operator = peftcore.apply(MADE.host(MADE.WIDE), "ominicontrol").operators["x_embedder"]
    for name, told in frozen(NUMBERS, "start").items():
        same_start(operator.get_parameter(name), told)


@against("authors", "ominicontrol", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    pytest.importorskip("diffusers")
    operators = peftcore.apply(MADE.host(), "ominicontrol").operators
    ours = {f"{path}.{name}": p.numel() for path, each in operators.items() for name, p in each.named_parameters()}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "ominicontrol", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    pytest.importorskip("diffusers")
    same_defaults(peftcore.apply(MADE.host(), "ominicontrol").config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize("name", NAMES)
def test_the_update_acts_while_blocks_run_for_the_condition(name: str) -> None:
    """On each kind of transformer; where that never is, the outputs are those of a fresh one."""
    model, given = dit_host(name, torch.float32)
    base = model(**given).sample
    injection = peftcore.apply(model, "ominicontrol")
    torch.manual_seed(4)
    image = inputs_of(name, torch.float32)["hidden_states"]
    with peftcore.call(model, condition=image):
        fresh = model(**given).sample
        fill(injection)
        trained = model(**given).sample
        for operator in injection.operators.values():
            if hasattr(operator, "turn") and hasattr(operator, "A"):
                operator.turn = SimpleNamespace(is_now=lambda: False)
        torch.testing.assert_close(model(**given).sample, fresh)
        with injection.disabled():
            assert torch.equal(model(**given).sample, base)
    assert (fresh - base).abs().max() > 1e-4
    assert (trained - fresh).abs().max() > 1e-4


def test_what_it_adapts_by_default() -> None:
    """The matrices that see the condition, and none of the text's."""
    model, _ = dit_host("flux", torch.float32)
    injection = peftcore.apply(model, "ominicontrol", rank=3)
    factors = {path: each for path, each in injection.operators.items() if hasattr(each, "A")}
    ends = {path.partition("blocks.")[2].partition(".")[2] for path in factors}
    single = {"norm.linear", "proj_mlp", "proj_out", *(f"attn.to_{part}" for part in "qkv")}
    double = {"norm1.linear", "attn.to_out.0", "ff.net.2", *(f"attn.to_{part}" for part in "qkv")}
    assert ends == {"", *single, *double}
    assert len(factors) == 1 + 2 * len(single) + 2 * len(double)
    assert all(not each.B.any() for each in factors.values())
    assert torch.cat([each.A.flatten() for each in factors.values()]).std().item() == pytest.approx(1 / 3, rel=0.05)


def test_what_it_needs() -> None:
    model, given = dit_host("flux", torch.float32)
    peftcore.apply(model, "ominicontrol")
    with pytest.raises(MissingContext, match="condition"):
        model(**given)
    with pytest.raises(ConfigError, match="condition_ids"), peftcore.call(model, condition=torch.randn(1, 5, 4)):
        model(**given)
    with pytest.raises(RouteError, match="ominicontrol"):
        peftcore.route(model, ["ominicontrol", None])
    other, _ = dit_host("sd3", torch.float32)
    with pytest.raises(UnsupportedSite, match="computes positions itself"):
        peftcore.plan(other, "ominicontrol", position_delta=(0, -4))
    with pytest.raises(UnsupportedSite, match="no diffusion transformer"):
        peftcore.plan(nn.Sequential(nn.Linear(2, 2)), "ominicontrol", target="0")
