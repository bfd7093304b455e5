"""LoRA files in the names of the original code of Flux, Wan and Qwen-Image, beside what diffusers makes of them.

Diffusers 0.42 reads of Flux what is in its blocks: it takes apart ``linear1`` at its real width alone, loses what is
around the blocks, whose names it gives no model, and takes the last layer's alpha for the rank. Of Wan it reads alphas
in blocks alone, and of musubi's files whole blocks. The rest is checked by the equation.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import FORMS, MODELS, names_of, pipeline, write
from pipeline_models import assert_same, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya import TENSORS
from peftcore.files.save_load import describe

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:::(peft|diffusers|transformers)")
QKV = "transformer_blocks.0.attn.to_{}"


def everything(name: str) -> bool:
    return "processor" not in name


def in_blocks(name: str) -> bool:
    """What diffusers finds of a small model."""
    return "blocks." in name and everything(name) and "linear1" not in name


def of_xlabs(name: str) -> bool:
    return "processor" in name


CASES: list[tuple[str, str, Callable[[str], bool]]] = [
    ("flux", "kohya", in_blocks),
    ("flux", "comfyui", in_blocks),
    ("flux", "xlabs", of_xlabs),
    ("wan", "kohya", in_blocks),
    ("wan", "comfyui", in_blocks),
    ("wan", "peft", everything),
    ("wan_from_images", "kohya", in_blocks),
    ("wan_from_images", "peft", everything),
    ("qwen_image", "kohya", everything),
    ("qwen_image", "comfyui", everything),
    ("qwen_image", "peft", everything),
    ("qwen_image", "bare", everything),
]


@pytest.mark.share(3)
@pytest.mark.parametrize(("kind", "form", "wanted"), CASES, ids=[f"{kind}-{form}" for kind, form, _ in CASES])
def test_beside_diffusers(kind: str, form: str, wanted: Callable[[str], bool], tmp_path: Path) -> None:
    """The same numbers; and our files of it, in each form that diffusers reads."""
    model, inputs = MODELS[kind].build()
    names = {name: original for name, original in names_of(model).items() if wanted(name)}
    write(model, tmp_path / "their.safetensors", form, names)
    base, pipe = out(model, inputs), pipeline(kind, deepcopy(model))
    pipe.load_lora_weights(tmp_path / "their.safetensors")
    host = deepcopy(model)
    injection = peftcore.load(host, tmp_path / "their.safetensors")
    assert injection.method.name == "lora"
    assert {site.module_path for site in injection.sites} == {path for each in names.values() for path in each.paths}
    ours = out(host, inputs)
    assert_same(ours, out(pipe.transformer, inputs), base)
    formats = ["diffusers"] if wanted is not in_blocks and kind != "qwen_image" else [
        "diffusers", "kohya", "kohya/diffusion_model",
    ]  # fmt: skip
    for format in formats:
        injection.save(tmp_path / "ours.safetensors", format=format)
        pipe = pipeline(kind, deepcopy(model))
        pipe.load_lora_weights(tmp_path / "ours.safetensors")
        assert_same(out(pipe.transformer, inputs), ours, base)
        again = deepcopy(model)
        peftcore.load(again, tmp_path / "ours.safetensors")
        assert_same(out(again, inputs), ours, base)


@torch.no_grad()
def with_biases(path: Path) -> dict[str, Tensor]:
    """Add to a file what is added to the biases of its modules."""
    tensors = load_file(path)
    for name, value in list(tensors.items()):
        if name.endswith(".lora_up.weight"):
            tensors[name.replace("lora_up.weight", "diff_b")] = 0.3 * torch.randn(len(value))
    save_file(tensors, path)
    return tensors


def test_biases_of_wan_beside_diffusers(tmp_path: Path) -> None:
    """Both ways; they are trained along here."""
    model, inputs = MODELS["wan"].build()
    names = {name: original for name, original in names_of(model).items() if in_blocks(name)}
    write(model, tmp_path / "their.safetensors", "comfyui", names)
    given = with_biases(tmp_path / "their.safetensors")
    base, pipe, host = out(model, inputs), pipeline("wan", deepcopy(model)), deepcopy(model)
    pipe.load_lora_weights(tmp_path / "their.safetensors")
    injection = peftcore.load(host, tmp_path / "their.safetensors")
    about = describe(tmp_path / "their.safetensors")
    assert about.methods == ("lora",) and not about.problem
    assert len(injection.trained_along) == 20 == sum(name.endswith("diff_b") for name in given)
    assert_same(out(host, inputs), out(pipe.transformer, inputs), base)
    injection.save(tmp_path / "ours.safetensors", format="kohya/diffusion_model")
    written = load_file(tmp_path / "ours.safetensors")
    assert written.keys() == given.keys()
    for name, value in given.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6)


def test_biases_of_fused_modules(tmp_path: Path) -> None:
    """They are cut as outputs are, and written again where q, k and v all have some."""
    model, _ = MODELS["flux"].build()
    names = {name: original for name, original in names_of(model).items() if name.endswith("img_attn.qkv")}
    write(model, tmp_path / TENSORS, "kohya", names)
    given = with_biases(tmp_path / TENSORS)
    host = deepcopy(model)
    injection = peftcore.load(host, tmp_path / TENSORS)
    injection.save(tmp_path / "ours.safetensors", format="kohya")
    for name, value in load_file(tmp_path / "ours.safetensors").items():
        torch.testing.assert_close(value, given[name], rtol=0, atol=1e-6)
    injection.bake()
    for index, path in enumerate(QKV.format(each) for each in "qkv"):
        change = given["lora_unet_double_blocks_0_img_attn_qkv.diff_b"].split(32)[index]
        torch.testing.assert_close(host.get_submodule(path).bias, model.get_submodule(path).bias + change)
    target = [QKV.format(each) for each in "qkv"]
    some = peftcore.apply(deepcopy(model), "lora", target=target, train=[f"{target[0]}.bias"])
    with pytest.raises(ExportError, match="all of these modules must have the same diff_b"):
        some.save(tmp_path / TENSORS, format="kohya")


def whole_flux() -> nn.Module:
    """Flux at its real width, which diffusers' converter wants, with a block of each kind and without values."""
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_all_of_flux_beside_what_diffusers_converts(form: str, tmp_path: Path) -> None:
    """Single blocks, what is around the blocks, and the last layer; and what we write again."""
    model = whole_flux()
    names = {name: original for name, original in names_of(model).items() if everything(name)}
    write(model, tmp_path / "their.safetensors", form, names, alpha=4.0)
    theirs = diffusers.FluxPipeline.lora_state_dict(tmp_path / "their.safetensors")
    injection = peftcore.load(model, tmp_path / "their.safetensors")
    assert len(injection.operators) == 30 and len(theirs) == 60
    theirs = {name.removeprefix("transformer."): value for name, value in theirs.items()}
    for path, each in injection.operators.items():
        probe = torch.randn(each.A.shape[1], 2)
        expected = theirs[f"{path}.lora_B.weight"] @ (theirs[f"{path}.lora_A.weight"] @ probe)
        found = (each.scale * each.B @ (each.A @ probe)).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.abs().max() > 0.1
    injection.save(tmp_path / TENSORS, format="kohya")
    read, written = (load_file(tmp_path / name) for name in ("their.safetensors", TENSORS))
    renamed = {name.replace("diffusion_model.", "lora_unet_"): value for name, value in read.items()}
    for name, value in renamed.items():
        stem, dot, leaf = name.partition(".lora_" if ".lora_" in name else ".alpha")
        assert torch.equal(written[f"{stem.replace('.', '_')}{dot}{leaf}"], value)
    assert len(written) == len(read)


def noisy(model: nn.Module, method: str = "lora", **options: Any) -> Any:
    torch.manual_seed(3)
    injection = peftcore.apply(model, method, **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


@pytest.mark.parametrize(
    "options",
    [
        {"target": ["to_q", "to_k", "to_v", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj", "norm_out.linear"]},
        {"target": ["to_q", "to_v", "to_out.0"], "overrides": {"*.to_v": {"rank": 3, "alpha": 4.0}}},
        {"target": ["proj_mlp", "add_k_proj"]},
        {"target": ["to_q", "to_k", "to_v", "proj_mlp"], "method": "dora"},
    ],
    ids=["all", "ranks", "some", "dora"],
)
def test_ours_are_the_same_again(options: dict[str, Any], tmp_path: Path) -> None:
    """Also where ranks, scales and which of q, k and v there are differ: block-diagonally, and apart again."""
    model, inputs = MODELS["flux"].build()
    base, host = out(model, inputs), deepcopy(model)
    injection = noisy(host, **{"rank": 2, "alpha": 3.0, **options})
    for part in ("", "/diffusion_model"):
        injection.save(tmp_path / TENSORS, format=f"kohya{part}")
        assert not any("to_q" in name for name in load_file(tmp_path / TENSORS))
        again = deepcopy(model)
        loaded = peftcore.load(again, tmp_path / TENSORS)
        assert_same(out(again, inputs), out(host, inputs), base)
        shapes = {name: value.shape for name, value in loaded.state_dict().items()}
        assert shapes == {name: value.shape for name, value in injection.state_dict().items()}


def test_ranks_that_differ_are_read_by_diffusers(tmp_path: Path) -> None:
    model, inputs = MODELS["flux"].build()
    base, host = out(model, inputs), deepcopy(model)
    overrides = {"*.to_v": {"rank": 3, "alpha": 4.0}, "*.to_k": {"alpha": 1.0}}
    target = [f"transformer_blocks.*.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_k_proj")]
    injection = noisy(host, rank=2, alpha=3.0, overrides=overrides, target=target)
    for part in ("", "/diffusion_model"):
        injection.save(tmp_path / TENSORS, format=f"kohya{part}")
        pipe = pipeline("flux", deepcopy(model))
        pipe.load_lora_weights(tmp_path / TENSORS)
        assert_same(out(pipe.transformer, inputs), out(host, inputs), base)


@pytest.mark.parametrize(
    ("leaves", "rows"),
    [
        ({"hada_w1_a": (0, 2), "hada_w1_b": (2, 1), "hada_w2_a": (0, 2), "hada_w2_b": (2, 1)}, "loha"),
        ({"diff": (0, 1), "diff_b": (0,)}, "attention_only"),
    ],
    ids=["loha", "full"],
)
def test_other_methods_by_the_equation(leaves: dict[str, tuple[int, ...]], rows: str, tmp_path: Path) -> None:
    """One fused weight, in float64, cut behind the equation."""
    model = MODELS["flux"].build()[0].double()
    paths = [QKV.format(each) for each in "qkv"]
    before = torch.cat([model.get_submodule(path).weight for path in paths]).detach()
    torch.manual_seed(1)
    sizes = (96, 32, 2)
    given = {leaf: torch.randn([sizes[dim] for dim in dims], dtype=torch.float64) for leaf, dims in leaves.items()}
    save_file({f"lora_unet_double_blocks_0_img_attn_qkv.{n}": v for n, v in given.items()}, tmp_path / TENSORS)
    injection = peftcore.load(model, tmp_path / TENSORS)
    assert injection.method.name == rows
    injection.save(tmp_path / "again.safetensors", format="kohya")
    again = load_file(tmp_path / "again.safetensors")
    for leaf, value in given.items():
        torch.testing.assert_close(again[f"lora_unet_double_blocks_0_img_attn_qkv.{leaf}"], value)
    injection.bake()
    change = torch.cat([model.get_submodule(path).weight for path in paths]) - before
    expected = given.get("diff")
    if expected is None:
        expected = given["hada_w1_a"] @ given["hada_w1_b"] * (given["hada_w2_a"] @ given["hada_w2_b"])
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)


def test_halves_of_the_last_layer_by_the_equation(tmp_path: Path) -> None:
    """Shift and scale are the other way round in the original code."""
    model = MODELS["flux"].build()[0].double()
    down, up = torch.randn(2, 32, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / TENSORS)
    before = model.norm_out.linear.weight.detach().clone()
    peftcore.load(model, tmp_path / TENSORS).bake()
    change = torch.cat([up[32:], up[:32]]) @ down / 2
    torch.testing.assert_close(model.norm_out.linear.weight, before + change, rtol=0, atol=1e-13)


def test_a_norm_of_wan_has_another_number_there(tmp_path: Path) -> None:
    """The original's third norm is the second one here, and in files of our own names it is not."""
    model = MODELS["wan"].build()[0]
    change = torch.randn(24)
    for prefix, name in (("diffusion_model", "blocks.0.norm3"), ("lycoris", "blocks_0_norm2")):
        attention = "blocks.0.self_attn.q" if prefix != "lycoris" else "blocks_0_attn1_to_q"
        join = "." if prefix != "lycoris" else "_"
        tensors = {f"{prefix}{join}{name}.w_norm": change, f"{prefix}{join}{attention}.diff": torch.randn(24, 24)}
        save_file(tensors, tmp_path / TENSORS)
        host = deepcopy(model)
        peftcore.load(host, tmp_path / TENSORS).bake()
        torch.testing.assert_close(host.blocks[0].norm2.weight, model.blocks[0].norm2.weight + change)


STEM = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STEM}.lora_up.weight": torch.ones(95, 4)}, r"to_q, .*to_k, .*to_v here: .*\(95, 4\).* 32, 32, 32 outputs"),
        (
            {f"{STEM}.lora_up.weight": torch.ones(96, 5)},
            r"up.weight for transformer_blocks.0.attn.to_q has shape \(32, 5",
        ),
        ({f"{STEM}.lora_up.weight": None}, "cannot be split"),
        ({f"{STEM}.lora_down.weight": None}, r"missing lora_down\.weight"),
        ({f"{STEM}.lora_A.weight": torch.ones(4, 32)}, "are the same tensor"),
        ({f"{STEM}.alpha": torch.tensor(-1.0)}, "alpha is -1.0"),
        ({f"{STEM}.lora_up.weight": torch.full((96, 4), torch.nan)}, "not finite"),
        ({f"{STEM}.diff_b": torch.ones(95)}, r"diff_b \(95,\).* cannot be split"),
        ({f"{STEM}.lora_B.bias": torch.ones(96)}, f"no installed plugin reads lora_B.bias, .* at {STEM}"),
        ({"lora_unet_transformer_blocks_0_attn_to_q.diff": torch.ones(32, 32)}, "two names for the same module"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkvs.diff": torch.ones(32, 32)},
            "this model has no .*double.blocks.0.img.attn.qkvs",
        ),
    ],
)
def test_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    model, inputs = MODELS["flux"].build()
    names = {name: each for name, each in names_of(model).items() if name.endswith("img_attn.qkv")}
    tensors = write(model, tmp_path / TENSORS, "kohya", names) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / TENSORS)
    before = out(model, inputs)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, tmp_path / TENSORS)
    assert torch.equal(out(model, inputs), before)


def test_lokr_of_a_fused_module_is_refused_by_name(tmp_path: Path) -> None:
    save_file({f"{STEM}.lokr_w1": torch.ones(12, 4), f"{STEM}.lokr_w2": torch.ones(8, 8)}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=rf"{STEM}, which is .*to_v here: lokr_w1 .* cannot be split"):
        peftcore.load(MODELS["flux"].build()[0], tmp_path / TENSORS)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "lokr",
            {"target": ["to_q", "to_k", "to_v", "proj_mlp"]},
            r"to_v cannot be written as .*qkv: .* the same lokr_w1",
        ),
        (
            "dora",
            {"target": ["to_q", "to_v"]},
            r"to_v cannot be written as .*qkv: all of these modules must have the same dora_scale",
        ),
        ("loha", {"target": ["to_q", "to_k", "to_v", "proj_mlp"]}, r"the same hada_w1_b, hada_w2_b"),
    ],
)
def test_what_cannot_be_written(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """In names of the original code; in our own it can."""
    model, inputs = MODELS["flux"].build()
    injection = noisy(deepcopy(model), method, rank=2, **options)
    with pytest.raises(ExportError, match=message + r'.*format="kohya/lycoris"'):
        injection.save(tmp_path / TENSORS, format="kohya")
    injection.save(tmp_path / TENSORS, format="kohya/lycoris")
    base = out(model, inputs)
    peftcore.load(model, tmp_path / TENSORS)
    assert_same(out(model, inputs), out(injection.model, inputs), base)


def test_different_methods_in_one_module_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peftcore_hybrid")
    parts = [{"method": "lora", "target": ["to_q", "to_k"]}, {"method": "dora", "target": ["to_v"]}]
    injection = peftcore.apply(MODELS["flux"].build()[0], "config_union", parts=parts)
    with pytest.raises(ExportError, match="they have different methods"):
        injection.save(tmp_path / TENSORS, format="kohya")


def test_forms_are_those_of_the_files() -> None:
    assert set(FORMS) == {form for _, form, _ in CASES}
