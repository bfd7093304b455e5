"""The runnable snippet of a method's page.

One rule for all: on the first host below on which the method has a place, in the order that suits its category, apply
it, take one step, save, and merge where it merges. A method that needs to be told more says it in the docstring of its
class, where `help` shows it too: an indented block under "Example:", which takes the place of the line that applies it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

import peftcore
from peftcore.contract.method import Method
from peftcore.errors import PeftcoreError
from peftcore.injection.quantization import schemes

EXAMPLE = "Example:"


@dataclass(frozen=True)
class Host:
    """A small model that a reader can build, as text."""

    name: str
    imports: str
    """Lines that import what it needs beside torch and peftcore."""
    code: str
    """Builds `model` and `batch`."""
    loss: str = "model(**batch).loss"


LLAMA = Host(
    "a small Llama",
    "from transformers import LlamaConfig, LlamaForCausalLM",
    """
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)  # or your own, from_pretrained
ids = torch.arange(2, 12).unsqueeze(0)  # a text of ten tokens
batch = {"input_ids": ids, "labels": ids}
""",
)
BERT = Host(
    "a small BERT",
    "from transformers import BertConfig, BertForSequenceClassification",
    """
config = BertConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = BertForSequenceClassification(config)  # or your own, from_pretrained
batch = {"input_ids": torch.arange(2, 12).unsqueeze(0), "labels": torch.tensor([1])}
""",
)
VIT = Host(
    "a small ViT",
    "from transformers import ViTConfig, ViTForImageClassification",
    """
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))  # or your own, from_pretrained
batch = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([1])}
""",
)
CLIP = Host(
    "a small CLIP",
    "from transformers import CLIPConfig, CLIPModel",
    """
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
text = {**sizes, "vocab_size": 128, "eos_token_id": 127}
model = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}))
texts = torch.stack([torch.arange(2, 26), torch.arange(3, 27)])  # one for each picture
texts[:, -1] = 127  # the end of each
batch = {"input_ids": texts, "pixel_values": torch.randn(2, 3, 32, 32)}
""",
    loss="torch.nn.functional.cross_entropy(model(**batch).logits_per_image, torch.arange(2))",
)
UNET = Host(
    "a small UNet of Stable Diffusion's kind",
    "from diffusers import UNet2DConditionModel",
    """
blocks = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
}
model = UNet2DConditionModel(**blocks, layers_per_block=1, cross_attention_dim=32, attention_head_dim=8)
noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
batch = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([10]), "encoder_hidden_states": text}
""",
    loss="(model(**batch).sample - noise).square().mean()",
)
MAMBA = Host(
    "a small Mamba",
    "from transformers import MambaConfig, MambaForCausalLM",
    """
model = MambaForCausalLM(MambaConfig(hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=128))  # or your own
ids = torch.arange(24).view(1, 24)
batch = {"input_ids": ids, "labels": ids}
""",
)
FLUX = Host(
    "a small Flux",
    "from diffusers import FluxTransformer2DModel",
    """
sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 16}
widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32}
model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, **sizes, **widths)
noise, text = torch.randn(1, 16, 16), torch.randn(1, 5, 32)  # an image of 4 x 4 tokens
places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
batch = {"hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": text, "pooled_projections": text[:, 0]}
batch |= {"timestep": torch.tensor([0.5]), "img_ids": places, "txt_ids": torch.zeros(5, 3)}
""",
    loss="(model(**batch).sample - noise).square().mean()",
)
HOSTS = (LLAMA, BERT, VIT, CLIP, UNET, FLUX, MAMBA)
"""In the order in which they are tried."""
FIRST = {"vision": (VIT, CLIP), "diffusion": (UNET, CLIP)}
"""What is tried before, by category."""


def snippet(method: type[Method]) -> str:
    """The code that a reader can paste."""
    example, where = example_of(method), host(method)
    applied = example or _applied(method, where)
    parts = [
        "\n".join(["import peftcore", "import torch", where.imports]),
        where.code.strip(),
        applied,
        *([_packed(method)] if _packed(method) else []),
        *([_step(method, where)] if _trains(method, where) else []),
        _end(method),
    ]
    return "\n\n".join(parts) + "\n"


def host(method: type[Method]) -> Host:
    """The host of the snippet: the first on which the method has a place; the first of all where it has none."""
    tried = (*FIRST.get(method.tags.category, ()), *HOSTS)
    return next((each for each in tried if plan(method, each)), tried[0])


def plan(method: type[Method], where: Host) -> peftcore.Plan | None:
    """What the method would do there, with the options of its example; None where it has no place."""
    try:
        return peftcore.plan(built(where), method, **options(method))
    except PeftcoreError:
        return None


def built(where: Host) -> nn.Module:
    """The model."""
    names: dict[str, Any] = {}
    exec("\n".join(["import torch", where.imports, where.code]), names)
    model: nn.Module = names["model"]
    return model


def example_of(method: type[Method]) -> str:
    """The block under "Example:" in the docstring of its class."""
    _, found, block = inspect.cleandoc(method.__doc__ or "").partition(f"{EXAMPLE}\n")
    return textwrap.dedent(block).strip() if found else ""


def options(method: type[Method]) -> dict[str, Any]:
    """The options that the example has."""
    calls = [node for node in ast.walk(ast.parse(example_of(method))) if isinstance(node, ast.Call)]
    applying = [call for call in calls if ast.unparse(call.func) == "peftcore.apply"]
    given = [each for call in applying for each in call.keywords]
    return {each.arg: ast.literal_eval(each.value) for each in given if each.arg and each.arg != "data"}


def _applied(method: type[Method], where: Host) -> str:
    data = ", data=[batch]" if method.tags.needs_data else ""
    told = "  # it looks at data first: give it some batches" if data else ""
    return f'injection = peftcore.apply(model, "{method.name}"{data}){told}'


def _packed(method: type[Method]) -> str:
    """Of a method for packed bases: the line that packs, as its options say by default."""
    scheme = method.Config.model_fields.get("scheme")
    if scheme is None or scheme.default not in schemes():
        return ""
    given = method.Config.model_fields["scheme_options"].get_default(call_default_factory=True)
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    return f'peftcore.quantize(model, "{scheme.default}"{arguments})'


def _trains(method: type[Method], where: Host) -> bool:
    found = plan(method, where)
    return found is None or found.trainable > 0


def _step(method: type[Method], where: Host) -> str:
    steps = ", total_steps=1" if method.tags.scheduled else ""
    return f"""
optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3{steps})
loss = {where.loss}
loss.backward()
optimizer.step()
""".strip()


def _end(method: type[Method]) -> str:
    saved = 'injection.save("adapter")  # the adapter alone; peftcore.load(model, "adapter") reads it'
    merged = "injection.merge()  # now the weights have it; unmerge() gives them back"
    return f"{saved}\n{merged}" if method.tags.mergeable else saved
