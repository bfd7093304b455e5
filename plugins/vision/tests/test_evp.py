"""EVP: the authors' SegFormer with the same numbers, its start, what trains and its options, the equation behind class
tokens, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpt_equations import HOSTS, host, pixels, timm, transformers, wave

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as SMALL
from peftcore.testing.kit import fill
from peftcore_vision.evp import EVPOperator, StageOperator

NUMBERS = Path(__file__).parent / "numbers" / "evp.json"
CODE: Any = {"repository": "NiFangBaAGe/Explicit-Visual-Prompt", "commit": "601ae99"}
CODE |= {"script": "models/mmseg/models/backbones/mix_transformer_evp.py"}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SEGFORMER: dict[str, Any] = {"hidden_sizes": [4, 8, 12, 16], "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2] * 4}
SEGFORMER |= {"depths": [2, 1, 1, 1], "sr_ratios": [4, 2, 1, 1], "drop_path_rate": 0.0}
NAMES = (
    (r"stages\.(\d)\.patch_embeddings\.proj", r"patch_embed\1.proj"),
    (r"stages\.(\d)\.patch_embeddings\.layer_norm", r"patch_embed\1.norm"),
    (r"stages\.(\d)\.blocks\.(\d)", r"block\1.\2"),
    (r"stages\.(\d)\.layer_norm", r"norm\1"),
    (r"attention\.sequence_reduction\.sequence_reduction", "attn.sr"),
    (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
    (r"attention\.q_proj", "attn.q"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
)
"""What the authors call the parts of a SegFormer, whose stages begin at 1."""


@conformance(
    "evp",
    options={"*": {"reduction": 1}},  # small hosts are narrow
    telling=("vit", "dit"),
    expected_failures={"it_learns-task": "its authors train the decoder along; without a head it gains 29 % there"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def segformer(train: bool = False) -> nn.Module:
    """A SegFormer with the numbers that the authors' had."""
    model = transformers.SegformerModel(transformers.SegformerConfig(**SEGFORMER)).double().train(train)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            named = re.sub(r"stages\.(\d)", lambda found: f"stages.{int(found[1]) + 1}", name)
            for ours, theirs in NAMES:
                named = re.sub(ours, theirs, named)
            half = re.search(r"attention\.([kv])_proj", named)
            if half is None:
                parameter.copy_(wave(parameter.shape, named))
            else:
                both = wave((2 * len(parameter), *parameter.shape[1:]), named.replace(half[0], "attn.kv"))
                parameter.copy_(both.chunk(2)["kv".index(half[1])])
    return model


def of_theirs(injection: peftcore.Injection) -> dict[str, Tensor]:
    """The parameters of an adapter by the names of the authors."""
    found: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module | None) -> None:
        found.update({} if module is None else {f"{name}.{part}": each for part, each in module.named_parameters()})

    for path, operator in injection.operators.items():
        if path.startswith("decode_head"):
            continue
        path = path.removeprefix("segformer.")
        number = int(path.split(".")[1]) + 1
        if isinstance(operator, StageOperator):
            add(f"handcrafted_generator{number}.proj", operator.filter)
            add(f"handcrafted_generator{number}.norm", operator.norm)
            add(f"embedding_generator{number}", operator.embedding)
            add(f"shared_mlp{number}", injection.shared[f"up_{number - 1}"])
        else:
            assert isinstance(operator, EVPOperator)
            add(f"lightweight_mlp{number}_{path.split('.')[3]}.0", operator.tune)
    return found


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("frequencies", "patches"), [("high", True), ("low", True), ("high", False), ("none", True)])
@against("authors", "evp", **CODE)
def test_the_authors_segformer_with_the_same_numbers(frequencies: Any, patches: bool, train: bool) -> None:
    numbers = frozen(NUMBERS)[f"{frequencies} {patches}"]
    model = segformer(train)
    injection = peftcore.apply(model, "evp", reduction=2, frequencies=frequencies, patches=patches, dtype="float64")
    parameters = of_theirs(injection)
    assert len(parameters) == len(list(injection.parameters()))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(wave(parameter.shape, f"prompt_generator.{name}"))
    picture = wave((1, 3, 64, 60), "picture").requires_grad_()
    states = model(picture).last_hidden_state
    torch.testing.assert_close(states, torch.tensor(numbers["states"], dtype=torch.float64), **CLOSE)
    assert {*parameters, "picture"} == numbers["gradients"].keys()
    learned = {**parameters, "picture": picture}
    found = torch.autograd.grad((states * wave(states.shape, "direction")).sum(), learned.values())
    for (name, expected), gradient in zip(((n, numbers["gradients"][n]) for n in learned), found, strict=True):
        sum_ = (gradient * wave(gradient.shape, "weights")).sum()
        torch.testing.assert_close(sum_.item(), expected, rtol=1e-8, atol=1e-10, msg=name)
        assert gradient.abs().max() > 1e-7, name


@against("authors", "evp", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of stages that are 512 wide."""
    wide = {"hidden_sizes": [512] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4}
    model = transformers.SegformerModel(transformers.SegformerConfig(**{**SEGFORMER, **wide}))
    told, found = frozen(NUMBERS, "start"), of_theirs(peftcore.apply(model, "evp"))
    assert found.keys() == told.keys()
    for name, tensor in found.items():
        same_start(tensor, told[name])


@against("authors", "evp", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the decoder, which `train` names here."""
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SEGFORMER))
    size = sum(each.numel() for each in model.decode_head.parameters())
    injection = peftcore.apply(model, "evp", reduction=2, train=["decode_head"])
    own = {f"prompt_generator.{name}": each.numel() for name, each in of_theirs(injection).items()}
    assert {"backbone": own, "decoder": True} == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(own.values()) + size


@against("authors", "evp", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    sizes = {**SEGFORMER, "hidden_sizes": [8, 8, 12, 16]}
    config = peftcore.apply(transformers.SegformerModel(transformers.SegformerConfig(**sizes)), "evp").config
    same_defaults(config, frozen(NUMBERS, "defaults"))


def without_low(x: Tensor, share: float) -> Tensor:
    """Pictures without their low frequencies, by matrices of waves."""

    def waves(n: int) -> tuple[Tensor, Tensor]:
        k = torch.arange(n, dtype=torch.float64) - n // 2
        return torch.exp(-2j * torch.pi * torch.outer(k, torch.arange(n, dtype=torch.float64)) / n), k

    (rows, down), (columns, right) = waves(x.shape[-2]), waves(x.shape[-1])
    line = int((x.shape[-2] * x.shape[-1] * share) ** 0.5 / 2)
    kept = 1 - torch.outer(((down >= -line) & (down < line)).double(), ((right >= -line) & (right < line)).double())
    spectrum = rows @ x.to(torch.complex128) @ columns.T * kept
    return (rows.conj().T @ spectrum @ columns.conj() / (x.shape[-2] * x.shape[-1])).real.abs()


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "timm", "timm_mean", "timm_distilled", "torchvision"])
def test_the_equation(name: str) -> None:
    """Behind class tokens and registers, of pictures that are not square in frequency (share 0.1)."""
    model, base, images = host(name), host(name), pixels().requires_grad_()
    target = [f"{HOSTS[name].blocks}.{path}" for path, _ in base.get_submodule(HOSTS[name].blocks).named_children()]
    injection = peftcore.apply(model, "evp", target=target, share=0.1, dtype="float64")
    fill(injection)
    [stage] = [each for each in injection.operators.values() if isinstance(each, StageOperator)]
    tunes = [each.tune for each in injection.operators.values() if isinstance(each, EVPOperator)]
    up = injection.shared["up_0"]
    assert len(tunes) == 3 and stage.norm is None
    [conv] = [module for module in base.modules() if isinstance(module, nn.Conv2d)]
    k = HOSTS[name].classes

    def expected() -> Tensor:
        tiles = without_low(images, 0.1).unfold(2, 4, 4).unfold(3, 4, 4)  # [batch, 3, 2, 2, 4, 4]
        h = torch.einsum("bcrskl,fckl->brsf", tiles, stage.filter.weight).flatten(1, 2) + stage.filter.bias
        e = conv(images).flatten(2).transpose(1, 2)
        feature = h + e @ stage.embedding.weight.T + stage.embedding.bias
        x = HOSTS[name].embed(base, images)
        for block, tune in zip(base.get_submodule(HOSTS[name].blocks), tunes, strict=True):
            inside = feature @ tune.weight.T + tune.bias
            inside = inside * (1 + torch.erf(inside / 2**0.5)) / 2
            x = torch.cat([x[:, :k], x[:, k:] + inside @ up.weight.T + up.bias], 1)
            x = block(x, None) if name in ("clip", "siglip") else block(x)
        return HOSTS[name].finish(base, x)

    ours, second = HOSTS[name].run(model.train(), images), expected()
    torch.testing.assert_close(ours, second, **CLOSE)
    assert (ours - HOSTS[name].run(base, images)).abs().max() > 1e-3
    learned = [*injection.parameters(), images]
    direction = torch.randn_like(ours)
    found = [torch.autograd.grad((each * direction).sum(), learned) for each in (ours, second)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)
    assert all(each.abs().max() > 1e-6 for each in found[0])


def test_a_part_of_the_blocks() -> None:
    """Stages in front of a target feed it, those behind are left alone."""
    model = segformer()
    injection = peftcore.apply(model, "evp", target="stages.1.blocks.0", reduction=2)
    assert {*injection.operators} == {
        "stages.0.patch_embeddings.proj",
        "stages.1.patch_embeddings.proj",
        "stages.1.blocks.0",
    }
    for parameter in injection.parameters():
        parameter.grad = None
    model(wave((1, 3, 64, 64), "picture")).last_hidden_state.sum().backward()
    assert injection.operators["stages.1.blocks.0"].tune.weight.grad is not None


def test_refused() -> None:
    with pytest.raises(ConfigError, match="takes no overrides"):
        peftcore.apply(host("timm"), "evp", overrides={"blocks.1": {"reduction": 2}})
    with pytest.raises(ConfigError, match="from frequencies or patches"):
        peftcore.apply(host("timm"), "evp", frequencies="none", patches=False)
    with pytest.raises(UnsupportedSite, match="less than reduction=32"):
        peftcore.apply(host("timm"), "evp", reduction=32)
    with pytest.raises(UnsupportedSite, match="no convolution in front"):
        peftcore.apply(SMALL["llama"].build()[0], "evp")
    swin = timm.models.SwinTransformer(img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4)
    with pytest.raises(UnsupportedSite, match="has width"):
        peftcore.apply(swin, "evp")
    model = host("timm")
    peftcore.apply(model, "evp")
    with pytest.raises(UnsupportedSite, match="other tokens than the patches"):
        model.blocks[0](torch.randn(2, 5, 16, dtype=torch.float64))
