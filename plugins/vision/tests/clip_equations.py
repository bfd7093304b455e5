"""A CLIP of transformers with the tensors of OpenAI's code, by its names, and texts with places for trained words."""

from typing import Any

import torch
from torch import Tensor, nn
from vpt_equations import transformers, wave

import peftcore

IDS = torch.tensor([[1, 3, 3, 5, 39, 0], [1, 3, 3, 6, 7, 39], [1, 3, 3, 9, 4, 39]])
"""Texts of three classes, each behind two places."""
PARTS = {"out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
PARTS |= {"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}


def _in_block(name: str) -> tuple[str, int | None]:
    """OpenAI's name of a tensor in a block, and which third of it is meant."""
    _, _, number, *inside, kind = name.split(".")
    if inside[-1] in ("q_proj", "k_proj", "v_proj"):
        return f"transformer.resblocks.{number}.attn.in_proj_{kind}", "qkv".index(inside[-1][0])
    return f"transformer.resblocks.{number}.{PARTS[inside[-1]]}.{kind}", None


ALONE = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
}
NORMS = {"final_layer_norm": "ln_final", "pre_layrnorm": "visual.ln_pre", "post_layernorm": "visual.ln_post"}


@torch.no_grad()
def openai_clip(features: int = 10) -> Any:
    """The toy of the authors' scripts: 12 and 16 wide with three blocks each, every tensor a wave of its name."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "hidden_size": 12, "intermediate_size": 48, "vocab_size": 40, "max_position_embeddings": 6}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "hidden_size": 16, "intermediate_size": 64, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=features)
    model = transformers.CLIPModel(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        tower, _, inside = name.partition(".")
        third = None
        if name in ALONE:
            theirs = ALONE[name]
        elif inside.split(".")[0] in NORMS:
            theirs = f"{NORMS[inside.split('.')[0]]}.{inside.rpartition('.')[2]}"
        else:
            theirs, third = _in_block(inside)
            theirs = theirs if tower == "text_model" else f"visual.{theirs}"
        if name == "logit_scale":
            parameter.fill_(1.5)
        elif third is not None:
            parameter.copy_(wave((3 * parameter.shape[0], *parameter.shape[1:]), theirs).chunk(3)[third])
        elif name.endswith("projection.weight"):
            parameter.copy_(wave(parameter.shape[::-1], theirs).T)
        else:
            parameter.copy_(wave(parameter.shape, theirs))
    return model


def logits_by_hand(model: Any, texts: Tensor, images: Tensor) -> Tensor:
    """Logits [images, texts] of features."""
    f, t = (each / each.norm(dim=-1, keepdim=True) for each in (images, texts))
    product: Tensor = model.logit_scale.exp() * f @ t.T
    return product


def text_features(model: Any, embedded: Tensor, prompts: list[Tensor], ids: Tensor = IDS) -> Tensor:
    """The features of texts that are embedded, with prompts overwriting places behind the first at later blocks."""
    text, (batch, length) = model.text_model, embedded.shape[:2]
    mask = torch.full((1, 1, length, length), -1e300, dtype=torch.float64).triu(1)
    x = text.embeddings(inputs_embeds=embedded)
    for number, block in enumerate(text.encoder.layers):
        if 0 < number < len(prompts):
            rows = prompts[number].expand(batch, -1, -1)
            x = torch.cat([x[:, :1], rows, x[:, 1 + rows.shape[1] :]], 1)
        x = block(x, mask)
    x = text.final_layer_norm(x)
    features: Tensor = model.text_projection(x[torch.arange(batch), ids.argmax(-1)])
    return features


def table(model: nn.Module) -> Any:
    """What embeds texts."""
    return model.get_submodule("text_model.embeddings.token_embedding")


def learned(model: Any, injection: peftcore.Injection, lr: float) -> list[float]:
    """The losses of 60 steps on six images of three classes."""
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    optimizer, losses = injection.optimizer(torch.optim.SGD, lr=lr, momentum=0.9), []
    for _ in range(60):
        logits = model(input_ids=IDS, pixel_values=images).logits_per_image
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 2, 1, 0]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses
