"""VPT-deep: the authors' class, the equation on seven hosts, and hidden states that keep their shape."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_hosts import dit_host, joined
from vpt_equations import HOSTS, authors_numbers, compare, host, pixels, prompted, timm

import peftcore
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as KIT
from peftcore_vision._prompts import PromptOperator

CODE: Any = {"repository": "KMnP/vpt", "commit": "4410440", "script": "src/models/vit_prompt/vit.py"}
NUMBERS = Path(__file__).parent / "numbers" / "vpt.json"


@conformance("vpt_deep", hosts=["vit", "dit"])  # the kit's other hosts have no image in patches
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("projection", [None, 6])
@against("authors", "vpt_deep", **CODE)
def test_the_authors_class_with_the_same_numbers(projection: int | None) -> None:
    expected = torch.tensor(frozen(NUMBERS)["deep"][str(projection)], dtype=torch.float64)
    torch.testing.assert_close(authors_numbers("vpt_deep", projection), expected, rtol=1e-11, atol=1e-11)


@against("authors", "vpt_deep", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Prompts with and without a map, and the map, whose biases are few in one model."""

    def start(projection: int | None, length: int, seed: int = 0) -> list[Any]:
        injection = peftcore.apply(
            host("timm"), "vpt_deep", length=length, projection=projection, train_head=False, seed=seed
        )
        return [*injection.operators.values(), *injection.shared.values()]

    told = frozen(NUMBERS, "start")["deep"]
    own = [each.prompt for each in start(None, 2500)]
    same_start(own[0], told["first"])
    same_start(torch.stack(own[1:]), told["later"])
    first, *_, linear = start(1000, 40)
    same_start(first.prompt, told["projected"])
    same_start(linear.weight, told["weight"])
    same_start(torch.cat([start(1000, 1, seed)[-1].bias for seed in range(260)]), told["bias"])


@against("authors", "vpt_deep", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(host("timm"), "vpt_deep")
    first, *later = (each.prompt.numel() for each in injection.operators.values() if isinstance(each, PromptOperator))
    found = {"enc.transformer.prompt_embeddings": first, "enc.transformer.deep_prompt_embeddings": sum(later)}
    head = injection.model.head.named_parameters()
    found |= {f"head.last_layer.{name}": each.numel() for name, each in head}
    assert found == frozen(NUMBERS, "trains")["deep"]
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "vpt_deep", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("timm"), "vpt_deep").config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize("name", HOSTS)
def test_the_equation(name: str) -> None:
    model = host(name)
    _, prompts = prompted(model, "vpt_deep")
    assert len(prompts) == 3
    compare(name, model, prompts)


def test_two_of_them_are_one_of_both() -> None:
    """And a shallow one beside them goes through all blocks."""
    model, joined = host("timm"), host("timm")
    _, one = prompted(model, "vpt_deep", name="one")
    prompted(model, "vpt_shallow", name="shallow", seed=1)
    _, other = prompted(model, "vpt_deep", name="other", seed=2)
    _, both = prompted(joined, "vpt_deep", length=8, name="both")
    prompted(joined, "vpt_shallow", name="shallow", seed=1)
    peftcore.activate(model, "one", "shallow", "other")
    peftcore.activate(joined, "both", "shallow")
    with torch.no_grad():
        for prompt, *parts in zip(both, one, other, strict=True):
            prompt.copy_(torch.cat(parts))
    torch.testing.assert_close(model(pixels()), joined(pixels()), rtol=1e-10, atol=1e-10)


def test_blocks_without_one_see_the_hosts_tokens_alone() -> None:
    model, base = host("timm"), host("timm")
    injection, (prompt,) = prompted(model, "vpt_deep", target="blocks.1")
    assert list(injection.operators) == ["blocks.1"]
    x = base.blocks[0](base._pos_embed(base.patch_embed(pixels())))
    x = base.blocks[1](torch.cat([x[:, :1], prompt.expand(2, -1, -1), x[:, 1:]], 1))
    x = base.blocks[2](torch.cat([x[:, :1], x[:, 5:]], 1))
    torch.testing.assert_close(model(pixels()), base.head(base.norm(x)[:, 0]), rtol=1e-10, atol=1e-10)


def test_hidden_states_keep_their_shape() -> None:
    model, fresh = host("vit"), host("vit")
    prompted(model, "vpt_deep")
    shapes = [[h.shape for h in each(pixels(), output_hidden_states=True).hidden_states] for each in (fresh, model)]
    assert shapes[0] == shapes[1]
    model = host("timm")
    prompted(model, "vpt_deep")
    last, grids = model.forward_intermediates(pixels(), norm=True)
    assert [grid.shape for grid in grids] == [(2, 16, 2, 2)] * 3
    torch.testing.assert_close(last[:, 1:].mT.reshape(2, 16, 2, 2), grids[-1], rtol=1e-10, atol=1e-10)


def test_one_map_serves_all_blocks() -> None:
    injection = peftcore.apply(host("timm"), "vpt_deep", length=4, projection=6, train_head=False)
    assert sum(p.numel() for p in injection.parameters()) == 3 * 4 * 6 + (6 + 1) * 16
    assert list(injection.shared) == ["projection_6_16"]


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_the_head_trains_along_but_not_what_images_share_with_texts(method: str) -> None:
    heads = {"vit": {"classifier", "classifier.bias"}, "clip": set(), "siglip": set()}
    heads["timm_distilled"] = {"head", "head.bias", "head_dist", "head_dist.bias"}
    diffusion = peftcore.apply(KIT["dit"].build()[0], method)
    assert all(path.startswith("transformer_blocks") for path in diffusion.operators)
    for name, expected in heads.items():
        injection = peftcore.apply(host(name), method)
        found = {path for path in injection.operators if HOSTS[name].blocks not in path}
        assert found == expected
        assert all(p.requires_grad for path in found for p in injection.operators[path].parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "timm"])
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_blocks_that_run_again(method: str, name: str, reentrant: bool) -> None:
    gradients, before = [], timm.layers.use_reentrant_ckpt()
    for again in (False, True):
        model = host(name).train()
        _, prompts = prompted(model, method, dropout=0.2)
        if again and name == "vit":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        elif again:
            model.set_grad_checkpointing()
        torch.manual_seed(0)
        try:
            timm.layers.set_reentrant_ckpt(reentrant)
            HOSTS[name].run(model, pixels().requires_grad_()).square().sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(before)
        gradients.append([prompt.grad for prompt in prompts])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients[0])


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_rows_in_the_sequence_of_diffusion_transformers(method: str, name: str) -> None:
    """They have no positions, and leave behind the last block, or with vpt_deep behind each."""
    base, given = dit_host(name)
    model, blocks = deepcopy(base), 4 if name == "flux" else 2
    injection = peftcore.apply(model, method, length=3, projection=6, dtype="float64")
    (prompt,) = (each for each in injection.operators.values() if any(True for _ in each.parameters()))
    shared = injection.shared["projection_6_16"]
    sizes = (blocks, 3, 6) if method == "vpt_deep" else (3, 6)
    assert prompt.prompt.shape == sizes
    assert sum(each.numel() for each in injection.parameters()) == prompt.prompt.numel() + 7 * 16
    rows = shared(prompt.prompt)
    output = model(**given).sample
    with joined(base, dict(enumerate(rows)) if method == "vpt_deep" else {0: rows}):
        expected = base(**given).sample
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert (expected - base(**given).sample).abs().max() > 1e-2
    ours, wanted = (torch.autograd.grad(each.square().sum(), prompt.prompt)[0] for each in (output, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)  # SD3's norms are in float32


def test_blocks_of_a_diffusion_transformer_that_are_left_out() -> None:
    base, given = dit_host("pixart")
    model = deepcopy(base)
    injection = peftcore.apply(model, "vpt_deep", target="transformer_blocks.1", length=3, dtype="float64")
    (rows,) = injection.parameters()
    with joined(base, {1: rows[0]}):
        expected = base(**given).sample
    torch.testing.assert_close(model(**given).sample, expected, rtol=1e-9, atol=1e-9)
