"""LoRA files of diffusers, both ways, with the real diffusers: models, pipelines, and what older versions wrote."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from pipeline_models import assert_same, clip, out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.formats.diffusers import METADATA, TENSORS
from peftcore.testing.hosts import HOSTS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::(peft|diffusers|transformers)")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([3, 5]),
    }


def flux() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(4)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.randint(0, 4, (6, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }


def text() -> tuple[nn.Module, dict[str, Any]]:
    return clip(), {"input_ids": torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(1))}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = HOSTS["unet"].build()
    return model.eval(), inputs


@torch.no_grad()
def fill(tensors: Any) -> None:
    for each in tensors:
        each.normal_(0, 0.1)


def added(model: nn.Module, **options: Any) -> nn.Module:
    """Their adapter on a copy of the model, filled with noise. As `add_adapter` does it, for which transformers wants a
    newer peft than there is."""
    theirs: Any = inject_adapter_in_model(LoraConfig(**options), deepcopy(model), "default")
    theirs._hf_peft_config_loaded = True
    torch.manual_seed(5)
    fill(p for name, p in theirs.named_parameters() if ".lora_" in name and "magnitude" not in name)
    for name, p in theirs.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1 + 0.3 * torch.rand_like(p))
    return theirs.eval()


def assert_again(model: nn.Module, base: nn.Module, inputs: dict[str, Any], injection: Any, path: Path) -> None:
    """Saved in our own format and loaded again it is the same."""
    injection.save(path)
    again = deepcopy(base)
    loaded = peftcore.load(again, path)
    assert torch.equal(out(again, inputs), out(model, inputs))
    assert loaded.config == injection.config


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ATTENTION},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ATTENTION},
    "bias": {"r": 3, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_out.0"]},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "conv1", "proj"],
        "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_v": 3, "conv1": 9},
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_save_lora_adapter_wrote(options: dict[str, Any], tmp_path: Path) -> None:
    """One model, with peft's options in the header."""
    model, inputs = unet()
    theirs: Any = added(model, **options)
    theirs.save_lora_adapter(tmp_path)
    base, expected = deepcopy(model), out(theirs, inputs)
    injection = peftcore.load(model, tmp_path)
    assert_same(out(model, inputs), expected, out(base, inputs))
    assert_again(model, base, inputs, injection, tmp_path / "ours")


@pytest.mark.parametrize("host", [unet, sd3], ids=["unet", "sd3"])
def test_load_lora_adapter_reads_ours(host: Any, tmp_path: Path) -> None:
    model, inputs = host()
    base = deepcopy(model)
    overrides = {"*.to_q": {"rank": 2}, "*.to_v": {"alpha": 3.0}}
    injection = peftcore.apply(model, "lora", target=ATTENTION, rank=4, alpha=6.0, overrides=overrides)
    fill(injection.parameters())
    injection.save(tmp_path, format="diffusers")
    prefix = "unet" if host is unet else "transformer"
    theirs = deepcopy(base)
    theirs.load_lora_adapter(tmp_path, prefix=prefix, weight_name=TENSORS)
    assert_same(out(model, inputs), out(theirs, inputs), out(base, inputs))
    again = deepcopy(base)
    peftcore.load(again, tmp_path / TENSORS)
    assert torch.equal(out(again, inputs), out(model, inputs))


@pytest.mark.parametrize("options", [{"method": "dora"}, {"method": "lora", "scaling": "sqrt_rank"}])
def test_load_lora_adapter_reads_ours_of_other_kinds(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, target=[*ATTENTION, "conv1"], rank=4, alpha=6.0, **options)
    fill(p for each in injection.operators.values() for name, p in each.named_parameters() if name != "magnitude")
    injection.save(tmp_path, format="diffusers")
    theirs = deepcopy(base)
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name=TENSORS)
    assert_same(out(model, inputs), out(theirs, inputs), out(base, inputs))


def pipeline() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(14), tokenizer=None, unet=unet()[0], scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_files_of_a_pipeline_are_for_each_of_its_models(tmp_path: Path) -> None:
    """Written by the pipeline, with and without options in the header: each model takes its part."""
    pipe, fresh = pipeline(), pipeline()
    u = added(pipe.unet, r=4, lora_alpha=6, target_modules=ATTENTION)
    t = added(pipe.text_encoder, r=3, lora_alpha=3, target_modules=["q_proj", "v_proj", "fc1"])
    layers = {
        "unet_lora_layers": get_peft_model_state_dict(u, adapter_name="default"),
        "text_encoder_lora_layers": get_peft_model_state_dict(t, adapter_name="default"),
    }
    said = {"unet_lora_adapter_metadata": u.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, **layers, **said)
    for kind, theirs, (_, inputs) in (("unet", u, unet()), ("text_encoder", t, text())):
        model = deepcopy(getattr(fresh, kind))
        base = out(model, inputs)
        peftcore.load(model, tmp_path)
        assert_same(out(model, inputs), out(theirs, inputs), base)
    pair = nn.ModuleDict({"unet": fresh.unet, "text_encoder": fresh.text_encoder})
    held = load_file(tmp_path / TENSORS)
    save_file({k: v for k, v in held.items() if k.startswith("unet")}, tmp_path / "alone.safetensors")
    assert len(peftcore.load(pair, tmp_path / "alone.safetensors").sites) == len(layers["unet_lora_layers"]) // 2


def test_pipelines_read_ours(tmp_path: Path) -> None:
    pipe, ours = pipeline(), pipeline()
    inputs = {"unet": unet()[1], "text_encoder": text()[1]}
    for part, target in (("unet", ATTENTION), ("text_encoder", ["q_proj", "v_proj", "fc2"])):
        injection = peftcore.apply(getattr(ours, part), "lora", target=target, rank=8, alpha=3.0)
        fill(injection.parameters())
        injection.save(tmp_path / part, format="diffusers")
        pipe.load_lora_weights(tmp_path / part, adapter_name=part)
    base = pipeline()
    for part, given in inputs.items():
        each = [out(getattr(p, part), given) for p in (ours, pipe, base)]
        assert_same(*each)


def renamed(model: nn.Module, tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """Tensors of peft by the names of older versions."""
    found = {}
    for name, value in tensors.items():
        new = name
        if style == "new":
            new = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        elif style == "linear":
            new = name.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")
        else:
            swap = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
            for old, changed in swap.items() if ".to_" not in name or "to_out.0" in name else ():
                new = new.replace(f".{old}.", f".{changed}.")
            inside = ".processor" if "attn1" in name or "attn2" in name else ""
            stem, _, leaf = new.rpartition(".lora_")
            stem, _, layer = stem.rpartition(".")
            new = f"{stem}{inside}.{layer}_lora.{'down' if leaf[0] == 'A' else 'up'}.weight"
        found[new] = value
    assert not tensors.keys() & found.keys()
    return found


@pytest.mark.parametrize("style", ["new", "processors"])
def test_older_names_of_unets(style: str, tmp_path: Path) -> None:
    model, inputs = unet()
    peft = added(model, r=4, lora_alpha=4, target_modules=ATTENTION)
    old = renamed(model, get_peft_model_state_dict(peft, adapter_name="default"), style)
    save_file({f"unet.{name}": value for name, value in old.items()}, tmp_path / TENSORS)
    theirs = deepcopy(model)
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name=TENSORS)
    base = out(model, inputs)
    peftcore.load(model, tmp_path)
    assert_same(out(model, inputs), out(theirs, inputs), base)


@pytest.mark.parametrize("style", ["linear", "processors"])
@pytest.mark.parametrize("prefix", ["text_encoder.", "text_encoder.text_model."])
def test_older_names_of_text_encoders(style: str, prefix: str, tmp_path: Path) -> None:
    pipe = pipeline()
    model, (_, inputs) = pipe.text_encoder, text()
    peft = added(model, r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    old = renamed(model, get_peft_model_state_dict(peft, adapter_name="default"), style)
    save_file({prefix + name: value for name, value in old.items()}, tmp_path / TENSORS)
    ours = deepcopy(model)
    peftcore.load(ours, tmp_path)
    base = out(model, inputs)
    pipe.load_lora_weights(tmp_path)
    assert_same(out(ours, inputs), out(model, inputs), base)


def test_alphas_among_the_tensors_and_ranks_that_differ(tmp_path: Path) -> None:
    """No options in the header, as the pipelines of Flux read them."""
    model, inputs = flux()
    options = {"target_modules": ["to_q", "to_v", "proj_mlp"], "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2}}
    tensors = get_peft_model_state_dict(added(model, **options), adapter_name="default")
    paths = {name.partition(".lora_")[0] for name in tensors}
    alphas = {f"{path}.alpha": torch.tensor(3.0 if path.endswith("to_v") else 6.0) for path in paths}
    both = {f"transformer.{name}": value for name, value in {**tensors, **alphas}.items()}
    save_file(both, tmp_path / "style.safetensors")
    state, network_alphas = diffusers.FluxPipeline.lora_state_dict(tmp_path / "style.safetensors", return_alphas=True)
    theirs = deepcopy(model)
    diffusers.FluxPipeline.load_lora_into_transformer(state, network_alphas=network_alphas, transformer=theirs)
    base = deepcopy(model)
    injection = peftcore.load(model, tmp_path)
    assert_same(out(model, inputs), out(theirs, inputs), out(base, inputs))
    assert_again(model, base, inputs, injection, tmp_path / "ours")
    save_file({**both, "transformer.proj_out.alpha": torch.tensor(1.0)}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"proj_out\.alpha is not the alpha of a LoRA"):
        peftcore.load(deepcopy(base), tmp_path)


def test_encoders_of_the_same_names_are_told_apart_by_their_sizes(tmp_path: Path) -> None:
    """Two text encoders: the names of the small one's modules exist in the large one too."""
    _, inputs = text()
    held, models, expected = {}, (clip(16, 1), clip(20, 2)), []
    for part, model in zip(("text_encoder", "text_encoder_2"), models, strict=True):
        theirs = added(model, r=2, lora_alpha=2, target_modules=["q_proj"])
        tensors = get_peft_model_state_dict(theirs, adapter_name="default")
        held |= {f"{part}.{name}": value for name, value in tensors.items() if ".layers.0." in name}
        for name, p in theirs.named_parameters():
            if ".layers.1." in name and "lora_B" in name:
                p.data.zero_()  # the file has nothing for that layer
        expected.append(out(theirs, inputs))
    save_file(held, tmp_path / TENSORS)
    for model, theirs in zip(models, expected, strict=True):
        base = out(model, inputs)
        peftcore.load(model, tmp_path)
        assert_same(out(model, inputs), theirs, base)
    with pytest.raises(HostMismatch, match=r"'text_encoder' and 'text_encoder_2' of .* all fit"):
        small = {name: value for name, value in held.items() if name.startswith("text_encoder.")}
        twice = {name.replace("encoder.", "encoder_2.", 1): value.clone() for name, value in small.items()}
        save_file({**small, **twice}, tmp_path / TENSORS)
        peftcore.load(clip(16, 1), tmp_path)


def saved(path: Path, change: Any = None, **options: Any) -> nn.Module:
    """A file of diffusers with other tensors or options, and its host."""
    model, _ = sd3()
    theirs: Any = added(model, r=2, lora_alpha=2, target_modules=["to_q"])
    said = {**theirs.peft_config["default"].to_dict(), **options}
    said["target_modules"] = sorted(said["target_modules"])
    tensors = get_peft_model_state_dict(theirs, adapter_name="default")
    tensors = {f"transformer.{name}": value.contiguous() for name, value in tensors.items()}
    if change is not None:
        change(tensors)
    path.mkdir(exist_ok=True)
    header = {METADATA: json.dumps({f"transformer.{key}": value for key, value in said.items()}, default=str)}
    save_file(tensors, path / TENSORS, metadata=header)
    return model


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.update({"foo.bar.lora_A.weight": torch.ones(1)}), {}, r"unknown foo\.bar\.lora_A"),
        (lambda t: t.update({"transformer.pos_embed.proj.diff": torch.ones(1)}), {}, r"unknown .*proj\.diff"),
        (lambda t: t.pop(FIRST), {}, r"missing lora_A\.weight"),
        (lambda t: t.update({FIRST: torch.ones(2, 3)}), {}, r"shape \(2, 3\), expected \(2, 16\)"),
        (lambda t: t.update({FIRST.replace("lora_A", "lora.down"): torch.ones(2, 16)}), {}, "are the same tensor"),
        (lambda t: t.update({FIRST: torch.full((2, 16), torch.nan)}), {}, "not finite"),
        (None, {"use_qalora": True}, "use_qalora"),
        (None, {"arrow_config": {"top_k": 3}}, "arrow_config"),
        (None, {"peft_type": "NEWEST"}, "no installed plugin reads peft's NEWEST"),
        (None, {"init_lora_weights": "corda"}, "changes the base's weights"),
    ],
)
def test_refused(change: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = saved(tmp_path, change, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, tmp_path)
    assert model.state_dict().keys() == before.keys()


def test_hosts_that_it_is_not_for(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(HostMismatch, match=r"the part 'transformer' of .* another base"):
        peftcore.load(unet()[0], tmp_path)


def test_files_of_peft_are_not_taken_for_ones_of_diffusers(tmp_path: Path) -> None:
    """Without its options a file of peft does not say what it computes."""
    save_file({"base_model.model.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not an adapter in a known format"):
        peftcore.load(nn.Linear(2, 2), tmp_path / "adapter_model.safetensors")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model, _ = sd3()
    injection = peftcore.apply(model, "hra", target=["to_q"])
    with pytest.raises(ExportError):
        injection.save(tmp_path, format="diffusers")
    injection.remove()
    injection = peftcore.apply(model, "lora", target=["to_q"], train=["proj_out"])
    with pytest.raises(ExportError, match="proj_out"):
        injection.save(tmp_path, format="diffusers")
    with pytest.raises(ExportError, match="no part 'decoder'"):
        injection.save(tmp_path, format="diffusers/decoder")
    assert not any(tmp_path.iterdir())


def test_the_model_of_the_pipeline_can_be_named(tmp_path: Path) -> None:
    injection = peftcore.apply(clip(), "lora", target=["q_proj"])
    injection.save(tmp_path, format=["peftcore", "diffusers/text_encoder_2"])
    assert all(name.startswith("text_encoder_2.encoder.") for name in load_file(tmp_path / TENSORS))
