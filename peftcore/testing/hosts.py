"""Tiny hosts on which the checks run: they are built from configurations with random weights, and nothing is
downloaded.

They have features of real models that toy models usually do not have: biases and gains that differ from their initial
values, padding in the batch, tied tensors, fused projections, grouped and overlapping convolutions, statistics of batch
norms.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.testing.kit import Build, Host, NotApplicable

WIDTH = 16
VOCABULARY = 40
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


class MLP(nn.Module):
    """Three linear layers; the last one is the head. Inputs have two dimensions before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        logits: Tensor = self.head(self.norm(hidden + self.second(hidden)))
        return logits


class Encoder(nn.Module):
    """A ``nn.TransformerEncoder``. In eval mode its fused path uses weights without calling their modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=24, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        encoded = self.encoder(x, src_key_padding_mask=padding)
        kept = encoded.masked_fill(
            padding[..., None], 0.0
        )  # the fused path leaves other values at padding than the plain one
        logits: Tensor = self.head(kept)
        return logits


class ConvNet(nn.Module):
    """A convolutional network with overlapping kernels, stride, padding, groups, dilation, a batch norm with running
    statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, WIDTH, kernel_size=(3, 1), groups=2, padding="same", bias=False)
        self.last = nn.Conv2d(WIDTH, WIDTH, kernel_size=3, dilation=2, padding=2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.stem(x)))
        hidden = torch.tanh(self.last(torch.tanh(self.grouped(hidden))))
        logits: Tensor = self.head(hidden.mean((-2, -1)))
        return logits


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Add noise to biases, gains and statistics, which are zeros and ones initially. So outputs change if a method
    loses a bias."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in module._buffers.items():
            if buffer is not None and name.startswith("running_"):
                buffer.add_(torch.rand_like(buffer) * 0.5)
    return model


def _mlp() -> tuple[nn.Module, dict[str, Any]]:
    return stir(MLP()), {"x": torch.randn(2, 3, 12)}


def _encoder() -> tuple[nn.Module, dict[str, Any]]:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return stir(Encoder()), {"x": torch.randn(2, 5, WIDTH), "padding": padding}


def _convnet() -> tuple[nn.Module, dict[str, Any]]:
    return stir(ConvNet()), {"x": torch.randn(3, 3, 9, 9)}


def _transformers(config: str, model: str, **sizes: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """Return a function that builds a model of transformers. Transformers is imported when the function is called."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        try:
            library = importlib.import_module("transformers")
        except ImportError as error:
            raise NotApplicable(f"this host needs transformers, which is not installed ({error})") from None
        host = getattr(library, model)(getattr(library, config)(**_TOKENS, **sizes))
        inputs = {
            "input_ids": torch.randint(3, VOCABULARY, (2, 5)),
            "attention_mask": torch.ones(2, 5, dtype=torch.long),
        }
        inputs["attention_mask"][1, 3:] = 0
        if host.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 4))
        return stir(host), inputs

    return build


def gpt2(width: int, layers: int = 2) -> Build:
    """Return a function that builds a GPT-2, which has transposed and fused weights."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    return _transformers("GPT2Config", "GPT2LMHeadModel", **sizes)


def _moe(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {**_DECODER, "num_hidden_layers": layers, "num_local_experts": 3, "num_experts_per_tok": 2}
    host, inputs = _transformers("MixtralConfig", "MixtralForCausalLM", **sizes)()
    for name, parameter in host.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data *= 8  # experts that are far apart, so that rounding to half precision picks no other one
    return host, inputs


def _without_grouped_products(host: Any) -> None:
    """Make the experts run one by one, because torch's grouped matrix product does not support float64."""
    host.set_experts_implementation("eager")


def _vit(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    host, _ = _transformers(
        "ViTConfig",
        "ViTForImageClassification",
        **sizes,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
        num_labels=3,
    )()
    return host, {"pixel_values": torch.randn(2, 1, 8, 8)}


def _diffusers(model: str, **sizes: Any) -> nn.Module:
    """Build a model of diffusers. Diffusers is imported when this is called."""
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise NotApplicable(f"this host needs diffusers, which is not installed ({error})") from None
    host: nn.Module = getattr(library, model)(**sizes)
    return stir(host)


def _unet(levels: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    host = _diffusers(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, WIDTH)[:levels],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:],
        mid_block_type="UNetMidBlock2DCrossAttn" if levels > 1 else "UNetMidBlock2D",
        cross_attention_dim=14,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(2, 2, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 14),
    }
    return host, inputs


def _dit(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    host = _diffusers(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    for name, module in host.named_modules():
        if name.endswith("class_embedder"):
            module.dropout_prob = 0.0  # labels left out at random are the training's noise, not the model's
        elif name.endswith("norm1.linear"):
            module.weight.data *= 3  # gates of attention and feed-forward that let something through
    inputs = {
        "hidden_states": torch.randn(2, 2, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return host, inputs


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    """Build a CLIP, a model that compares features of texts with features of images."""
    shape = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    words = {**_TOKENS, "max_position_embeddings": 8, "hidden_size": WIDTH}
    del words["use_cache"]
    host, _ = _transformers(
        "CLIPConfig",
        "CLIPModel",
        text_config={**shape, **words},
        vision_config={**shape, "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 12},
        projection_dim=WIDTH,
    )()
    ids = torch.randint(3, VOCABULARY - 1, (3, 7))
    ids[:, 0], ids[0, 5], ids[1:, 6] = 1, VOCABULARY - 1, VOCABULARY - 1  # the largest token ends a text
    ids[0, 6] = 0
    return host, {"input_ids": ids, "pixel_values": torch.randn(3, 1, 8, 8)}


def _sample(output: Any) -> Tensor:
    sample: Tensor = output.sample
    return sample


def _of_pairs(output: Any) -> Tensor:
    """Return the logit of each image for the text in the same row, [rows, 1]. So rows do not depend on each other."""
    logits: Tensor = output.logits_per_image
    return logits.diagonal()[:, None]


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _same(output: Tensor) -> Tensor:
    return output


_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def _decoder(kind: str, layers: int = 2, **sizes: Any) -> Build:
    return _transformers(f"{kind}Config", f"{kind}ForCausalLM", num_hidden_layers=layers, **_DECODER, **sizes)


def _mamba(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "state_size": 5, "initializer_range": 0.3}
    host, inputs = _transformers("MambaConfig", "MambaForCausalLM", **sizes)()
    for name, parameter in host.named_parameters():
        if name.endswith(("x_proj.weight", "dt_proj.weight")):  # products round otherwise if they require a gradient
            parameter.requires_grad_(False)
    return host, inputs


def _bert(layers: int = 2) -> Build:
    return _transformers(
        "BertConfig",
        "BertForSequenceClassification",
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.3,
        num_labels=3,
    )


def _t5(layers: int = 2) -> Build:
    return _transformers(
        "T5Config",
        "T5ForConditionalGeneration",
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


HOSTS: dict[str, Host] = {
    host.name: host
    for host in (
        Host("mlp", _mlp, _same, fallback=["first", "second"]),
        Host("encoder", _encoder, _same, fallback=["linear1", "linear2"]),
        Host("llama", _decoder("Llama"), _logits, shallow=_decoder("Llama", 1)),
        Host("bert", _bert(), _logits, shallow=_bert(1)),
        Host("t5", _t5(), _logits, shallow=_t5(1)),
        Host("gpt2", gpt2(WIDTH), _logits, shallow=gpt2(WIDTH, 1)),
        Host("moe", _moe, _logits, shallow=partial(_moe, 1), in_double=_without_grouped_products),
        Host(
            "mistral", _decoder("Mistral", sliding_window=3), _logits, shallow=_decoder("Mistral", 1, sliding_window=3)
        ),
        Host("vit", _vit, _logits, shallow=partial(_vit, 1)),
        Host("unet", _unet, _sample, shallow=partial(_unet, 1)),
        Host("dit", _dit, _sample, shallow=partial(_dit, 1)),
        Host("convnet", _convnet, _same, fallback=["stem", "grouped", "last"]),
    )
}
"""The default hosts of all checks, by name."""

APART: dict[str, Host] = {
    host.name: host
    for host in (
        Host("clip", _clip, _of_pairs),
        Host("mamba", _mamba, _logits, shallow=partial(_mamba, 1), like="llama"),
    )
}
"""Hosts for special methods only: a method runs on one of them only if its test names the host in `hosts`."""
ALL_HOSTS: dict[str, Host] = {**HOSTS, **APART}
