"""What a site knows about itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from core_toys import Doubling, Shift, Swap, perceptron, snapshot, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite


class Experts(nn.Module):
    """Three stacked matrices, stored [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,...i->...o", self.up_proj, x)


SHAPES = [
    # layer, tensor, weight_shape, batch, out, in, kernel, form
    (nn.Linear(4, 6), "weight", (6, 4), (), 6, 4, (), "activation"),
    (nn.Embedding(11, 4), "weight", (4, 11), (), 4, 11, (), "activation"),
    (nn.Embedding(11, 4, max_norm=1.0), "weight", (4, 11), (), 4, 11, (), "weight"),
    (nn.Conv1d(4, 6, 3), "weight", (6, 4, 3), (), 6, 4, (3,), "activation"),
    (nn.Conv2d(4, 6, (3, 5), padding="same"), "weight", (6, 4, 3, 5), (), 6, 4, (3, 5), "activation"),
    (nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3), (), 6, 2, (3, 3), "weight"),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "weight", (6, 4, 3, 3), (), 6, 4, (3, 3), "weight"),
    (nn.Conv3d(2, 6, 2), "weight", (6, 2, 2, 2, 2), (), 6, 2, (2, 2, 2), "activation"),
    (nn.ConvTranspose2d(4, 6, 3), "weight", (6, 4, 3, 3), (), 6, 4, (3, 3), "weight"),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3), (), 6, 2, (3, 3), "weight"),
    (Experts(), "up_proj", (3, 6, 4), (3,), 6, 4, (), "weight"),
]


@pytest.mark.parametrize(
    ("layer", "tensor", "shape", "batch", "outputs", "inputs", "kernel", "form"),
    SHAPES,
    ids=lambda value: str(value).splitlines()[0] if isinstance(value, nn.Module) else "",
)
def test_what_a_site_knows(
    layer: nn.Module, tensor: str, shape: Any, batch: Any, outputs: int, inputs: int, kernel: Any, form: str
) -> None:
    model = nn.ModuleDict({"inner": layer})
    target = "inner" if tensor == "weight" else f"inner.{tensor}"
    injection = peftcore.apply(model, Swap if form == "weight" else "lora", target=target)
    (site,) = injection.sites
    (planned,) = peftcore.plan(model, Shift, target=target).sites
    for each in (site, planned):
        if each is planned or not isinstance(injection.method, Swap):  # replacements take tensors as they are stored
            assert tuple(each.weight_shape) == shape
            assert (each.batch, each.out_features, each.in_features, each.kernel) == (batch, outputs, inputs, kernel)
            assert each.weight().shape == shape
        assert each.numel == torch.Size(shape).numel()
        assert each.module is layer and each.module_path == "inner" and each.tensor == tensor
    injection.remove()


@pytest.mark.parametrize(
    ("layer", "form"),
    [(case[0], case[-1]) for case in SHAPES if case[1] == "weight"],
    ids=lambda value: str(value).splitlines()[0] if isinstance(value, nn.Module) else "",
)
def test_form_says_whether_the_forward_may_be_wrapped(layer: nn.Module, form: str) -> None:
    model = nn.ModuleDict({"inner": layer})
    if form == "weight":
        with pytest.raises(UnsupportedSite, match="read, not called"):
            peftcore.plan(model, Doubling, target="inner")
    else:
        assert peftcore.plan(model, Doubling, target="inner").sites[0].form == "activation"


def test_vectors_have_outputs_and_no_inputs() -> None:
    (site,) = peftcore.plan(nn.ModuleDict({"inner": nn.LayerNorm(5)}), Shift, target="inner").sites
    assert (site.out_features, site.numel, tuple(site.weight_shape)) == (5, 5, (5,))
    with pytest.raises(UnsupportedSite, match="inner is a vector of 5"):
        _ = site.in_features
    with pytest.raises(UnsupportedSite, match="vector"):
        peftcore.apply(nn.ModuleDict({"inner": nn.LayerNorm(5)}), "lora", target="inner")


def test_module_without_a_weight_is_one_typed_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = snapshot(model)
    for method in (Shift, Swap, "lora", "dora", "ia3"):
        with pytest.raises(UnsupportedSite, match="no tensor 'weight'"):
            peftcore.apply(model, method, target=nn.ReLU)
    assert snapshot(model) == before


def test_site_at_another_tensor_and_missing_slots() -> None:
    (site,) = peftcore.plan(perceptron(), Shift, target="first").sites
    bias = site.at("bias")
    assert bias.path == "first.bias" and bias.out_features == 6 and bias.form == "weight"
    assert site.tensors() == ("weight", "bias") and not site.missing("bias")

    bare = nn.ModuleDict({"inner": nn.Linear(4, 6, bias=False)})
    (site,) = peftcore.apply(bare, Shift, target="inner").sites
    assert site.missing("bias")
    assert torch.equal(site.at("bias").weight(), torch.zeros(6))


def test_weight_of_a_site_is_what_the_active_injections_make_of_it() -> None:
    model = perceptron()
    base = model.first.weight.detach().clone()
    first = peftcore.apply(model, Shift, target="first")
    (site,) = peftcore.apply(model, Shift, name="second", target="first").sites
    assert torch.allclose(site.weight(), base + 2)
    with first.disabled():
        assert torch.allclose(site.weight(), base + 1)
    first.merge()
    assert torch.allclose(site.weight(), base + 2)


def test_roles_of_sites_are_known_whatever_the_form_of_the_target() -> None:
    (first, _) = peftcore.plan(transformer(), Shift, target="q_proj").sites
    assert first.role == "attn.q"
    assert [site.role for site in peftcore.plan(transformer(), Shift, target="all-linear").sites][:2] == [
        "attn.q",
        "attn.k",
    ]


def test_base_weight_is_what_no_injection_touches() -> None:
    model = perceptron()
    base = model.first.weight.detach().clone()
    (site,) = peftcore.apply(model, Shift, target="first").sites
    assert torch.equal(site.base_weight(), base) and torch.allclose(site.weight(), base + 1)
    (planned,) = peftcore.plan(perceptron(), Shift, target="first").sites
    assert planned.base_weight().is_meta and planned.base_weight().shape == base.shape


def test_a_gradient_is_cut_as_the_site_is() -> None:
    """In logical layout, and the slices of the site alone."""
    stored = torch.arange(12.0).view(3, 4)  # of an embedding: [num, dim]
    (site,) = peftcore.plan(nn.ModuleDict({"inner": nn.Embedding(3, 4)}), Shift, target="inner").sites
    assert torch.equal(site.logical(stored), stored.T)
    assert torch.equal(replace(site, slices=((1, 2), (3, 4))).logical(stored), stored.T[[1, 3]])


def test_a_site_names_the_arguments_of_its_module() -> None:
    """Also where an injection acts there, which shows the arguments of the class it stands for."""
    model = transformer()
    for name in ("first", "second"):
        (site,) = peftcore.apply(model, Doubling, name=name, target="layers.0.self_attn").sites
        assert site.arguments == ("hidden",)


@pytest.mark.parametrize(
    ("role", "mixes"), [("experts.up", True), ("pos.proj", True), ("embed.pos", True), ("embed", False), (None, False)]
)
def test_where_rows_of_the_batch_cannot_be_told_apart(role: str | None, mixes: bool) -> None:
    (site,) = peftcore.plan(perceptron(), Shift, target="first").sites
    assert replace(site, role=role).mixes_rows is mixes


def test_what_is_given_nothing_makes_the_same_for_all_rows() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 4))

        def forward(self) -> Tensor:
            return self.table

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.first = Bias(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.bias().sum(0)

    bias, first = peftcore.plan(Host(), "svdiff").sites
    assert bias.path == "bias.table" and bias.mixes_rows and not first.mixes_rows
