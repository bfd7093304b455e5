"""What Mix-of-Show's code computes of a text encoder and a UNet with layer-wise words and LoRA, with gradients:
``python -m peftcore.testing.freeze ed_lora.py CHECKOUT``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "TencentARC/Mix-of-Show", "51270fd", "mixofshow/models/edlora.py")
VERSIONS = ("torch", "diffusers", "transformers")
LAYERS, RANK, ALPHA = 4, 2, 0.75
RANDOM, CLASS = [20, 21, 22, 23], [24, 25, 26, 27]
"""Ids of the two words, a token for each cross-attention."""
TEXTS = [[1, 5, RANDOM, CLASS, 7, 2], [1, CLASS, 9, 6, RANDOM, 2]]
"""Two prompts, in which a word stands for the token of each layer."""
WORDS_ALONE, WHOLE = "words", "whole"


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def encoder() -> Any:
    """A text encoder in float64, its parameters waves."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=28,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=2,
    )
    return filled(transformers.CLIPTextModel(config))


def unet() -> Any:
    """A UNet of four cross-attentions in float64: down, middle, and two up. Its parameters are waves."""
    import diffusers

    return filled(
        diffusers.UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )


@torch.no_grad()
def filled(model: Any) -> Any:
    """Fill all parameters, in the order of their names."""
    for number, (_, parameter) in enumerate(sorted(model.double().named_parameters())):
        parameter.copy_(0.3 * wave(*parameter.shape, phase=number))
    return model.eval().requires_grad_(False)


def ids() -> Tensor:
    """The prompts once for each layer, ``[prompts * layers, tokens]``."""
    return torch.tensor(
        [[token[layer] if isinstance(token, list) else token for token in text] for text in TEXTS for layer in range(4)]
    )


def picture() -> tuple[Tensor, Tensor]:
    """Two latents and their timesteps."""
    return wave(2, 2, 4, 4), torch.tensor([3, 500])


def vectors() -> Tensor:
    """Those of the words, the random one first."""
    return 0.1 * wave(8, 12, phase=0.5)


def factors(number: int, A: Tensor, B: Tensor) -> None:
    """Fill the factors of the matrix of that number, in the order of paths."""
    with torch.no_grad():
        A.copy_(0.1 * wave(*A.shape, phase=4.0 + number))
        B.copy_(0.1 * wave(*B.shape, phase=5.0 + number))


def direction(output: Tensor) -> Tensor:
    """Along which outputs are differentiated."""
    return wave(*output.shape, phase=6.0)


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns outputs, and gradients of words, latents and factors by path, flat."""
    authors = load(checkout / SOURCE.script, root=checkout)
    found: dict[str, Any] = {}
    for case in (WORDS_ALONE, WHOLE):
        text, model = encoder(), unet()
        authors.revise_edlora_unet_attention_forward(model)
        table = text.get_input_embeddings().weight
        with torch.no_grad():
            table[RANDOM + CLASS] = vectors()
        table.requires_grad_(True)
        layers: dict[str, Any] = {}
        if case == WHOLE:
            for part, host, kind in (("text", text, "CLIPAttention"), ("unet", model, "Attention")):
                inside = [
                    (f"{part}.{path}.{name}", layer)
                    for path, module in host.named_modules()
                    if type(module).__name__ == kind
                    for name, layer in module.named_modules()
                    if isinstance(layer, nn.Linear)
                ]
                for path, layer in inside:
                    layers[path] = authors.LoRALinearLayer(path, layer, rank=RANK, alpha=ALPHA).double()
            for number, path in enumerate(sorted(layers)):
                factors(number, layers[path].lora_down.weight, layers[path].lora_up.weight)
        latents, times = picture()
        latents.requires_grad_()
        states = text(ids())[0].unflatten(0, (-1, LAYERS))
        output = model(latents, times, states).sample
        (output * direction(output)).sum().backward()
        found[case] = {
            "output": output.flatten().tolist(),
            "words": table.grad[RANDOM + CLASS].flatten().tolist(),
            "latents": latents.grad.flatten().tolist(),
            "A": {path: layer.lora_down.weight.grad.flatten().tolist() for path, layer in layers.items()},
            "B": {path: layer.lora_up.weight.grad.flatten().tolist() for path, layer in layers.items()},
        }
    return found
