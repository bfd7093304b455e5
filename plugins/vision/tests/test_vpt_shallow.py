"""VPT-shallow: the authors' class, the equation on seven hosts, where the prompt is and where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vpt_equations import HOSTS, authors_numbers, compare, host, pixels, prompted, timm

import peftcore
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as KIT
from peftcore_vision._prompts import PromptOperator

CODE: Any = {"repository": "KMnP/vpt", "commit": "4410440", "script": "src/models/vit_prompt/vit.py"}
NUMBERS = Path(__file__).parent / "numbers" / "vpt.json"


@conformance("vpt_shallow", hosts=["vit", "dit"])  # the kit's other hosts have does not process patches of an image
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("projection", [None, 6])
@against("authors", "vpt_shallow", **CODE)
def test_the_authors_class_with_the_same_numbers(projection: int | None) -> None:
    expected = torch.tensor(frozen(NUMBERS)["shallow"][str(projection)], dtype=torch.float64)
    torch.testing.assert_close(authors_numbers("vpt_shallow", projection), expected, rtol=1e-11, atol=1e-11)


@against("authors", "vpt_shallow", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Prompts with and without a map, and the map, whose biases are few in one model."""

    def start(projection: int | None, length: int, seed: int = 0) -> list[Any]:
        injection = peftcore.apply(
            host("timm"), "vpt_shallow", length=length, projection=projection, train_head=False, seed=seed
        )
        return [*injection.operators.values(), *injection.shared.values()]

    told = frozen(NUMBERS, "start")["shallow"]
    same_start(start(None, 2500)[0].prompt, told["first"])
    first, *_, linear = start(1000, 40)
    same_start(first.prompt, told["projected"])
    same_start(linear.weight, told["weight"])
    same_start(torch.cat([start(1000, 1, seed)[-1].bias for seed in range(260)]), told["bias"])


@against("authors", "vpt_shallow", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(host("timm"), "vpt_shallow")
    (prompt,) = (each.prompt for each in injection.operators.values() if isinstance(each, PromptOperator))
    found = {"enc.transformer.prompt_embeddings": prompt.numel()}
    head = injection.model.head.named_parameters()
    found |= {f"head.last_layer.{name}": each.numel() for name, each in head}
    assert found == frozen(NUMBERS, "trains")["shallow"]
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "vpt_shallow", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("timm"), "vpt_shallow").config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize("name", HOSTS)
def test_the_equation(name: str) -> None:
    """Also in the smaller tower of a model of images and texts."""
    model = host(name)
    injection, prompts = prompted(model, "vpt_shallow")
    assert list(injection.operators) == [f"{HOSTS[name].blocks}.{'encoder_layer_' * (name == 'torchvision')}0"]
    compare(name, model, prompts)


def test_two_prompts_are_one_of_both() -> None:
    model = host("timm")
    (one,), (other,) = prompted(model, "vpt_shallow", name="one")[1], prompted(model, "vpt_shallow", name="other")[1]
    peftcore.activate(model, "one", "other")
    together, joined = model(pixels()), host("timm")
    with torch.no_grad():
        prompted(joined, "vpt_shallow", length=8)[1][0].copy_(torch.cat([one, other]))
    torch.testing.assert_close(together, joined(pixels()), rtol=1e-10, atol=1e-10)


def test_it_can_enter_later_beside_another() -> None:
    model, base, images = host("timm"), host("timm"), pixels()
    (early,) = prompted(model, "vpt_shallow", name="early")[1]
    (late,) = prompted(model, "vpt_shallow", name="late", length=3, target=["blocks.1", "blocks.2"])[1]
    peftcore.activate(model, "early", "late")
    x = base._pos_embed(base.patch_embed(images))
    x = base.blocks[0](torch.cat([x[:, :1], early.expand(2, -1, -1), x[:, 1:]], 1))
    x = base.blocks[2](base.blocks[1](torch.cat([x[:, :1], late.expand(2, -1, -1), x[:, 1:]], 1)))
    torch.testing.assert_close(model(images), base.head(base.norm(x)[:, 0]), rtol=1e-10, atol=1e-10)
    assert model.forward_features(images).shape[1] == 5


def test_dropout_drops_numbers_of_the_prompt_for_each_image() -> None:
    model = host("timm")
    _, (prompt,) = prompted(model, "vpt_shallow", dropout=0.5)
    seen: list[torch.Tensor] = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -4:]))
    model(pixels())
    assert torch.equal(seen[0], prompt.expand(2, -1, -1))
    model.train()(pixels())
    kept = seen[1] != 0
    assert torch.equal(seen[1], torch.where(kept, 2 * prompt, 0))
    assert 0.2 < kept.double().mean() < 0.8 and not torch.equal(kept[0], kept[1])


def test_between_the_blocks_it_stands_behind_the_tokens() -> None:
    model = host("vit")
    length = model(pixels(), output_hidden_states=True).hidden_states[0].shape[1]
    prompted(model, "vpt_shallow")
    states = model(pixels(), output_hidden_states=True).hidden_states
    assert [state.shape[1] - length for state in states] == [0, 4, 4, 0]


def test_the_smaller_tower_is_found_again(tmp_path: Path) -> None:
    model, fresh, run = host("clip"), host("clip"), HOSTS["clip"].run
    prompted(model, "vpt_shallow")[0].save(tmp_path)
    peftcore.load(fresh, tmp_path)
    assert torch.equal(run(fresh, pixels()), run(model, pixels()))


REFUSED = {
    "swin_tiny_patch4_window7_224": "a position for each of its tokens",
    "beit_base_patch16_224": "a position for each of its tokens",
    "eva02_tiny_patch14_224": "rotary positions",
    "xcit_nano_12_p8_224": "for a convolution",
    "mixer_s32_224": "no attention",
    "hiera_tiny_224": "tokens merge",
    "resnet18": "no attention",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_tokens_that_are_no_set_are_refused(method: str, name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedSite, match=REFUSED[name]):
        peftcore.plan(model, method)


def test_where_else_it_cannot_be() -> None:
    with pytest.raises(UnsupportedSite, match="through all later ones"):
        peftcore.apply(host("timm"), "vpt_shallow", target=["blocks.0", "blocks.1"])
    with pytest.raises(UnsupportedSite, match="not a block"):
        peftcore.apply(host("timm"), "vpt_shallow", target="blocks.0.attn")
    with pytest.raises(UnsupportedSite, match="tokens of a text"):
        peftcore.apply(host("clip"), "vpt_shallow", target="re:text_model.encoder.layers.[012]")
    with pytest.raises(UnsupportedSite, match="does not process patches of an image"):
        peftcore.apply(KIT["encoder"].build()[0], "vpt_shallow")
    model = host("vit")
    peftcore.apply(model, "vpt_shallow")
    with pytest.raises(SequenceError, match="a mask or positions for each token"):
        model.vit(pixels(), attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2))
