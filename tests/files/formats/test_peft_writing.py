"""Folders of peft from our injections: names of modules, options for all, targets."""

from pathlib import Path

import pytest
import torch
from core_toys import transformer
from torch import nn

import peftcore
from peftcore.author import Site
from peftcore.errors import ExportError
from peftcore.files.formats.peft_writing import common, is_parameter, module_key, stem_of, targets


def sites_of(model: nn.Module, target: str) -> tuple[Site, ...]:
    return tuple(peftcore.plan(model, "lora", target=target).sites)


def test_a_layer_is_wrapped_as_a_module() -> None:
    (site, *_) = sites_of(transformer(), "q_proj")
    assert module_key(site) == stem_of(site, [site]) == "layers.0.self_attn.q_proj" and not is_parameter(site)


def test_the_attention_around_an_out_proj_is_wrapped() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    (site,) = sites_of(model, "attn.out")
    assert module_key(site) == "0" and stem_of(site, [site]) == "0.base_layer.out_proj"


def test_parts_of_a_fused_projection_are_refused() -> None:
    (site,) = sites_of(nn.Sequential(nn.MultiheadAttention(4, 2)), "attn.q")
    with pytest.raises(ExportError, match="part of a fused projection"):
        module_key(site)


class Experts(nn.Module):
    """Two stacks in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (
            nn.Parameter(nn.Linear(4, 6).weight[None]),
            nn.Parameter(nn.Linear(6, 4).weight[None]),
        )


def test_parameters_of_one_module_are_wrapped_one_round_the_other() -> None:
    model = nn.ModuleDict({"experts": Experts()})
    sites = [site for name in ("up_proj", "down_proj") for site in sites_of(model, f"experts.{name}")]
    assert all(map(is_parameter, sites)) and [module_key(s) for s in sites] == ["experts.up_proj", "experts.down_proj"]
    assert [stem_of(site, sites) for site in sites] == ["experts.base_layer", "experts"]


def test_what_differs_goes_into_patterns() -> None:
    options = {"a": {"r": 8, "bias": "none"}, "b": {"r": 8, "bias": "none"}, "c": {"r": 2, "bias": "none"}}
    patterns = {"rank_pattern": "r"}
    found = common(options, patterns, lambda path, paths: f"^{path}")
    assert found == {"bias": "none", "r": 8, "rank_pattern": {"^c": 2}}
    options["c"]["bias"] = "all"
    with pytest.raises(ExportError, match="peft has one bias for all modules"):
        common(options, patterns, lambda path, paths: path)


@pytest.mark.parametrize(
    ("target", "modules"),
    [("q_proj", ["q_proj"]), (["layers.0.self_attn.q_proj"], ["layers.0.self_attn.q_proj"])],
)
def test_last_names_where_they_mean_no_other_module(target: str | list[str], modules: list[str]) -> None:
    injection = peftcore.apply(transformer(), "lora", target=target)
    assert targets(injection, injection.grafts) == {"target_modules": modules}


CLASSES = {
    "CausalLM": ("lora", {"rank": 2}),
    "SequenceClassification": ("lora", {"rank": 2, "train": ["score"]}),
    "FeatureExtraction": ("oft", {"block_size": 4}),
    "CausalLM-prompt": ("prompt_tuning", {"length": 3}),
}


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("name", CLASSES)
def test_autopeftmodel_opens_what_is_written(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    method, options = CLASSES[name]
    kind = name.partition("-")[0]
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    auto = transformers.AutoModel if kind == "FeatureExtraction" else getattr(transformers, f"AutoModelFor{kind}")
    auto.from_config(config).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    injection = peftcore.apply(model, method, **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    injection.save(tmp_path / "adapter", format="peft")
    theirs = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 1, 2]])
    with torch.no_grad():
        ours, there = model(ids)[0], theirs(input_ids=ids)[0]
        base = auto.from_pretrained(tmp_path / "base")(ids)[0]
    torch.testing.assert_close(ours, there[:, -ours.shape[1] :] if ours.dim() == 3 else there)
    assert not torch.allclose(ours, base, atol=1e-3)
    if method == "lora" and kind == "CausalLM":
        opened = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(opened(input_ids=ids)[0], ours)
