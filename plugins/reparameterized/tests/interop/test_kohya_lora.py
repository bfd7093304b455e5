"""LoRA files of kohya's sd-scripts: beside what diffusers makes of the same file, and by their equation in float64.

Diffusers 0.42 loses the alphas of attention and of text encoders that are not the most frequent one (peft warns of
patterns that match nothing), and reads attention of text encoders only beside an `out_proj`. So the files that it is
given have one alpha; others are checked by the equation.
"""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import assert_same, clip, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.formats.kohya import TENSORS
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import default_dtype

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::(peft|diffusers|transformers)")


def unet(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """A small UNet in the form of SDXL: blocks with and without attention, resamplers, an added embedding."""
    torch.manual_seed(2)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 12, 16), layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=14,
        attention_head_dim=2, norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=34, transformer_layers_per_block=(1, 1, 2),
    ).eval()  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 14),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)},
    }


TOKENS = {"input_ids": torch.arange(14).view(2, 7)}


def pipeline(model: nn.Module) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(14), tokenizer=None, unet=model, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def made(model: nn.Module, prefix: str, wanted: Any, *, std: float = 0.1, alpha: Any = 3.0) -> dict[str, Tensor]:
    """A file for all linear maps and convolutions that are wanted: ranks 2 and 3."""
    torch.manual_seed(7)
    tensors = {}
    for index, (path, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Conv2d) or not wanted(path):
            continue
        rank, out_, (in_, *kernel) = 2 + index % 2, len(module.weight), module.weight.shape[1:]
        stem = f"{prefix}_{path}".replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, in_, *kernel) * std
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out_, rank, *[1 for _ in kernel]) * std
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha(index) if callable(alpha) else alpha)
    return tensors


def attention_and_convolutions(path: str) -> bool:
    """What diffusers' converter knows the names of."""
    return any(part in path for part in (".attn", ".ff.", "proj_in", "proj_out", ".conv1", ".conv2", "downsamplers"))


def test_beside_diffusers(tmp_path: Path) -> None:
    """One file for a UNet and a text encoder; each takes its part, and our copy of it is the same."""
    (model, inputs), encoder = unet(1), clip(14)
    tensors = made(model, "lora_unet", attention_and_convolutions)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    tensors |= made(encoder, "lora_te_text_model", lambda path: path.endswith(projections), std=0.3)
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_network_module": "networks.lora"})
    pipe = pipeline(deepcopy(model))
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    for host, theirs, given in ((model, pipe.unet, inputs), (encoder, pipe.text_encoder, TOKENS)):
        base = deepcopy(host)
        injection = peftcore.load(host, tmp_path)
        assert injection.method.name == "lora"
        assert_same(out(host, given), out(theirs, given), out(base, given))
        injection.save(tmp_path / "ours")
        again = deepcopy(base)
        assert peftcore.load(again, tmp_path / "ours").config == injection.config
        assert torch.equal(out(again, given), out(host, given))


def original(path: str, layers: int) -> str:
    """The name in the code of Stable Diffusion, written down by hand for a UNet of this form."""
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
        "down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_out.0": (
            "input_blocks.7.1.transformer_blocks.1.attn2.to_out.0"
        ),
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "middle_block.1.transformer_blocks.0.attn1.to_q",
        "up_blocks.0.resnets.2.conv1": "output_blocks.2.0.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": (
            "output_blocks.5.1.transformer_blocks.0.ff.net.0.proj"
        ),
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks.6.0.skip_connection",
    }
    return table.get(path, "")


def test_names_of_the_original_code(tmp_path: Path) -> None:
    """Each module of a table is found, and the same as under its name in diffusers."""
    model, inputs = unet()
    named = made(model, "lora_unet", lambda path: original(path, 2))
    stems = {f"lora_unet_{path}".replace(".", "_"): path for path, _ in model.named_modules() if original(path, 2)}
    assert len(stems) == 16
    renamed = {}
    for name, value in named.items():
        stem, _, leaf = name.partition(".")
        renamed[f"lora_unet_{original(stems[stem], 2)}".replace(".", "_") + f".{leaf}"] = value
    save_file(named, tmp_path / "plain.safetensors")
    save_file(renamed, tmp_path / "original.safetensors")
    both = []
    for name in ("plain", "original"):
        host = deepcopy(model)
        injection = peftcore.load(host, tmp_path / f"{name}.safetensors")
        assert {site.module_path for site in injection.sites} == set(stems.values())
        both.append(out(host, inputs))
    assert torch.equal(*both)


def test_names_of_the_original_code_beside_diffusers(tmp_path: Path) -> None:
    """All attention and resnets of the blocks, renamed by our table, are what diffusers' converter finds."""
    from peftcore.files.formats.ldm_names import ldm_names

    model, inputs = unet()
    names = {path: name for name, path in ldm_names(dict(model.named_modules())).items()}
    wanted = lambda path: ".attn" in path or "proj_in" in path or ".conv1" in path or ".conv2" in path  # noqa: E731
    tensors = {}
    for name, value in made(model, "x", wanted).items():
        stem, _, leaf = name.partition(".")
        path = next(each for each in names if f"x_{each}".replace(".", "_") == stem)
        tensors[f"lora_unet_{names[path]}".replace(".", "_") + f".{leaf}"] = value
    save_file(tensors, tmp_path / "xl.safetensors")
    pipe = pipeline(deepcopy(model))
    state, alphas = pipe.lora_state_dict(tmp_path, weight_name="xl.safetensors", unet_config=model.config)
    pipe.load_lora_into_unet(state, network_alphas=alphas, unet=pipe.unet)
    base = out(model, inputs)
    peftcore.load(model, tmp_path)
    assert_same(out(model, inputs), out(pipe.unet, inputs), base)


@pytest.mark.parametrize("alpha", [lambda index: 1.0 + index % 3, None], ids=["alphas", "none"])
def test_equation_in_float64(alpha: Any, tmp_path: Path) -> None:
    """W + alpha / rank * up @ down at every linear map and convolution of the host; without alpha it is the rank."""
    model = unet(1)[0].double()
    tensors = made(model, "lora_unet", lambda path: True, alpha=alpha)
    save_file({name: value.double() for name, value in tensors.items()}, tmp_path / TENSORS)
    base = {path: module.weight.clone() for path, module in model.named_modules() if hasattr(module, "weight")}
    peftcore.load(model, tmp_path).bake()
    stems = {f"lora_unet_{path}".replace(".", "_"): path for path in base}
    assert {name.partition(".")[0] for name in tensors} == {s for s in stems if f"{s}.lora_up.weight" in tensors}
    moved = 0
    for stem, path in stems.items():
        down = tensors.get(f"{stem}.lora_down.weight")
        if down is None:
            continue
        up = tensors[f"{stem}.lora_up.weight"]
        scale = tensors[f"{stem}.alpha"].item() / len(down) if alpha else 1.0
        delta = scale * (up.double().flatten(1) @ down.double().flatten(1)).view(base[path].shape)
        now = model.get_submodule(path).weight
        torch.testing.assert_close(now, base[path] + delta, rtol=0, atol=1e-14)
        moved += 1
    assert moved > 50


@pytest.mark.parametrize("options", [{}, {"scaling": "sqrt_rank"}, {"method": "dora"}], ids=["plain", "rs", "dora"])
def test_ours_written_and_read_by_diffusers(options: dict[str, Any], tmp_path: Path) -> None:
    """Diffusers leaves `dora_scale` out; there ours alone reads it again."""
    model, inputs = unet()
    base = deepcopy(model)
    target = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "net.0.proj"]
    options = {"method": "lora", **options}
    overrides = {"*.conv1": {"rank": 2, "alpha": 4.0}}
    injection = peftcore.apply(model, target=target, rank=3, alpha=5.0, overrides=overrides, **options)
    for parameter in injection.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data.mul_(1.5)
    injection.save(tmp_path, format="kohya")
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    assert_same(out(again, inputs), out(model, inputs), out(base, inputs))
    if options["method"] == "lora":
        pipe = pipeline(deepcopy(base))
        pipe.load_lora_weights(tmp_path, weight_name=TENSORS)
        assert_same(out(model, inputs), out(pipe.unet, inputs), out(base, inputs))


def test_text_encoders_written_and_read_by_diffusers(tmp_path: Path) -> None:
    """With `text_model` in the names, which newer versions of transformers leave out of their modules."""
    model = clip(14)
    base = deepcopy(model)
    target = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
    injection = peftcore.apply(model, "lora", target=target, rank=3, alpha=5.0)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    injection.save(tmp_path, format="kohya")
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in load_file(tmp_path / TENSORS))
    pipe = pipeline(unet(1)[0])
    pipe.load_lora_weights(tmp_path, weight_name=TENSORS)
    assert_same(out(model, TOKENS), out(pipe.text_encoder, TOKENS), out(base, TOKENS))
    again = deepcopy(base)
    peftcore.load(again, tmp_path)
    assert torch.equal(out(again, TOKENS), out(model, TOKENS))
    injection.save(tmp_path / "second", format="kohya/lora_te2")
    assert all(name.startswith("lora_te2_") for name in load_file(tmp_path / "second" / TENSORS))


def test_encoders_of_the_same_names_are_told_apart_by_their_sizes(tmp_path: Path) -> None:
    small, large = clip(14, 1), clip(20, 1)
    tensors = {}
    for part, model in (("lora_te1_text_model", small), ("lora_te2_text_model", large)):
        tensors |= made(model, part, lambda path: path.endswith("q_proj"))
    save_file(tensors, tmp_path / TENSORS)
    for part, model in (("lora_te1", small), ("lora_te2", large)):
        injection = peftcore.load(model, tmp_path)
        held = tensors[f"{part}_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"]
        assert torch.equal(injection.operators["encoder.layers.0.self_attn.q_proj"].B, held)
    with pytest.raises(HostMismatch, match="this model has no"):
        peftcore.load(unet(1)[0], tmp_path)


def test_pointwise_convolutions_may_be_written_flat(tmp_path: Path) -> None:
    """The projections of older UNets are 1x1 convolutions, which some tools write as matrices."""
    model, inputs = HOSTS["unet"].build()
    tensors = made(model, "lora_unet", lambda path: path.endswith("proj_in"))
    flat = {name: value.flatten(1) if value.dim() == 4 else value for name, value in tensors.items()}
    assert any(value.dim() == 4 for value in tensors.values())
    results = []
    for each in (tensors, flat):
        save_file(each, tmp_path / TENSORS)
        host = deepcopy(model)
        peftcore.load(host, tmp_path)
        results.append(out(host, inputs))
    assert torch.equal(*results)


class Twins(nn.Module):
    """Two modules that have the same name without dots."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(2, 2)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(2, 2)})


def test_names_that_could_mean_two_modules(tmp_path: Path) -> None:
    ours = peftcore.apply(Twins(), "lora", target=["a_b.c"])
    with pytest.raises(HostMismatch, match="have the same name"):
        ours.save(tmp_path, format="kohya")
    save_file({"lycoris_a_b_c.lora_down.weight": torch.ones(1, 2), "lycoris_a_b_c.lora_up.weight": torch.ones(2, 1)},
              tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(HostMismatch, match=r"a_b\.c and a\.b_c have the same name"):
        peftcore.load(Twins(), tmp_path / "x.safetensors")


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.alpha": torch.tensor(0.0)}, "alpha is 0.0"),
        ({f"{Q}.alpha": torch.ones(2)}, "expected one number"),
        ({f"{Q}.alpha": torch.tensor(math.inf)}, "not finite"),
        ({f"{Q}.lora_down.weight": None}, r"missing lora_down\.weight"),
        ({f"{Q}.lora_up.weight": torch.ones(5, 2)}, r"shape \(5, 2\), expected"),
        ({f"{Q}.diff": torch.ones(2)}, "no installed plugin reads alpha, diff, lora_down.weight, lora_up.weight at"),
        ({"lora_unet_conv_out.oft_blocks": torch.ones(2, 2)}, "no installed plugin reads oft_blocks at lora_unet_conv"),
        ({"bundle_emb.style.string_to_param": torch.ones(2)}, r"unknown bundle_emb\.style"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(2, 2)},
            "this model has no double.blocks.0",
        ),
        ({f"{Q}.dora_scale": torch.ones(1, 16)}, r"shape \(1, 16\).*wd_on_output"),
        ({"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(1.0)}, "the same module"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, inputs = unet(1)
    tensors = made(model, "lora_unet", lambda path: "mid_block" in path and ".attn1" in path) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / TENSORS)
    before = out(model, inputs)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, tmp_path)
    assert torch.equal(out(model, inputs), before)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ExportError, match=message):
            peftcore.apply(clip(14), *args, **options).save(tmp_path, format="kohya")

    refused("no method that computes the same as hra", "hra", target=["q_proj"])
    refused("not embeddings.token_embedding", "lora", target=["token_embedding"])
    refused("cannot hold final_layer_norm", "lora", target=["q_proj"], train=["final_layer_norm"])
    assert not any(tmp_path.iterdir())


def test_some_modules_with_a_magnitude_and_some_without(tmp_path: Path) -> None:
    """Two methods in one file are a union."""
    pytest.importorskip("peftcore_hybrid")
    model, inputs = unet(1)
    base = deepcopy(model)
    tensors = made(model, "lora_unet", lambda path: ".attn1" in path)
    name = f"{Q}.dora_scale"
    tensors[name] = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight.norm(dim=1)
    tensors[name] = (2 * tensors[name][:, None]).detach()
    save_file(tensors, tmp_path / TENSORS)
    injection = peftcore.load(model, tmp_path)
    assert injection.method.name == "config_union"
    assert {part.method.name: len(part.grafts) for part in injection.parts.values()}["dora"] == 1
    injection.save(tmp_path / "again", format="kohya")
    written = load_file(tmp_path / "again" / TENSORS)
    assert written.keys() == tensors.keys()
    for key, value in written.items():
        torch.testing.assert_close(value, tensors[key])
    assert not torch.allclose(out(model, inputs), out(base, inputs))


def test_alpha_does_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "lora", target="0", rank=3, alpha=1 / 3)
    with default_dtype(torch.bfloat16):
        injection.save(tmp_path, format="kohya")
    alpha = load_file(tmp_path / TENSORS)["lycoris_0.alpha"]
    assert alpha.dtype == torch.float32
    assert alpha == torch.tensor(1 / 3)
