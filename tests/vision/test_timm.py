"""timm's image models under adapters: features, new classifiers, checkpointed stages, projections that are read instead
of called, statistics of batches. Tiny models with random weights, in float64; the base is never adapted."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.roles import derive, probe
from peftcore.testing.hosts import stir
from peftcore.testing.kit import fill

timm = pytest.importorskip("timm")

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_mean": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "eva": ("eva02_tiny_patch14_224", VIT),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
}
READ = ("beit", "eva", "swinv2")
"""Their attentions read the weight of qkv, and put a bias of q and one of v beside a k without one."""
PROMPTED = ("vit", "vit_mean", "deit")
CONVOLUTIONS = {"convnext": r"re:.*(conv_dw|fc1)", "resnet": r"re:layer.*conv\d"}
CASES = [("lora", name) for name in MODELS] + [(m, name) for m in ("vpt_shallow", "vpt_deep") for name in PROMPTED]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, num_classes=3, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return stir(model).double().eval()


def images(name: str) -> Tensor:
    size = 16 if "img_size" in MODELS[name][1] and name != "swinv2" else 32
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adapt(model: Any, method: str, name: str, **options: Any) -> peftcore.Injection:
    """Apply with default targets, or at convolutions where there is no attention, and move every tensor."""
    if method == "lora" and name in CONVOLUTIONS:
        options["target"] = CONVOLUTIONS[name]
    if method != "lora":
        options["train_head"] = False
    injection = peftcore.apply(model, method, dtype="float64", **options)
    fill(injection)
    return injection


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_features_are_adapted_and_keep_their_shape(method: str, name: str) -> None:
    """Also where the host's own forward never runs."""
    model, base, x = model_of(name), model_of(name), images(name)
    adapt(model, method, name)
    ours, plain = model.forward_features(x), base.forward_features(x)
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    close(model(x), base.forward_head(ours))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_new_classifier_stands_on_adapted_features(method: str, name: str) -> None:
    model, x = model_of(name), images(name)
    injection = adapt(model, method, name)
    features = model.forward_features(x)
    model.reset_classifier(5)
    model.double()
    assert model(x).shape == (4, 5)
    close(model.forward_features(x), features)
    model.reset_classifier(0)
    assert model(x).shape == (4, model.num_features)
    injection.remove()
    close(model.forward_features(x), model_of(name).forward_features(x))


def test_a_classifier_that_is_new_trains_along() -> None:
    model = model_of("vit")
    model.reset_classifier(5)
    injection = peftcore.apply(model.double(), "vpt_deep", dtype="float64")
    assert injection.operators["head"].value.shape == (5, 16)
    model(images("vit")).sum().backward()
    assert injection.operators["head"].value.grad.abs().max() > 0


def count_calls(model: nn.Module) -> Counter[str]:
    """How often norms run, but for those of an attention whose weights are read: it runs again with them as it is."""
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in ("norm", "norm1", "bn1") and ".attn." not in path:
            module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
    return calls


@pytest.mark.parametrize(("method", "name"), CASES)
def test_stages_that_run_again_give_the_same_gradients(method: str, name: str) -> None:
    found = []
    for again in (False, True):
        model = model_of(name).train()
        injection = adapt(model, method, name)
        model.set_grad_checkpointing(again)
        calls = count_calls(model)
        model(images(name)).square().sum().backward()
        assert (max(calls.values()) > 1) == again
        found.append([parameter.grad for parameter in injection.parameters()])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def placed(path: str) -> tuple[str, str]:
    """The weight that an operator acts on, and its role."""
    place, _, role = path.partition(":")
    return f"{place.removesuffix('.weight')}.weight", role


def by_hand(model: Any, injection: peftcore.Injection) -> dict[str, Tensor]:
    """The weights of qkv with the updates of q and v in their rows."""
    weights = {}
    for path, operator in injection.operators.items():
        place, role = placed(path)
        weight = weights.setdefault(place, model.get_parameter(place).detach().clone())
        width = len(weight) // 3
        first = {"attn.q": 0, "attn.v": 2 * width}[role]
        weight[first : first + width] += operator.scale * (operator.B @ operator.A).detach()
    return weights


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", READ)
def test_a_projection_that_is_read_with_biases_apart(name: str, apart: bool) -> None:
    """Or called, with the biases added afterwards: an option of timm for fused and quantized matrices."""
    model, x = model_of(name), images(name)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = apart
    base, before = deepcopy(model), model(x)
    injection = adapt(model, "lora", name)
    weights = {key: weight.requires_grad_() for key, weight in by_hand(base, injection).items()}
    assert len(weights) == 2 and len(injection.operators) == 4
    ours, expected = model(x), torch.func.functional_call(base, weights, (x,))
    assert (expected - before).abs().max() > 1e-3
    close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, operator in injection.operators.items():
        place, role = placed(path)
        gradient = weights[place].grad.chunk(3)[{"attn.q": 0, "attn.v": 2}[role]]
        torch.testing.assert_close(operator.B.grad, operator.scale * gradient @ operator.A.T, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(operator.A.grad, operator.scale * operator.B.T @ gradient, rtol=1e-8, atol=1e-9)
    injection.merge()
    close(model(x), expected)
    biases = {key: value for key, value in base.state_dict().items() if key.endswith(("q_bias", "v_bias"))}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in biases.items()) and biases


@pytest.mark.parametrize("name", READ)
def test_a_forward_that_is_looked_at_says_the_same(name: str) -> None:
    model = model_of(name)
    host = derive(model)
    probed = probe(model, {"x": images(name)}, host)
    read = [(entry.path, entry.called, entry.reader) for entry in host.entries if entry.path.endswith("attn.qkv")]
    assert read == [(entry.path, entry.called, entry.reader) for entry in probed.entries if entry.path.endswith(".qkv")]
    assert [called for _, called, _ in read] == [False, False]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit", "houlsby_adapter"])
@pytest.mark.parametrize("name", READ)
def test_it_trains_by_the_name_of_a_method_alone(method: str, name: str) -> None:
    model, x = model_of(name), images(name)
    injection = peftcore.apply(model, method, dtype="float64")
    fill(injection)
    model(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


@pytest.mark.parametrize("name", READ)
def test_biases_apart_are_biases(name: str) -> None:
    model, x = model_of(name), images(name)
    before, injection = model(x), peftcore.apply(model, "bitfit", dtype="float64")
    apart = {path: operator for path, operator in injection.operators.items() if path.endswith(("q_bias", "v_bias"))}
    assert len(apart) == 4
    with torch.no_grad():
        for operator in apart.values():
            operator.value.add_(0.5)
    moved = model(x)
    assert (moved - before).abs().max() > 1e-3
    moved.sum().backward()
    assert all(operator.value.grad.abs().max() > 0 for operator in apart.values())
    injection.remove()
    assert torch.equal(model(x), before)


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name]


@pytest.mark.parametrize("train", [None, ["bn1", "layer1.0.bn1"]])
def test_statistics_of_a_frozen_base_stay(train: list[str] | None) -> None:
    """Training works with those of the base, as evaluation does, also where gains and biases of norms train along; with
    the adapter gone, the base in train mode moves them again."""
    model, x = model_of("resnet"), images("resnet")
    injection = adapt(model, "lora", "resnet", **({"train": train} if train else {}))
    evaluated, before = model(x), statistics(model)
    model.train()
    trained = model(x)
    close(trained, evaluated)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())
    assert all(map(torch.equal, statistics(model), before)) and before
    injection.remove()
    model(x)
    assert not any(torch.equal(one, other) for one, other in zip(statistics(model), before, strict=True))


def test_norms_of_channels_have_none() -> None:
    model, x = model_of("convnext"), images("convnext")
    adapt(model, "lora", "convnext")
    assert not statistics(model)
    close(model.train()(x), model.eval()(x))
