"""DTL: the authors' class with and without its convolution, where backward stops, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vpt_equations import host, pixels, timm, wave

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "dtl.json"
CODE: Any = {"repository": "heekhero/DTL", "commit": "bf6c51e", "script": "models/vision_transformer.py"}
SIZES: dict[str, Any] = {"img_size": 28, "patch_size": 2, "embed_dim": 8, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@conformance("dtl")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("dtl", hosts=["vit"], options={"*": {"kernel": 3, "start": 0.0}})  # else nothing reads the patches
def test_conformance_with_a_convolution(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("kernel", "beta"), [(None, 100.0), (3, 2.0), (4, 2.0)])
@against("authors", "dtl", **CODE)
def test_the_authors_class_with_the_same_numbers(kernel: int | None, beta: float) -> None:
    numbers = frozen(NUMBERS)[str(kernel or 0)]
    model = timm.models.VisionTransformer(**SIZES, num_classes=3, global_pool="avg").double().eval()
    injection = peftcore.apply(model, "dtl", kernel=kernel, beta=beta, dtype="float64")
    side = {}
    for number, operator in enumerate(injection.operators.values()):
        side |= {f"lora_dict.{number}.lora_A": operator.A, f"lora_dict.{number}.lora_B": operator.C}
    if kernel:
        side["lora_fusion.weight"] = injection.shared["fusion"].weight
    assert side.keys() == numbers["gradients"].keys()
    for name, parameter in (*model.named_parameters(), *side.items()):
        parameter.data.copy_(wave(parameter.shape, name.replace("fc_norm", "norm")))
    logits = model(wave((2, 3, 28, 28), "images"))
    torch.testing.assert_close(logits, torch.tensor(numbers["logits"], dtype=torch.float64), **CLOSE)
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), side.values())
    for (name, expected), gradient in zip(numbers["gradients"].items(), found, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), msg=name, **CLOSE)


@pytest.mark.parametrize("start", [0.0, 0.5, 0.9])
def test_the_equation_of_a_decoder(start: float) -> None:
    """By hooks at the blocks of a text model, with a sum from the front."""
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    base, _ = HOSTS["llama"].build()
    base.double().eval().load_state_dict(model.double().eval().state_dict())
    injection = peftcore.apply(model, "dtl", start=start, beta=3.0, dtype="float64")
    fill(injection)
    blocks, tensors = base.model.layers, [(each.A, each.C) for each in injection.operators.values()]
    first, read = int(len(blocks) * start), []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])

    def behind(module: Any, args: Any, output: Any) -> Any:
        h = sum(torch.einsum("dr,re,bte->btd", C, A, x) for (A, C), x in zip(tensors, read, strict=False))
        return output + h / (1 + torch.exp(-3.0 * h)) if len(read) > first else output

    for block in blocks:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(behind)
    ours, expected = (HOSTS["llama"].output(each(**inputs)) for each in (model, base))
    torch.testing.assert_close(ours, expected, **CLOSE)
    direction, parameters = torch.randn_like(ours), list(injection.parameters())
    found = [torch.autograd.grad((each * direction).sum(), parameters) for each in (ours, expected)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


def test_backward_stops_before_the_first_feedback() -> None:
    model = host("timm")
    injection = peftcore.apply(model, "dtl", dtype="float64", start=0.7)  # behind the last of three blocks alone
    fill(injection)
    seen: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(args[0].requires_grad))
    model(pixels()).sum().backward()
    assert seen == [False, False, False]
    assert all(parameter.grad is not None for parameter in injection.parameters())


def test_refused() -> None:
    with pytest.raises(ConfigError, match="takes no overrides"):
        peftcore.apply(host("timm"), "dtl", overrides={"blocks.1": {"rank": 4}})
    with pytest.raises(UnsupportedSite, match="does not process patches of a picture"):
        peftcore.apply(HOSTS["llama"].build()[0], "dtl", kernel=3)
    assert isinstance(peftcore.apply(host("timm"), "dtl", kernel=3).shared["fusion"], nn.Conv2d)


@against("authors", "dtl", **CODE, part="start")
def test_start() -> None:
    model = timm.models.VisionTransformer(**{**SIZES, "embed_dim": 1600, "depth": 1})
    injection = peftcore.apply(model, "dtl", rank=25, kernel=3, start=0.0)
    (operator,), told = injection.operators.values(), frozen(NUMBERS, "start")
    same_start(operator.A, told["A"])
    same_start(operator.C, told["C"])
    same_start(injection.shared["fusion"].weight, told["fusion"])


@against("authors", "dtl", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The side network, and the head, which `train` names here."""
    model = timm.models.VisionTransformer(**SIZES, num_classes=3)
    injection = peftcore.apply(model, "dtl", kernel=3, train=["head"])
    *blocks, weight, bias = injection.operators.values()
    ours = {
        "head.weight": weight.value,
        "head.bias": bias.value,
        "lora_fusion.weight": injection.shared["fusion"].weight,
    }
    for number, operator in enumerate(blocks):
        ours |= {f"lora_dict.{number}.lora_A": operator.A, f"lora_dict.{number}.lora_B": operator.C}
    assert {id(each) for each in ours.values()} == {id(each) for each in injection.parameters()}
    assert {name: each.numel() for name, each in ours.items() if each.requires_grad} == frozen(NUMBERS, "trains")


@against("authors", "dtl", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("timm"), "dtl").config, frozen(NUMBERS, "defaults"))
