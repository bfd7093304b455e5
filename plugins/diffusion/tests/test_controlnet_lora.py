"""Control-LoRA beside diffusers' ControlNet, whose matrices are the base's with the updates added to them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import BorrowedLayer
from peftcore.errors import ConfigError, MergeError, MissingContext, RouteError, UnsupportedHost, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

FAILURES = {
    "modules_named_like_the_method_are_ordinary-unet": "what lends the UNet's layers is at the UNet: its path is the "
    "very name without which the check compares"
}


def pose(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1)}


@conformance(
    "controlnet_lora",
    telling=["unet"],
    options={"*": {"widths": [4, 6], "rank": 2}},
    context=pose,
    expected_failures=FAILURES,
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
"""What tells a UNet of SDXL from one of SD 1.x."""
BOTH = pytest.mark.parametrize("sizes", [{}, XL], ids=["sd", "sdxl"])


def unet(**sizes: Any) -> tuple[Any, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    kit, inputs = HOSTS["unet"].build()
    config = {name: size for name, size in kit.config.items() if name[0] != "_"}
    model = diffusers.UNet2DConditionModel(**{**config, **sizes}) if sizes else kit
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    if sizes:
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32).double(), "time_ids": torch.rand(2, 6).double()}
    return model.double().eval().requires_grad_(False), given


def adapted(model: Any, noise: float = 0.1, **options: Any) -> tuple[Any, peftcore.Injection, Any]:
    """A copy of a host with the method in it, and its network with noise in every tensor."""
    model = deepcopy(model)
    given = {"dtype": "float64", "widths": [4, 6], "channels": 1, "rank": 3, **options}
    injection = peftcore.apply(model, "controlnet_lora", **given)
    (network,) = (module for path, module in injection.modules() if path.startswith("shared"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model, injection, network


def borrowed(network: nn.Module) -> dict[str, BorrowedLayer]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, BorrowedLayer)}


def whole(base: Any, network: Any) -> Any:
    """diffusers' ControlNet with the UNet's matrices, to which the products are added, and all else as in ours."""
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.ControlNetModel.from_unet(
        base, conditioning_embedding_out_channels=(4, 6), conditioning_channels=1
    ).double()
    own = {name: value for name, value in network.state_dict().items() if name.endswith(("weight", "bias"))}
    tensors, layers = reference.state_dict(), borrowed(network)
    for name, value in own.items():
        if name.rpartition(".")[0] not in layers:
            tensors[name] = value
    for path, layer in layers.items():
        if layer.down is not None and layer.up is not None:
            change = layer.up.detach() @ layer.down.detach().flatten(1)
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + change.view_as(tensors[f"{path}.weight"])
        if layer.bias is not None:
            tensors[f"{path}.bias"] = tensors[f"{path}.bias"] + layer.bias.detach()
    reference.load_state_dict(tensors)
    return reference


def controlled(reference: Any, base: Any, inputs: dict[str, Any], image: Tensor, **options: Any) -> Tensor:
    """What diffusers computes: a UNet that is given what a ControlNet returns."""
    down, mid = reference(**inputs, controlnet_cond=image, return_dict=False, **options)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    output: Tensor = base(**inputs, **added).sample
    return output


@BOTH
@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "guess_mode": True, "vectors": False}], ids=["all", "matrices"])
@against("diffusers 0.42", "controlnet_lora")
def test_outputs_and_gradients_are_those_of_diffusers(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base, inputs = unet(**sizes)
    model, _, network = adapted(base, **options)
    reference, image = whole(base, network), torch.randn(2, 1, 16, 16).double().requires_grad_()
    for given in (inputs["sample"], inputs["encoder_hidden_states"]):
        given.requires_grad_()
    scale = {"conditioning_scale": options.get("scale", 1.0), "guess_mode": options.get("guess_mode", False)}
    with peftcore.call(model, condition=image):
        ours = model.train()(**inputs).sample
    expected = controlled(reference, base, inputs, image, **scale)
    assert (ours - base(**inputs).sample).abs().max() > 0.01
    torch.testing.assert_close(ours, expected)
    direction, asked = torch.randn_like(ours), (inputs["sample"], inputs["encoder_hidden_states"], image)
    found, wanted = (
        torch.autograd.grad((output * direction).sum(), [*asked, *module.parameters()], allow_unused=True)
        for output, module in ((ours, network), (expected, reference))
    )
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert other is not None
        torch.testing.assert_close(one, other)
    theirs = dict(zip((name for name, _ in reference.named_parameters()), wanted[3:], strict=True))
    layers = borrowed(network)
    for (name, _), gradient in zip(network.named_parameters(), found[3:], strict=True):
        path, _, tensor = name.rpartition(".")
        expected = theirs[f"{path}.weight" if tensor in ("down", "up") else name]
        if tensor == "up":
            expected = expected.flatten(1) @ layers[path].down.flatten(1).T  # type: ignore[union-attr]
        if tensor == "down":
            expected = (layers[path].up.T @ expected.flatten(1)).view_as(gradient)  # type: ignore[union-attr]
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(gradient, expected, msg=name)
    assert len(theirs) >= len(found) - 3 - len(layers)


@BOTH
def test_it_holds_nothing_of_the_base(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Neither in memory nor in files nor among its parameters; and its rank is at most that of a layer."""
    base, inputs = unet(**sizes)
    model, injection, network = adapted(base, noise=0.0)
    with peftcore.call(model, condition=torch.randn(1, 1, 16, 16)):
        assert torch.equal(model(**inputs).sample, base(**inputs).sample)
    lent = dict(base.named_modules())
    of_matrices = of_vectors = others = 0
    for path, layer in lent.items():
        if path.startswith(("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")):
            for each in layer._parameters.values():
                if each is not None and each.dim() > 1:
                    rank = min(3, *each.shape[:2])
                    of_matrices += rank * (len(each) + each[0].numel())
                elif each is not None:
                    of_vectors += each.numel()
    for name, each in network.named_parameters():
        others += each.numel() * name.startswith("controlnet_")
    assert sum(each.numel() for each in injection.parameters()) == of_matrices + of_vectors + others
    injection.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    held = safetensors.torch.load_file(file)
    assert sum(each.numel() for each in held.values()) == of_matrices + of_vectors + others
    plain, *_ = adapted(base, noise=0.0, vectors=False)
    assert sum(each.numel() for each in peftcore.injections(plain)["controlnet_lora"].parameters()) == (
        of_matrices + others
    )


def changes(model: Any) -> dict[str, Callable[[], Any]]:
    """What happens to a base between two forwards."""

    @torch.no_grad()
    def written() -> None:
        for parameter in model.down_blocks.parameters():
            parameter.mul_(0.9)

    def replaced() -> None:
        resnet = model.mid_block.resnets[0]
        resnet.conv1 = deepcopy(resnet.conv1)
        resnet.conv1.weight.data += 0.1

    def quantized() -> None:
        peftcore.quantize(model, "int8", target=["mid_block.attentions.0.transformer_blocks.0.ff.net.2"])

    def loaded() -> None:
        values = {name: value * 1.1 for name, value in model.state_dict().items() if "peft" not in name}
        model.load_state_dict(values, strict=False)

    return {each.__name__: each for each in (written, replaced, quantized, loaded)}


@pytest.mark.parametrize("change", ["written", "replaced", "quantized", "loaded"])
def test_it_follows_what_becomes_of_the_base(change: str) -> None:
    torch.manual_seed(0)
    base, inputs = unet()
    model, _, network = adapted(base, vectors=False)
    image = torch.randn(2, 1, 16, 16).double()
    with peftcore.call(model, condition=image), torch.no_grad():
        before = model(**inputs).sample
        changes(model)[change]()
        after = model(**inputs).sample
    bare = deepcopy(base)
    changes(bare)[change]()
    dense = deepcopy(bare)
    peftcore.dequantize(dense)
    expected = controlled(whole(dense, network), bare, inputs, image)
    assert (after - before).abs().max() > 1e-6
    torch.testing.assert_close(after, expected)


def test_a_copy_of_the_model_borrows_of_the_copy() -> None:
    base, inputs = unet()
    model, _, network = adapted(base)
    twin, image = deepcopy(model), torch.randn(2, 1, 16, 16).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    (own,) = (module for path, module in peftcore.injections(twin)["controlnet_lora"].modules() if "shared" in path)
    assert own is not network
    with peftcore.call(twin, condition=image), torch.no_grad():
        torch.testing.assert_close(twin(**inputs).sample, controlled(whole(base, own), base, inputs, image))


def test_it_computes_in_the_dtype_of_the_base() -> None:
    """Its own tensors are float32, as those of all operators; the base's cannot be cast with them."""
    torch.manual_seed(0)
    base, inputs = unet()
    model, injection, _ = adapted(base.bfloat16(), dtype="float32")
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    single = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    image = torch.randn(2, 1, 16, 16)
    assert {each.dtype for each in injection.parameters()} == {torch.float32}
    with peftcore.call(model, condition=image), torch.no_grad():
        found, plain = model(**half).sample, base(**half).sample
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        expected = model(**single).sample
    assert found.dtype is torch.bfloat16
    assert (plain.float() - expected).abs().max() > 0.1
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_other_adapters_act_in_the_unet_and_not_in_what_is_borrowed() -> None:
    torch.manual_seed(0)
    base, inputs = unet()
    model, _, network = adapted(base)
    image, other = torch.randn(2, 1, 16, 16).double(), deepcopy(base)
    for host in (model, other):
        lora = peftcore.apply(host, "lora", target="all-linear", dtype="float64", seed=3)
        generator = torch.Generator().manual_seed(1)
        for parameter in lora.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
    peftcore.activate(model, "controlnet_lora", "lora")
    with peftcore.call(model, condition=image):
        found = model(**inputs).sample
    expected = controlled(whole(base, network), other, inputs, image)
    assert (found - controlled(whole(base, network), base, inputs, image)).abs().max() > 0.1
    torch.testing.assert_close(found, expected)


def test_nothing_is_merged_into_what_is_borrowed() -> None:
    """The borrowed layers would compute with the merged weights, and outputs would change."""
    torch.manual_seed(0)
    base, inputs = unet()
    model, *_ = adapted(base)
    image = torch.randn(2, 1, 16, 16).double()
    lora = peftcore.apply(model, "lora", target="all-linear", dtype="float64")
    for parameter in lora.parameters():
        parameter.data.normal_(0, 0.1)
    peftcore.activate(model, "controlnet_lora", "lora")
    with peftcore.call(model, condition=image):
        expected = model(**inputs).sample
        for change in (lora.merge, lora.bake):
            with pytest.raises(MergeError, match=r"controlnet_lora computes with the base's .*bake\(\) it before"):
                change()
            torch.testing.assert_close(model(**inputs).sample, expected, rtol=0, atol=0)
    first = deepcopy(base)
    peftcore.apply(first, "lora", target="all-linear", dtype="float64").merge()
    with pytest.raises(MergeError, match=r"'lora' merged into it"):
        peftcore.apply(first, "controlnet_lora", widths=[4, 6], channels=1, rank=3, dtype="float64")
    peftcore.injections(first)["lora"].bake()
    peftcore.apply(first, "controlnet_lora", widths=[4, 6], channels=1, rank=3, dtype="float64")
    in_the_decoder = peftcore.apply(model, "lora", target=["up_blocks.*.to_q"], dtype="float64", name="decoder")
    lora.remove()
    peftcore.activate(model, "controlnet_lora", "decoder")
    in_the_decoder.merge()


def test_offloaded_layers() -> None:
    """What offloads brings a layer's values back where it is called; that goes through adapters, which must not act."""
    accelerate = pytest.importorskip("accelerate")
    base, inputs = unet()
    model, *_ = adapted(base)
    image = torch.randn(2, 1, 16, 16).double()
    with peftcore.call(model, condition=image), torch.no_grad():
        expected = model(**inputs).sample
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.conv_in.weight.is_meta
        torch.testing.assert_close(model(**inputs).sample, expected)
    both, *_ = adapted(base)
    peftcore.apply(both, "lora", target="all-linear", dtype="float64")
    accelerate.cpu_offload(both, execution_device="cpu")
    peftcore.activate(both, "controlnet_lora", "lora")
    with pytest.raises(UnsupportedHost, match=r"remove\(\)"), peftcore.call(both, condition=image), torch.no_grad():
        both(**inputs)


class Pipeline(nn.Module):
    """Two UNets inside a host that has inputs of its own."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.first, self.second = unet, deepcopy(unet)

    def forward(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        for unet in (self.first, self.second):
            latents = unet(latents, step, encoder_hidden_states=text).sample
        return latents


def test_each_unet_of_a_host_lends_its_own_layers() -> None:
    torch.manual_seed(0)
    base, inputs = unet()
    host = Pipeline(base)
    with torch.no_grad():
        for parameter in host.second.parameters():
            parameter.mul_(0.9)
    injection = peftcore.apply(host, "controlnet_lora", dtype="float64", widths=[4, 6], channels=1, rank=3)
    networks = [module for path, module in injection.modules() if path.startswith("shared")]
    image, expected = torch.randn(2, 1, 16, 16).double(), inputs["sample"]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        with peftcore.call(host, condition=image):
            found = host(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        injection.remove()
        for lender, network in zip((host.first, host.second), networks, strict=True):
            given = {**inputs, "sample": expected}
            expected = controlled(whole(lender, network), lender, given, image)
    torch.testing.assert_close(found, expected)


def test_what_it_needs() -> None:
    base, inputs = unet()
    model, _, network = adapted(base)
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with pytest.raises(MissingContext, match="borrows"):
        network(**inputs, controlnet_cond=torch.randn(2, 1, 16, 16).double())
    with pytest.raises(RouteError, match="controlnet_lora"):
        peftcore.route(model, ["controlnet_lora", None])
    for host, target in ((base, "conv_in"), (HOSTS["mlp"].build()[0], "first")):
        with pytest.raises(UnsupportedSite, match="UNet2DConditionModel"):
            peftcore.plan(host, "controlnet_lora", target=target)
    with pytest.raises(ConfigError, match="no overrides"):
        peftcore.plan(base, "controlnet_lora", overrides={"*": {"rank": 4}})
