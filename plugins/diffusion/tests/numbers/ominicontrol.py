"""What OminiControl's own forward of a Flux computes, with gradients, what it starts from and trains, and the options
of its training for edges: ``python -m peftcore.testing.freeze ominicontrol.py CHECKOUT``.

Their file imports cv2, which makes conditions of pictures and is not needed; it stands empty.
"""

import sys
from pathlib import Path
from runpy import run_path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "Yuanshi9815/OminiControl", "331dd34", "omini/pipeline/flux_omini.py")
VERSIONS = ("torch", "diffusers", "peft")
RANK, ALPHA = 2, 8
SITES = (
    r".*x_embedder|(.*\.)?transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
"""The modules that their configurations name."""
CASES: dict[str, dict[str, Any]] = {
    "aligned": {"shape": (2, 2), "position_delta": (0, 0), "position_scale": 1.0, "independent": False},
    "subject": {"shape": (2, 3), "position_delta": (0, -2), "position_scale": 2.0, "independent": True},
}
"""Tokens of the condition, and how it is used."""
WIDE = 10_000
"""Channels of an image whose embedding has the A of which the start is told."""


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def grid(rows: int, columns: int) -> Tensor:
    """Places of an image's tokens."""
    at = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros(rows, columns), *at], -1).flatten(0, 1).double()


def host(channels: int = 4) -> Any:
    """A Flux with one block of each kind, in float64, its parameters waves."""
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).double()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(0.3 * wave(*parameter.shape, phase=number))
    return model.eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    """What the model is given: two images of 2 x 2 tokens, with two of text."""
    return {
        "hidden_states": wave(2, 4, 4),
        "encoder_hidden_states": wave(2, 2, 6, phase=1.0),
        "pooled_projections": wave(2, 5, phase=2.0),
        "timestep": torch.tensor([0.3, 0.8]).double(),
        "img_ids": grid(2, 2),
        "txt_ids": torch.zeros(2, 3).double(),
        "guidance": torch.tensor([3.5, 2.0]).double(),
    }


def condition(case: str) -> Tensor:
    """The tokens of a condition."""
    rows, columns = CASES[case]["shape"]
    return wave(2, rows * columns, 4, phase=3.0)


@torch.no_grad()
def fill(factors: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Fill A and B of each module, in the order of their paths."""
    for number, (A, B) in enumerate(factors):
        A.copy_(0.3 * wave(*A.shape, phase=4.0 + number))
        B.copy_(0.3 * wave(*B.shape, phase=5.0 + number))


def run(case: str, forward: Any) -> dict[str, Any]:
    from peft import LoraConfig

    model, given, options = host(), inputs(), CASES[case]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=SITES, init_lora_weights="gaussian"))
    layers = {path: each for path, each in sorted(model.named_modules()) if path and hasattr(each, "lora_A")}
    factors = {path: (each.lora_A["default"].weight, each.lora_B["default"].weight) for path, each in layers.items()}
    fill(list(factors.values()))
    places, scale = grid(*options["shape"]), options["position_scale"]
    if scale != 1.0:  # as in their trainer
        places[:, 1:] *= scale
        places[:, 1:] += (scale - 1.0) / 2
    places[:, 1:] += torch.tensor(options["position_delta"])
    seen = torch.ones(3, 3, dtype=torch.bool)
    seen[2, :2] = not options["independent"]
    image, tokens = given["hidden_states"].requires_grad_(), condition(case).requires_grad_()
    steps, guidance = given["timestep"], given["guidance"]
    (output,) = forward(
        model,
        image_features=[image, tokens],
        text_features=[given["encoder_hidden_states"]],
        img_ids=[given["img_ids"], places],
        txt_ids=[given["txt_ids"]],
        timesteps=[steps, steps, torch.zeros_like(steps)],
        pooled_projections=[given["pooled_projections"]] * 3,
        guidances=[guidance, guidance, torch.ones_like(guidance)],
        adapters=[None, None, "default"],
        group_mask=seen,
    )
    (output * wave(*output.shape, phase=6.0)).sum().backward()
    found = {"output": output, "image": image.grad, "condition": tokens.grad}
    for path, pair in factors.items():
        for name, factor in zip("AB", pair, strict=True):
            gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
            found[f"{path}.{name}"] = gradient
    return {name: value.flatten().tolist() for name, value in found.items()}


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns output and gradients of each case."""
    sys.modules.setdefault("cv2", ModuleType("cv2"))
    theirs = run_path(str(checkout / SOURCE.script), run_name="omini")
    return {case: run(case, theirs["transformer_forward"]) for case in CASES}


def told(checkout: Path) -> Any:
    """Returns their configuration of edges."""
    return yaml.safe_load((checkout / "train/config/spatial_alignment.yaml").read_text(encoding="utf-8"))


def trained(checkout: Path, channels: int = 4) -> dict[str, Tensor]:
    """Returns what their optimizer is given, by our names."""
    absent = ["cv2", "prodigyopt", "wandb"]
    theirs = load(checkout / "omini/train_flux/trainer.py", root=checkout, absent=absent).OminiModel
    model = object.__new__(theirs)
    nn.Module.__init__(model)
    model.transformer, model.adapter_set = host(channels), {"default"}
    model.optimizer_config = {"type": "AdamW", "params": {"lr": 1e-4}}  # of their comment
    model.lora_layers = model.init_lora(None, told(checkout)["train"]["lora_config"])
    (group,) = model.configure_optimizers().param_groups
    given, names = {*map(id, group["params"])}, {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    found = {}
    for name, each in model.transformer.named_parameters():
        if id(each) in given:
            path, _, rest = name.partition(".lora_")
            found[f"{path}.{names[f'lora_{rest}']}"] = each
    assert len(found) == len(given)
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the factors at a wide embedding are drawn from."""
    found = trained(checkout, WIDE)
    return {name: drawn(found[f"x_embedder.{name}"]) for name in "AB"}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of all that trains."""
    return {name: each.numel() for name, each in sorted(trained(checkout).items())}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their training for edges, and how its dataset places a condition, here a grey picture."""
    from PIL import Image

    config, absent = told(checkout), ["cv2", "prodigyopt", "wandb", "datasets"]
    module = load(checkout / "omini/train_flux/train_spatial_alignment.py", root=checkout, absent=absent)
    picture = {"jpg": Image.new("RGB", (8, 8)), "json": {"prompt": ""}}
    data = module.ImageConditionDataset([picture], condition_type="coloring")
    return {
        "rank": config["train"]["lora_config"]["r"], "independent": config["model"]["independent_condition"],
        "position_delta": data[0]["position_delta_0"].tolist(), "position_scale": data.position_scale,
    }  # fmt: skip
