"""What Mix-of-Show's code computes of a text encoder and a UNet with layer-wise words and LoRA, with gradients, what
both start from, what trains, and options: ``python -m peftcore.testing.freeze ed_lora.py CHECKOUT``."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import yaml
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "TencentARC/Mix-of-Show", "51270fd", "mixofshow/models/edlora.py")
VERSIONS = ("torch", "diffusers", "transformers")
LAYERS, RANK, ALPHA = 4, 2, 0.75
RANDOM, CLASS = [20, 21, 22, 23], [24, 25, 26, 27]
"""Ids of the two words, a token for each cross-attention."""
TEXTS = [[1, 5, RANDOM, CLASS, 7, 2], [1, CLASS, 9, 6, RANDOM, 2]]
"""Two prompts, in which a word stands for the token of each layer."""
WORDS_ALONE, WHOLE = "words", "whole"
OPTIONS = "options/train/EDLoRA/real/8101_EDLoRA_potter_Cmix_B4_Repeat500.yml"
"""The file of options of the learning rate too."""
VOCABULARY, MAN, NEW = 60, 7, 28
"""Tokens of the encoder where words start: the id of the class, and the first of two words of 16 tokens."""
WIDE = 40_000
"""Width of a table of tokens, of which the start of a vector can be compared."""


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that everybody can make again."""
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers**1.5 + phase).view(shape)


def encoder(vocabulary: int = 28, width: int = 12, layers: int = 2) -> Any:
    """A text encoder in float64, its parameters waves."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
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


class Tokenizer:
    """A tokenizer that has room for all new tokens in its vocabulary, and knows one old word."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __len__(self) -> int:
        return VOCABULARY

    def add_tokens(self, names: list[str]) -> int:
        self.names += names
        return len(names)

    def convert_tokens_to_ids(self, name: str) -> int:
        return NEW + self.names.index(name)

    def encode(self, text: str, **rest: Any) -> list[int]:
        return {"man": [MAN]}[text]


def trainers(checkout: Path) -> Any:
    """The module of their trainer, which tells nobody what it does."""
    absent = ["mixofshow.pipelines.pipeline_edlora", "mixofshow.utils.ptp_util"]
    authors = load(checkout / "mixofshow/pipelines/trainer_edlora.py", checkout, absent)
    authors.get_logger = MagicMock()
    return authors


def options(checkout: Path) -> Any:
    """Options of their trainer in the file of one subject."""
    return yaml.safe_load((checkout / OPTIONS).read_text(encoding="utf-8"))["models"]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what V_rand is drawn from, the different rows that it has and those of V_class, and starts of factors."""
    authors, told = trainers(checkout), options(checkout)
    tables = []
    for text in (encoder(VOCABULARY, WIDE, layers=0), encoder(VOCABULARY)):
        trainer = SimpleNamespace(tokenizer=Tokenizer(), text_encoder=text)
        names = told["new_concept_token"], told["initializer_token"]
        found = authors.EDLoRATrainer.init_new_concept(trainer, *names, enable_edlora=True)
        random, known = (text.get_input_embeddings().weight[each["concept_token_ids"]] for each in found.values())
        tables.append((random.detach(), known.detach()))
    (wide, _), (narrow, known) = tables
    factors = authors.LoRALinearLayer("layer", nn.Linear(200, 3), rank=200)
    return {
        "random": drawn(wide[0]),
        "random rows": len(narrow.unique(dim=0)),
        "class": known.tolist(),
        "A": drawn(factors.lora_down.weight),
        "B": drawn(factors.lora_up.weight),
    }


def trains(checkout: Path) -> dict[str, Any]:
    """Returns the ids of words, of which alone their loop leaves the table changed; and sizes of factors by matrix."""
    authors, told = trainers(checkout), options(checkout)
    tiny = {"CLIPTokenizer": Tokenizer(), "CLIPTextModel": encoder(VOCABULARY), "UNet2DConditionModel": unet()}
    mocks = {name: MagicMock() for name in ("AutoencoderKL", "DDPMScheduler", *tiny)}
    for name, model in tiny.items():
        mocks[name].from_pretrained.return_value = model
    mocks["AutoencoderKL"].from_pretrained.return_value = nn.Linear(1, 1)
    with patch.multiple(authors, is_xformers_available=lambda: True, **mocks):
        trainer = authors.EDLoRATrainer(**told)
    parts = {"text": trainer.text_encoder_lora, "unet": trainer.unet_lora}
    trained = {name for name, each in trainer.named_parameters() if each.requires_grad}
    found = {
        f"{part}.{layer.name}": [each.numel() for each in layer.parameters() if each.requires_grad]
        for part, layers in parts.items()
        for layer in layers
    }
    return {
        "words": trainer.get_all_concept_token_ids(),
        "besides factors": [name for name in trained if "lora" not in name],
        "factors": found,
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns options of the file of one subject, where the matrices of both models have the same."""
    told = options(checkout)["finetune_cfg"]
    text, unet = (told[name]["lora_cfg"] for name in ("text_encoder", "unet"))
    signature = inspect.signature(trainers(checkout).LoRALinearLayer).parameters
    assert text["rank"] == unet["rank"] == signature["rank"].default
    assert text["alpha"] == unet["alpha"] == signature["alpha"].default
    random, _ = options(checkout)["initializer_token"].split("+")
    deviation = float(random.removeprefix("<rand-").removesuffix(">"))
    return {
        "rank": unet["rank"],
        "alpha": unet["alpha"],
        "random_std": deviation,
        "word_lr": told["text_embedding"]["lr"],
    }
