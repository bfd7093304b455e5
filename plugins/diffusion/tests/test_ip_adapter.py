"""IP-Adapter beside the processor and the projection of diffusers, with the same numbers; what calls may say."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import MissingContext, RouteError, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS


def image(model: Any, picture: Tensor) -> dict[str, Tensor]:
    """Three tokens of a picture, as wide as the host's words."""
    width = next(module.in_features for name, module in model.named_modules() if name.endswith("attn2.to_k"))
    return {"image_tokens": picture.flatten(1)[:, : 3 * width].unflatten(1, (3, width))}


@conformance("ip_adapter", telling=["unet"], context=image)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def adapted(**options: Any) -> tuple[Any, dict[str, Tensor], Any, peftcore.Injection]:
    """A base, inputs, and a copy with the method in it, away from its start."""
    base, inputs = unet()
    model = deepcopy(base)
    injection = peftcore.apply(model, "ip_adapter", dtype="float64", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return base, inputs, model, injection


def theirs(base: Any, injection: peftcore.Injection, count: int, scale: float) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy of the base with diffusers' processors that hold our numbers; those by the names of ours."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    copy, held = deepcopy(base), {}
    for path, operator in injection.operators.items():
        if not path.endswith("to_out.0"):
            continue
        attention: Any = copy.get_submodule(path.removesuffix(".to_out.0"))
        processor: Any = IPAdapterAttnProcessor2_0(*operator.key.shape, num_tokens=(count,), scale=scale).double()
        for name, ours in (("key", processor.to_k_ip), ("value", processor.to_v_ip)):
            ours[0].weight.data.copy_(operator.get_parameter(name))
            held[f"{path}.{name}"] = ours[0].weight
        attention.set_processor(processor)
    # self-attention in diffusers' own processor, cross-attention gets (text, [image]) as its encoder_hidden_states
    return copy, held


@pytest.mark.parametrize(("dim", "scale"), [(None, 0.6), (9, 1.0)], ids=["width-of-text", "other-width"])
@against("diffusers 0.42", "ip_adapter")
def test_outputs_and_gradients_are_those_of_diffusers(dim: int | None, scale: float) -> None:
    """Where the widths differ, our start is another, and the equation is the same."""
    base, inputs, model, injection = adapted(scale=scale, image_dim=dim)
    image = torch.randn(2, 3, dim or 14).double()
    copy, held = theirs(base, injection, 3, scale)
    with peftcore.call(model, image_tokens=image):
        ours = model(**inputs).sample
    text = inputs.pop("encoder_hidden_states")
    expected = copy(**inputs, encoder_hidden_states=(text, [image])).sample
    before = base(**inputs, encoder_hidden_states=text).sample
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert len(held) == 2 * sum(name.endswith("attn2") for name, _ in base.named_modules())
    for name, weight in held.items():
        path, _, part = name.rpartition(".")
        gradient = injection.operators[path].get_parameter(part).grad
        assert gradient is not None
        assert gradient.any()
        torch.testing.assert_close(gradient, weight.grad)


def test_keys_and_values_start_as_those_of_the_text() -> None:
    model, _ = unet()
    for path, operator in peftcore.apply(model, "ip_adapter", dtype="float64").operators.items():
        if path.endswith("to_out.0"):
            attention: Any = model.get_submodule(path.removesuffix(".to_out.0"))
            assert torch.equal(operator.get_parameter("key"), attention.to_k.weight)
            assert torch.equal(operator.get_parameter("value"), attention.to_v.weight)


def test_the_projection_is_that_of_diffusers_and_trains_along() -> None:
    from diffusers.models.embeddings import ImageProjection

    _, inputs, model, injection = adapted(embed_dim=6, tokens=4)
    (projection,) = (module for path, module in injection.modules() if path.startswith("shared"))
    reference = ImageProjection(6, 14, 4).double()
    for theirs, ours in zip(reference.parameters(), projection.parameters(), strict=True):
        theirs.data.copy_(ours)
    embeds = torch.randn(2, 6).double()
    torch.testing.assert_close(projection(embeds), reference(embeds))
    with peftcore.call(model, image_embeds=embeds):
        model(**inputs).sample.square().sum().backward()
    assert all(parameter.grad.any() for parameter in projection.parameters())
    assert sum(p.numel() for p in projection.parameters()) == 14 * (4 * (6 + 1) + 2)


def test_what_a_call_may_say() -> None:
    base, inputs, model, _ = adapted()
    images = torch.randn(2, 3, 14).double()
    with peftcore.call(model, image_tokens=images):
        both = model(**inputs).sample
        with peftcore.call(model, image_scale=0.0):
            torch.testing.assert_close(model(**inputs).sample, base(**inputs).sample)
        with peftcore.call(model, image_tokens=images[1:]):  # one for all
            alike = model(**inputs).sample
    torch.testing.assert_close(alike[1], both[1])
    assert (alike[0] - both[0]).abs().max() > 1e-3
    with pytest.raises(MissingContext, match="image_tokens"):
        model(**inputs)
    with (
        peftcore.call(model, image_tokens=torch.randn(3, 3, 14).double()),
        pytest.raises(RouteError, match="3 entries"),
    ):
        model(**inputs)


def test_attention_that_is_not_that_of_diffusers_is_refused() -> None:
    model, _ = HOSTS["t5"].build()
    with pytest.raises(UnsupportedSite, match="not in an attention of diffusers"):
        peftcore.plan(model, "ip_adapter")
    with pytest.raises(UnsupportedSite, match="not in a cross-attention"):
        peftcore.plan(unet()[0], "ip_adapter", target="attn.out")


def test_tokens_and_scale_are_those_of_the_authors_by_default() -> None:
    """`num_tokens=4` and `scale=1.0` in ip_adapter/ip_adapter.py and attention_processor.py of tencent-ailab/IP-Adapter
    at 62e4af9."""
    _, inputs, model, injection = adapted(embed_dim=6)
    (projection,) = (module for path, module in injection.modules() if path.startswith("shared"))
    embeds = torch.randn(2, 6).double()
    assert projection(embeds).shape == (2, 4, 14)
    with peftcore.call(model, image_embeds=embeds):
        found = model(**inputs).sample
        with peftcore.call(model, image_scale=1.0):
            assert torch.equal(model(**inputs).sample, found)
        with peftcore.call(model, image_scale=0.9):
            assert not torch.equal(model(**inputs).sample, found)


def test_numbers_in_the_unet_of_stable_diffusion() -> None:
    """Of version 1.5, with embeddings of CLIP's ViT-H, 1,024 wide: keys and values at the 16 cross-attentions, and four
    tokens; the paper's 22 million."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        )
    matrices = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert peftcore.plan(unet, "ip_adapter", embed_dim=1024).trainable == matrices + 768 * (4 * 1025 + 2) == 22_319_616
