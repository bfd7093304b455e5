"""Files of LyCORIS, both ways, with the real LyCORIS on a small UNet: LoRA, DoRA, LoHa and LoKr in all their forms.
OFT and BOFT are in `test_kohya_oft`."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_files import read_by_them, read_into_their_network, theirs, unet
from pipeline_models import assert_same, out
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS

SIZES = {"lora_dim": 2, "conv_lora_dim": 3, "alpha": 3.0, "conv_alpha": 5.0}
FORMS: dict[str, tuple[str, float, dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", 0.1, {}, {}),
    "rslora": ("lora", 0.1, {"rs_lora": True}, {"scaling": "sqrt_rank"}),
    "dora": ("dora", 0.1, {"weight_decompose": True}, {}),
    "loha": ("loha", 0.3, {}, {}),
    "loha-tucker": ("loha", 0.3, {"use_tucker": True}, {"tucker": True}),
    "lokr": ("lokr", 0.3, {}, {}),
    "lokr-tucker": ("lokr", 0.4, {"use_tucker": True, "conv_lora_dim": 1}, {"tucker": True}),
    "lokr-both": ("lokr", 0.4, {"decompose_both": True, "lora_dim": 1, "conv_lora_dim": 1}, {"decompose_both": True}),
    "lokr-factor": ("lokr", 0.3, {"factor": 4}, {"factor": 4}),
    "lokr-full": ("lokr", 0.3, {"full_matrix": True}, {"full_matrix": True}),
}
"""Our method, the width of the noise, their options and ours."""
TELLING = {
    "dora": ["dora_scale"], "loha-tucker": ["hada_t1"], "lokr-tucker": ["lokr_t2"], "lokr-both": ["lokr_w1_a"],
    "lokr-factor": ["lokr_w2_a"],
}  # fmt: skip
"""What shows that a form is what it should be."""
ALGORITHM = {"lora": "locon", "dora": "locon"}


@pytest.mark.share(3)
@pytest.mark.parametrize("form", FORMS)
def test_what_they_wrote(form: str, tmp_path: Path) -> None:
    method, std, options, _ = FORMS[form]
    model, inputs = unet()
    base = deepcopy(model)
    file = tmp_path / "their.safetensors"
    expected = theirs(model, file, std, network_module=ALGORITHM.get(method, method), **{**SIZES, **options})
    injection = peftcore.load(model, file)
    assert injection.method.name == method
    kinds = {name.partition(".")[2] for name in load_file(file)}
    assert any(name in kinds for name in TELLING.get(form, kinds))
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))
    injection.save(tmp_path / "ours")
    again = deepcopy(base)
    assert peftcore.load(again, tmp_path / "ours").config == injection.config
    assert torch.equal(out(again, inputs), out(model, inputs))
    injection.save(tmp_path / "back", format="kohya/lycoris")
    before, after = load_file(file), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        full = {f"{name.partition('.')[0]}.lokr_{each}" for each in ("w1", "w2")} <= before.keys()
        if not (full and name.endswith("alpha")):  # which means nothing there
            torch.testing.assert_close(after[name].view(value.shape), value)


@pytest.mark.parametrize("form", FORMS)
def test_what_they_read(form: str, tmp_path: Path) -> None:
    method, std, options, ours = FORMS[form]
    model, inputs = unet()
    base = deepcopy(model)
    target = ["to_q", "to_k", "to_v", "conv1", "conv2", "proj_in", "net.0.proj"]
    sizes = {**SIZES, **options}
    wide = {"rank": sizes["conv_lora_dim"], "alpha": sizes["conv_alpha"]}
    overrides = {"*.conv?": wide}
    size = {"rank": sizes["lora_dim"], "alpha": sizes["alpha"]}
    injection = peftcore.apply(model, method, target=target, overrides=overrides, **size, **ours)
    for operator in injection.operators.values():
        for name, parameter in operator.named_parameters():
            if name == "magnitude":
                parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                nn.init.normal_(parameter, std=std)
    injection.save(tmp_path, format="kohya/lycoris")
    if form in ("lokr-tucker", "lokr-full"):  # their loader takes the rank of one from the wrong side, see below
        expected = read_into_their_network(base, tmp_path, network_module="lokr", **sizes)
    else:
        expected = read_by_them(base, tmp_path)
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))


def test_dylora_is_lora(tmp_path: Path) -> None:
    """Its network computes with a rank drawn at random; what it saves is loaded as LoRA, by LyCORIS too."""
    model, inputs = unet()
    base = deepcopy(model)
    names = [".*to_[qkv]", ".*net.0.proj"]
    theirs(model, tmp_path / TENSORS, 0.3, names=names, network_module="dylora", lora_dim=8, alpha=3.0)
    expected = read_by_them(base, tmp_path)
    assert peftcore.load(model, tmp_path).method.name == "lora"
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))


def test_dylora_of_convolutions(tmp_path: Path) -> None:
    """LyCORIS saves their second factor flat, which its own loader cannot read."""
    model, inputs = unet()
    base, file = deepcopy(model), tmp_path / "their.safetensors"
    theirs(model, file, 0.1, names=[".*conv[12]"], network_module="dylora", conv_lora_dim=8, conv_alpha=3.0)
    expected, held = deepcopy(base), load_file(file)
    for path, module in expected.named_modules():
        stem = f"lycoris_{path}".replace(".", "_")
        if f"{stem}.alpha" in held:
            down, up = held[f"{stem}.lora_down.weight"], held[f"{stem}.lora_up.weight"]
            module.weight.data += (3.0 / 8 * up @ down.flatten(1)).view(module.weight.shape)
    peftcore.load(model, file)
    assert_same(out(model, inputs), out(expected, inputs), out(base, inputs))


def test_several_methods_in_one_file(tmp_path: Path) -> None:
    """LyCORIS can give each kind of module a method of its own; here two files are put together."""
    pytest.importorskip("peftcore_hybrid")
    model, inputs = unet()
    base, held, updates = deepcopy(model), {}, {}
    for method, wanted in (("loha", "conv1"), ("lokr", "to_q")):
        file = tmp_path / f"{method}.safetensors"
        theirs(model, file, 0.3, network_module=method, **SIZES)
        some = {name: value for name, value in load_file(file).items() if name.partition(".")[0].endswith(wanted)}
        save_file(some, file)
        held |= some
        host = deepcopy(base)
        peftcore.load(host, file).bake()
        updates |= {path: each.weight for path, each in host.named_modules() if path.endswith(wanted)}
    save_file(held, tmp_path / "both.safetensors")
    injection = peftcore.load(model, tmp_path / "both.safetensors")
    assert sorted(part.method.name for part in injection.parts.values()) == ["loha", "lokr"]
    for path, value in updates.items():
        base.get_submodule(path).weight.data.copy_(value)
    assert_same(out(model, inputs), out(base, inputs), out(unet()[0], inputs))


STEM = "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WIDE = "lycoris_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"


@pytest.mark.parametrize(
    ("method", "options", "change", "message"),
    [
        ("loha", {"weight_decompose": True}, {}, "no installed plugin reads alpha, dora_scale, hada_w1_a"),
        ("lokr", {"unbalanced_factorization": True}, {}, "needs the smaller part first"),
        ("locon", {"weight_decompose": True, "wd_on_out": False}, {}, "wd_on_out"),
        ("locon", {"weight_decompose": True, "use_tucker": True}, {}, "no installed plugin reads alpha, dora_scale"),
        ("loha", {}, {f"{STEM}.hada_w2_a": None}, "missing hada_w2_a"),
        ("lokr", {}, {f"{WIDE}.lokr_w2_b": torch.ones(3, 5)}, r"lokr_w2_b has shape \(3, 5\)"),
        ("lokr", {}, {f"{STEM}.lokr_w1": None}, "needs the smaller part first|missing lokr_w1"),
    ],
)
def test_refused(method: str, options: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, inputs = unet()
    file = tmp_path / "their.safetensors"
    theirs(model, file, 0.1, network_module=method, **{**SIZES, **options})
    tensors = load_file(file)
    assert all(name in tensors for name in change)
    save_file({name: value for name, value in (tensors | change).items() if value is not None}, file)
    before = out(model, inputs)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, file)
    assert torch.equal(out(model, inputs), before)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_dropouts_are_noted_in_the_header(method: str, tmp_path: Path) -> None:
    """As sd-scripts notes them, and nothing where there are none."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    options = {"rank_dropout": 0.25, "rank_dropout_scale": True, "module_dropout": 0.125}
    injection = peftcore.apply(deepcopy(model), method, target=["0", "1"], rank=2, **options)
    injection.save(tmp_path / "noted.safetensors", format="kohya")
    again = peftcore.load(deepcopy(model), tmp_path / "noted.safetensors")
    assert {name: getattr(again.config, name) for name in options} == options
    plain = peftcore.apply(deepcopy(model), method, target=["0", "1"], rank=2)
    plain.save(tmp_path / "plain.safetensors", format="kohya")
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    other = peftcore.apply(deepcopy(model), method, target=["0", "1"], rank=2, overrides={"1": {"module_dropout": 0.5}})
    with pytest.raises(ExportError, match="the same dropouts for all modules"):
        other.save(tmp_path / "differs", format="kohya")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"ss_network_dropout": "0.1"}, "dropout = 0.1"),
        (
            {"ss_network_args": '{"rank_dropout": "0.2", "module_dropout": "0.3"}'},
            "rank_dropout = 0.2, module_.* = 0.3",
        ),
    ],
)
def test_dropouts_that_ours_has_not_are_told(header: dict[str, str], said: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    peftcore.apply(deepcopy(model), "lora", target="0", rank=2).save(tmp_path / "a.safetensors", format="kohya")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "noted.safetensors", metadata=header)
    with pytest.warns(UserWarning, match=f"was trained with {said}, which lora does not support in this form"):
        peftcore.load(model, tmp_path / "noted.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {"ss_network_dropout": "None", "ss_network_args": "{}"},
        {"ss_network_dropout": "0", "ss_network_args": '{"conv_dim": "4", "rank_dropout": "0.0"}'},
        {"ss_network_args": "not valid JSON"},
        {"ss_network_args": "[1]", "ss_network_dropout": "often"},
        {"ss_network_args": '{"module_dropout": "nan", "rank_dropout": "7"}'},
    ],
)
def test_headers_without_any_are_passed_over(header: dict[str, str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    peftcore.apply(deepcopy(model), "loha", target="0", rank=2).save(tmp_path / "a.safetensors", format="kohya")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "noted.safetensors", metadata=header)
    config: Any = peftcore.load(model, tmp_path / "noted.safetensors").config
    assert (config.rank_dropout, config.module_dropout) == (0.0, 0.0)
