"""LoCon beside the real LyCORIS: the same numbers in both, the same outputs, gradients and merged weights."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS


@conformance(
    "locon",
    options={"unet": {"rank": 9, "conv_rank": 5}, "moe": {"rank": 9}},  # at 16 what is between has shapes of weights
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class One(nn.Module):
    """A host of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), lambda: torch.randn(2, 4, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), lambda: torch.randn(2, 4, 5, 6)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), lambda: torch.randn(2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2)), lambda: torch.randn(1, 2, 2, 4, 4)),
}


def theirs(layer: nn.Module, rank: int, alpha: float, **options: Any) -> Any:
    """LyCORIS's module in the place of a layer."""
    locon = pytest.importorskip("lycoris.modules.locon")
    return locon.LoConModule("layer", layer, 1.0, rank, alpha, **options).double()


@torch.no_grad()
def same(module: Any, operator: Any) -> list[tuple[Tensor, Tensor]]:
    """Their tensors and ours, after N(0, 0.1) is in both."""
    names = {"lora_down": operator.down, "lora_up": operator.up}
    names |= {} if operator.core is None else {"lora_mid": operator.core}
    assert {name.partition(".")[0] for name, _ in module.named_parameters() if "lora" in name} == set(names)
    pairs = [(module.get_parameter(f"{name}.weight"), parameter) for name, parameter in names.items()]
    for weight, parameter in pairs:
        parameter.normal_(0, 0.1)
        weight.copy_(parameter.view(weight.shape))
    return pairs


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"scaling": "sqrt_rank"}], ids=["plain", "tucker", "rs"])
@pytest.mark.parametrize(("build", "inputs"), LAYERS.values(), ids=LAYERS)
@against("lycoris 4.1", "locon")
def test_outputs_gradients_and_merged_weights_are_those_of_lycoris(build: Any, inputs: Any, options: Any) -> None:
    model, x = One(build().double()), inputs().double()
    small = math.prod(getattr(model.layer, "kernel_size", (1,))) == 1
    reference = deepcopy(model.layer)
    module = theirs(
        reference,
        *((3, 5.0) if small else (2, 7.0)),
        use_tucker=options.get("use_tucker", False),
        rs_lora=options.get("scaling") == "sqrt_rank",
    )
    sizes = {"rank": 3, "alpha": 5.0, "conv_rank": 2, "conv_alpha": 7.0}
    injection = peftcore.apply(model, "locon", target="layer", dtype="float64", **sizes, **options)
    pairs = same(module, injection.operators["layer"])
    base, ours, expected = reference(x), model(x), module(x)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for weight, parameter in pairs:
        torch.testing.assert_close(parameter.grad, weight.grad.view(parameter.shape))
        assert parameter.grad.any()
    injection.bake()
    torch.testing.assert_close(model.layer.weight, module.get_merged_weight()[0])


@pytest.mark.parametrize("tucker", [False, True])
def test_factors_start_as_those_of_lycoris(tucker: bool) -> None:
    """Uniform in the same range, and U at zero: a fresh injection changes nothing."""
    layer = nn.Conv2d(50, 40, 3)
    operator: Any = peftcore.apply(One(layer), "locon", target="layer", conv_rank=30, use_tucker=tucker).operators
    operator = operator["layer"]
    module = theirs(deepcopy(layer), 30, 1.0, use_tucker=tucker)
    pairs = [(operator.down, module.lora_down)] + ([(operator.core, module.lora_mid)] if tucker else [])
    for ours, expected in pairs:
        assert ours.numel() == expected.weight.numel()
        assert ours.detach().abs().max() == pytest.approx(expected.weight.abs().max().item(), rel=0.02)
        assert ours.detach().std() == pytest.approx(expected.weight.std().item(), rel=0.05)
    assert not operator.up.any()


def test_default_targets_are_those_of_the_full_preset() -> None:
    """All that LyCORIS finds in the blocks of a UNet, with the ranks it gives them."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    from lycoris.config import PRESET

    model = HOSTS["unet"].build()[0]
    names = PRESET["full"]["unet_target_module"]
    wrapper.LycorisNetwork.apply_preset({"target_module": names, "target_name": PRESET["full"]["unet_target_name"]})
    network = wrapper.LycorisNetwork(deepcopy(model), 1.0, 3, 2, 5.0, 7.0)
    expected = {module.lora_name.removeprefix("lycoris_"): module.lora_dim for module in network.loras}
    injection = peftcore.apply(model, "locon", rank=3, conv_rank=2)
    operators: Any = injection.operators
    assert {path.replace(".", "_"): operator.up.shape[-1] for path, operator in operators.items()} == expected
