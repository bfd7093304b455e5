"""Partial-k: the kit, which tensors train, where backward ends, and ten steps beside training the same in place."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_in_place import OPTIMIZERS, masked_bert
from test_in_place import test_ten_steps_end_where_training_in_place_ends as trains_as_in_place
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import against, conformance, frozen, same_defaults
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "vpt_transfer.json"
CODE: Any = {"repository": "KMnP/vpt", "commit": "4410440", "script": "src/models/vit_models.py"}
TOPS = {
    "llama": ("model.layers.1.", "model.norm.", "lm_head."),
    "bert": ("bert.encoder.layer.1.", "classifier."),
    "gpt2": ("transformer.h.1.", "transformer.ln_f."),  # its head is the table of tokens
    "t5": ("encoder.block.1.", "decoder.block.1.", "encoder.final_layer_norm.", "decoder.final_layer_norm."),
    "vit": ("vit.layers.1.", "vit.layernorm.", "classifier."),
}
"""What trains at k = 1."""
MOVED = "torch cuts the ties of a host that moves to the meta device, so a head that was tied is none any more"


@conformance(
    "partial_k",
    expected_failures={
        **{f"a_host_without_memory_can_be_planned-{name}": MOVED for name in ("gpt2", "t5")},
    },
)
def test_partial_k(check: Callable[[], None]) -> None:
    check()


def tensors(model: nn.Module, starts: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(starts)]


@pytest.mark.parametrize("host", TOPS)
def test_ten_steps(host: str) -> None:
    trains_as_in_place("partial_k", host, lambda model: tensors(model, TOPS[host]), OPTIMIZERS["adamw"])


@pytest.mark.parametrize("host", TOPS)
def test_options_say_what_trains(host: str) -> None:
    model, _ = HOSTS[host].build()
    block = tuple(start for start in TOPS[host] if ".1." in start)
    both = tuple(start.replace(".1.", f".{number}.") for start in block for number in (0, 1))
    for starts, options in ((block, {}), (both, {"k": 2})):
        expected = sum(model.get_parameter(name).numel() for name in tensors(model, starts))
        assert peftcore.plan(model, "partial_k", final_norm=False, head=False, **options).trainable == expected


@against("authors", "partial_k", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    timm, kinds = pytest.importorskip("timm"), {"partial-1": {}, "partial-2": {"k": 2}}
    numbers, sizes = (
        frozen(NUMBERS, "trains"),
        {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
    )
    for kind, options in kinds.items():
        model = timm.models.VisionTransformer(**sizes, num_classes=3)
        sites = peftcore.apply(model, "partial_k", **options).sites
        assert {f"{site.module_path}.{site.tensor}" for site in sites} == set(numbers[kind])


@against("authors", "partial_k", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(HOSTS["encoder"].build()[0], "partial_k").config, frozen(NUMBERS, "defaults"))


def test_backward_ends_below_the_last_blocks() -> None:
    """Nothing below needs gradients, so nothing is kept there for backward."""
    model, inputs = HOSTS["llama"].build()
    peftcore.apply(model, "partial_k")
    needs: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: needs.append(_tensor(output).requires_grad))
    model(**inputs)
    assert needs == [False, True]


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_a_tied_head_stays_but_its_bias_trains() -> None:
    model, _ = masked_bert()
    operators = peftcore.apply(model, "partial_k").operators
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table
    assert "cls.predictions.decoder.bias" in operators
    assert not any(operator.value.shape == table.shape for operator in operators.values())


def test_the_target_says_what_of_it_trains() -> None:
    model, _ = HOSTS["bert"].build()
    linear = peftcore.plan(model, "partial_k", target="all-linear")
    assert {site.module_path.partition(".layer.1.")[0] for site in linear.sites} == {"bert.encoder"}
    assert linear.trainable == 4 * (16**2 + 16) + 2 * 16 * 24 + 16 + 24
    assert peftcore.plan(model, "partial_k", target="classifier").trainable == 3 * (16 + 1)


def test_the_stages_of_a_pyramid_are_one_stack() -> None:
    sizes = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 4, "window_size": 2}
    config = transformers.SwinConfig(**sizes, depths=[2, 1], num_heads=[1, 1], num_labels=3)
    model = transformers.SwinForImageClassification(config)
    paths = [site.module_path for site in peftcore.plan(model, "partial_k", k=2, head=False, final_norm=False).sites]
    assert {re.search(r"layers\.\d\.blocks\.\d", path).group() for path in paths} == {
        "layers.0.blocks.1",
        "layers.1.blocks.0",
    }


def test_the_main_tower_alone_unless_a_target_names_another() -> None:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**text, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config={**text, "vocab_size": 40}, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    inside = [site.module_path for site in peftcore.plan(model, "partial_k", head=False, final_norm=False).sites]
    assert inside
    assert all(path.startswith("text_model.encoder.layers.2.") for path in inside)
    other = peftcore.plan(model, "partial_k", target="vision_model.encoder.layers.*.layer_norm1").sites
    assert {site.module_path for site in other} == {"vision_model.encoder.layers.1.layer_norm1"}


def test_more_blocks_than_there_are() -> None:
    model, _ = HOSTS["bert"].build()
    with pytest.raises(TargetError, match=r"k=3, but .* at most 2 blocks"):
        peftcore.apply(model, "partial_k", k=3)
