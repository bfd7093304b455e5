"""By name alone, without a target, the methods that are tried first stand in every architecture, act and train there:
all hosts whose roles are known by hand, all others of the survey, and thirty more (`more_hosts.OTHERS`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import more_hosts
import pytest
import torch
from host_zoo import EXTRA, SURVEY
from model_outputs import floats
from more_hosts import NAMED, OTHERS
from slowly import quick
from torch import Tensor, nn

import peftcore
from peftcore.errors import InactiveSite, TargetError, UnsupportedSite
from peftcore.testing.kit import fill

torch.set_num_threads(1)

METHODS = ("lora", "dora", "ia3", "bitfit", "houlsby_adapter")
QUICK = (
    "llama",
    "mixtral",
    "mamba",
    "bert_cls",
    "t5",
    "timm_vit",
    "timm_eva02",
    "timm_convnext",
    "timm_resnet18",
    "timm_mobilenetv3",
    "timm_mixer",
    "sd15_unet",
    "vae_kl",
    "poolformer_hf",
)
"""Hosts on which `make test` trains; `make test-slow` has the others. On a quarter of all it plans too."""
HOSTS = [*SURVEY, *EXTRA, *NAMED, *OTHERS]
UNUSED: Mapping[tuple[str, str], str] = {
    ("detr", "self_attn.v_proj"): "the queries of the first layer are zero",
    ("sam", "mask"): "of a prompt without a mask nothing is embedded, and one mask of several is returned",
    ("llava", "post_layernorm"): "the projector takes hidden states from between the blocks",
    ("gemma3", "vision_tower.head"): "tokens are taken from before the head",
    ("sd3", "add_q_proj"): "the last block drops the text",
    ("sd3", "norm_added_q"): "likewise",
    ("xlnet", "r_s_bias"): "there are no segments in the input",
    ("switch", "experts"): "an expert may get no token",
    ("poolformer_hf", "before_norm"): "the mean of neighbours minus the token itself is nothing of a constant",
    ("timm_poolformer_s12", "norm1"): "likewise",
    ("big_bird", "pooler"): "the head reads no pooled token",
    ("squeezebert", "pooler"): "likewise",
    ("fnet", "pooler"): "likewise",
    ("cvt", "stages.2.layers.2.attention.attention.convolution_projection_query"): "the last layer asks for one token",
    ("mobilebert", "cls.predictions.bias"): "a second name of the decoder's bias",
    ("mochi", "transformer_blocks.1.attn1"): "the last block drops the text",
    ("qwen_image", "transformer_blocks.1."): "likewise",
    ("dpt", "dpt.layernorm"): "the neck reads what is before it",
    ("dpt", "fusion_stage.layers.0.residual_layer1"): "the first fusion has nothing to add",
    ("timm_maxvit", "rel_pos.mlp.fc2.bias"): "added to all keys alike it changes no softmax, only rounding moves it",
    ("autoencoder_tiny", "encoder"): "the forward rounds latents to bytes",
}
"""Sites that the example inputs leave without a gradient, by a part of their paths, with reasons."""
KNOWN: Mapping[tuple[str, str], str] = {
    ("esm", "bitfit"): "the head for contacts runs only where these are asked for: the error says so",
    (
        "wav2vec2_conformer",
        "bitfit",
    ): "the convolution for positions does not run beside rotary ones",
    ("mobilevit", "houlsby_adapter"): "noise in the place of all gains makes 1e33 of this host of random numbers",
    ("dbrx", "houlsby_adapter"): "the rows of all experts are one matrix, whose height is not the width of what comes "
    "out of it: the error says to exclude it",
}
"""Pairs of a host and a method that do not train by name alone, with reasons."""
REFUSED = {("dbrx", "houlsby_adapter")}
"""Those that are refused before anything changes."""
GLOBAL = {"global_attention_mask": torch.eye(16)[:1].expand(2, 16)}
TRAINING: Mapping[str, Mapping[str, Any]] = {"rwkv": {"use_cache": False}, "longformer": GLOBAL, "led": GLOBAL}
"""Arguments with which hosts are trained: states are written in place otherwise, and no token has global attention."""
FAINT = ("dpt", "mobilevit", "timm_mobileone_s0")
"""Hosts of which the random numbers that they begin with let nothing through, or make 1e29 of it."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A host whose zeros are numbers, as in a trained one: heads, gates and scales, behind which nothing would show."""
    model, inputs = more_hosts.build(name)
    inputs |= TRAINING.get(name, {})
    generator = torch.Generator().manual_seed(0)
    if name in FAINT:
        awaken(model, inputs, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-4:
                parameter.normal_(0, 0.1, generator=generator)
    return model, inputs


@torch.no_grad()
def awaken(model: nn.Module, inputs: dict[str, Any], generator: torch.Generator) -> None:
    """Give matrices the variance that keeps that of their inputs, biases a positive value, and norms of batches the
    statistics of these inputs."""
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
        elif path.endswith("bias"):
            parameter.fill_(0.1)
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    outputs(model, inputs)
    for norm in norms:
        norm.eval()


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(floats(model(**inputs)))


def has_biases(model: nn.Module) -> bool:
    return any(
        name.endswith("bias") for module in model.modules() for name, p in module._parameters.items() if p is not None
    )


def applied(name: str, model: nn.Module, method: str, verb: Any = peftcore.apply) -> Any:
    """The injection; None where there are no biases to train, of which a typed error tells."""
    if method == "bitfit" and not has_biases(model):
        with pytest.raises(TargetError, match=r"has no biases, .* add_missing_bias=True"):
            verb(model, method)
        return None
    return verb(model, method)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", quick(HOSTS, {*QUICK, *HOSTS[::4]}))
def test_each_of_them_has_a_place(name: str) -> None:
    model, _ = build(name)
    for method in METHODS:
        if (name, method) in REFUSED:
            with pytest.raises(UnsupportedSite):
                applied(name, model, method, peftcore.plan)
            continue
        plan = applied(name, model, method, peftcore.plan)
        assert plan is None or (plan.sites and plan.trainable), (method, plan)
        assert plan is None or len(plan.notes) <= 3


def trains(name: str, method: str, **options: Any) -> str:
    """What is wrong with it; nothing if the method acts, every operator has a gradient, and the loss goes down."""
    model, inputs = build(name)
    with torch.no_grad():
        base = outputs(model, inputs)
    injection = applied(name, model, method, partial(peftcore.apply, **options))
    if injection is None:
        return ""
    fill(injection)
    optimizer = torch.optim.Adam(injection.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        found = outputs(model, inputs)
        if not step and all(map(torch.equal, found, base)):
            return "changes nothing"
        loss = torch.stack([each.float().square().mean() for each in found if each.requires_grad]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        idle = [
            path for path, operator in injection.operators.items() if not any(map(has_gradient, operator.parameters()))
        ]
        if left := [path for path in idle if not any(host == name and part in path for host, part in UNUSED)]:
            return f"no gradient at {left}"
        optimizer.step()
    return "" if min(losses) < losses[0] else f"does not learn: {losses}"


def has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def check(name: str) -> None:
    wrong = dict[str, str]()
    for method in METHODS:
        try:
            how = trains(name, method)
        except (InactiveSite, UnsupportedSite, RuntimeError) as error:
            how = str(error)
        if how:
            wrong[method] = how
    assert wrong.keys() == {method for host, method in KNOWN if host == name}, wrong


@pytest.mark.share(3)
@pytest.mark.parametrize("name", QUICK)
def test_each_of_them_acts_and_trains(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HOSTS if name not in QUICK])
def test_each_of_them_acts_and_trains_everywhere(name: str) -> None:
    check(name)


MIXTURES = ("mixtral", "gpt_oss", "llama4", "dbrx", "jetmoe", "deepseek_v3", "nemotron_h", "qwen3_next", "jamba")


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_trains_the_experts_of_mixtures(name: str) -> None:
    model, _ = build(name)
    found = {f"{site.module_path}.{site.tensor}" for site in peftcore.plan(model, "lora", target="all-linear").sites}
    stacks = {path for path, each in model.named_parameters() if "expert" in path and each.dim() > 1}
    assert {path for path in stacks if not re.search("bias|router|expert_gate", path)} <= found
    assert not trains(name, "lora", target="all-linear")


def test_thirty_hosts_are_in_no_survey() -> None:
    assert len(OTHERS) >= 30 and not set(OTHERS) & {*SURVEY, *EXTRA, *NAMED}
    assert len(set(HOSTS)) == len(HOSTS)
