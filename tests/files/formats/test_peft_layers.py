"""Layers as peft tells them apart, and where its sum of two outputs is not what the layer computes."""

import pytest
from torch import nn

import peftcore
from peftcore.author import Site
from peftcore.files.formats.peft_layers import is_one_of, not_added, uneven
from peftcore.layers.kinds import Linear


class Own(nn.Linear):
    """A forward of its own."""

    def forward(self, input):
        return super().forward(2 * input)


def site_of(module: nn.Module, target: str = "0") -> Site:
    (site,) = peftcore.plan(nn.Sequential(module), "lora", target=target).sites
    return site


def test_a_layer_is_one_by_its_module_or_by_ours() -> None:
    site = site_of(nn.Linear(4, 3))
    assert is_one_of(site, [nn.Linear]) and is_one_of(site, [Linear]) and not is_one_of(site, [nn.Embedding])


def test_parts_of_a_fused_projection_are_none() -> None:
    model = nn.MultiheadAttention(4, 2)
    sites = peftcore.plan(nn.Sequential(model), "lora", target="attn.q").sites
    assert sites and not any(is_one_of(site, [nn.MultiheadAttention, Linear]) for site in sites)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(4, 3), ""),
        (nn.Conv2d(4, 3, 3), ""),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (Own(4, 3), "the layer's own forward"),
    ],
)
def test_what_keeps_two_outputs_from_being_the_layers(module: nn.Module, words: str) -> None:
    assert not_added(site_of(module)) == words


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(4, 3), ""),
        (nn.Conv2d(4, 4, 3, padding=1), ""),
        (nn.Conv2d(4, 4, (3, 1), stride=(2, 1)), "such a kernel and stride"),
        (nn.Conv2d(4, 4, 3, padding="same"), "such a padding"),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=2), "such a dilation and groups"),
    ],
)
def test_convolutions_that_rotations_of_peft_are_not_written_for(module: nn.Module, words: str) -> None:
    assert uneven(module) == words
