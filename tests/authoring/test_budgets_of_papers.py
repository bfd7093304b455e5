"""What papers print of their parameters, and what `plan` counts for the same options in the same model: two at least
for each category. Models are on the meta device; nothing is allocated."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import timm
import torch
import transformers
from torch import nn

import peftcore

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
T5 = {"d_ff": 2048, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa base": lambda: of("Roberta", "Model", vocab_size=50265, max_position_embeddings=514),
    "RoBERTa large": lambda: of(
        "Roberta",
        "Model",
        vocab_size=50265,
        max_position_embeddings=514,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
    "BERT base": lambda: of("Bert", "Model"),
    "Longformer": lambda: of("Longformer", "Model", vocab_size=50265, max_position_embeddings=4098),
    "BART large": lambda: of("Bart", "ForConditionalGeneration"),
    "Llama 7B": lambda: of("Llama", "ForCausalLM"),
    "Llama 13B": lambda: of(
        "Llama", "ForCausalLM", hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "T5 base": lambda: of("T5", "ForConditionalGeneration", d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "T5 large": lambda: of("T5", "ForConditionalGeneration", d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "T5 XL": lambda: of(
        "T5", "ForConditionalGeneration", **T5 | {"d_model": 2048, "d_ff": 5120}, num_layers=24, num_heads=32
    ),
    "ViT-B/16": lambda: timm.create_model("vit_base_patch16_224", num_classes=0),
    "CLIP": lambda: of("CLIP", "Model"),
    "CLIP ViT-B/32": lambda: of("CLIPVision", "Model"),
    "SD 1.5 UNet": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768),
    "SDXL UNet": lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "SD 1.5 UNet and text encoder": lambda: nn.ModuleList(
        [
            diffusers.UNet2DConditionModel(cross_attention_dim=768),
            of("CLIPText", "Model", hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        ]
    ),
    "FLUX.1-dev": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
}


def of(family: str, task: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**sizes)
    host: nn.Module = getattr(transformers, f"{family}{task}")(config)
    return host


@functools.cache
def host(name: str) -> nn.Module:
    with torch.device("meta"):
        return HOSTS[name]()


@dataclass(frozen=True)
class Row:
    """A count that a paper prints."""

    method: str
    host: str
    printed: float
    """The number, or its share of the host's parameters in per cent."""
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    share: str = ""
    """Of what it is a share: the "model", or "all" with the adapter."""
    within: float = 0.0
    """How far the number may be off: half of the last digit that is printed."""
    less: int = 0
    """Numbers that the paper does not count."""


ROWS = [
    # additive
    Row("ia3", "T5 XL", 0.54e6, "T-Few, 2205.05638: 0.54M", within=5e3),
    Row("llama_adapter", "Llama 7B", 1.2e6, "2303.16199: 1.2M", within=5e4),
    Row("prompt_tuning", "T5 large", 102_400, "2104.08691: length times width", {"length": 100}),
    Row("dept", "T5 base", 76.8e3, "2309.05173: m = 40, r = 45, as many as a prompt of 100 rows"),
    Row("compacter", "T5 base", 0.073, "2106.04647, table 1: 0.073 %", share="model", within=5e-4),
    Row("adamix", "RoBERTa large", 0.8e6, "2205.12410: 0.8M, once experts are merged", {"experts": 1}, within=5e4),
    Row("lpt", "RoBERTa large", 792e3, "2210.11292, table 1: 792K with the naive generator", within=500),
    Row("prefix_propagation", "Longformer", 0.05, "2305.12086: 0.05 % of Longformer base", share="model", within=5e-3),
    Row("houlsby_adapter", "BERT base", 2.1, "1902.00751, table 1: 2.1 %, size 64", {"bottleneck": 64}, "model", 0.15),
    # reparameterized
    Row("lora", "RoBERTa base", 294_912, "2106.09685, table 2: 0.3M", {"rank": 8}),
    Row("lora", "RoBERTa large", 786_432, "2106.09685, table 2: 0.8M", {"rank": 8}),
    Row("vera", "RoBERTa base", 0.043e6, "2310.11454, table 2", {"rank": 1024}, within=5e2),
    Row("vera", "RoBERTa large", 0.061e6, "2310.11454, table 2", {"rank": 256}, within=5e2),
    Row("fourierft", "RoBERTa base", 0.024e6, "2405.03003, table 2", {"n_frequency": 1000}, within=5e2),
    Row("fourierft", "Llama 7B", 0.064e6, "2405.03003, table 4", {"n_frequency": 1000}, within=5e2),
    Row(
        "lora_xs",
        "RoBERTa large",
        60_000,
        "2405.17604: 60K, rank 25",
        {"rank": 25, "target": ["query", "value", "attention.output.dense", "output.dense"]},
    ),
    Row("lora", "Llama 7B", 0.83, "2402.09353, table 1", {"rank": 32, "target": FIVE}, "all", 5e-3),
    Row("dora", "Llama 7B", 0.84, "2402.09353, table 1", {"rank": 32, "target": FIVE}, "all", 5e-3),
    Row("pissa", "Llama 7B", 320e6, "2404.02948: 320M", {"rank": 128, "target": LLAMA_LINEAR}, within=5e5),
    # selective
    Row("bitfit", "RoBERTa base", 0.1e6, "2106.09685, table 2: 0.1M", within=5e4),
    Row("tiny_attention_adapter", "RoBERTa large", 0.05, "2211.01979, abstract: 0.05 %", share="model", within=5e-3),
    Row("bitfit", "BERT base", 0.09, "2106.10199: 0.09 %", share="model", within=5e-3),
    # hybrid: the networks that make prefixes are left out, as they are when a model is saved
    Row("mam_adapter", "BART large", 6.7, "2110.04366, table 4", {"prefix_mid_dim": None}, "model", 5e-2),
    Row(
        "mam_adapter",
        "RoBERTa base",
        0.5,
        "2110.04366, table 5",
        {"prefix_length": 16, "prefix_mid_dim": None, "ffn_bottleneck": 16},
        "model",
        5e-2,
    ),
    # quantized
    Row("qlora", "Llama 7B", 160e6, "2305.14314: rank 64 at all layers", {"rank": 64}, within=5e5),
    Row("peqa", "Llama 7B", 1.36e6, "2305.14152", within=5e3),
    Row("peqa", "Llama 13B", 2.13e6, "2305.14152", within=5e3),
    # multitask
    Row("multitask_prompt_tuning", "T5 base", 77.6e3, "2303.02861, table 1: 77.6K", {"length": 100}, within=100),
    Row(
        "hyperformer_pp",
        "T5 base",
        8 * 0.29,
        "2106.04489: 0.29 % a task, for eight tasks",
        {"tasks": 8},
        "model",
        8 * 5e-3,
    ),
    Row(
        "hyperformer",
        "T5 base",
        8 * 6.86,
        "2106.04489: 6.86 % a task, for eight tasks",
        {"tasks": 8},
        "model",
        8 * 5e-3,
    ),
    Row("mixlora", "Llama 7B", 2.9, "2404.15159: 2.9 %, rank 16, eight experts", {"rank": 16}, "model", 5e-2),
    Row(
        "attempt",
        "T5 base",
        232e3,
        "2205.11961: 232K, without six prompts",
        {"train_norm": True},
        within=500,
    ),
    Row("pal", "BERT base", 13, "1902.02671, table 2: 1.13 times BERT, for eight tasks", {"tasks": 8}, "model", 0.5),
    Row(
        "pha",
        "T5 base",
        8 * 616e3,
        "2310.11670: 616K a task, for eight tasks; met by adapters 40 wide",
        {"tasks": 8, "bottleneck": 40},
        within=8 * 500,
    ),
    Row(
        "hydralora",
        "Llama 7B",
        0.124,
        "2404.19245: q and v, three heads, without routers",
        {"rank": 8, "heads": 3, "target": ["q_proj", "v_proj"]},
        "model",
        5e-4,
        64 * 3 * 4096,
    ),
    # vision
    Row("ssf", "ViT-B/16", 205_824, "2210.08823: 0.2M"),
    Row("convpass", "ViT-B/16", 0.33e6, "2207.07039: 0.33M", within=5e3),
    Row("vpt_deep", "ViT-B/16", 460_800, "2203.12119: length 50 in 12 layers", {"length": 50}),
    Row(
        "aim",
        "ViT-B/16",
        11e6 - (768 + 1) * 400,
        "taoyang1122/adapt-image-models at b3580d2, README.md: 11M with a head of 400 classes",
        {"frames": 32},
        within=3e4,
    ),
    Row("dtl", "ViT-B/16", 0.04e6, "2312.07856: 0.04M", within=5e3),
    Row("coop", "CLIP", 8_192, "2109.01134: 16 vectors of 512", {"length": 16}),
    Row(
        "kadaptation",
        "CLIP ViT-B/32",
        79_699 - 29_523,
        "eric-ai-lab/PEViT at be6fb43, README.md: 79,699 with heads, which alone have 29,523",
    ),
    # diffusion
    Row(
        "svdiff",
        "SD 1.5 UNet",
        322_856,
        "phymhan/SVDiff at 4ca843c: a number a singular value, and one an entry of vectors",
    ),
    Row(
        "controlnext",
        "SD 1.5 UNet",
        3_526_400,
        "dvlab-research/ControlNeXt at ab4b3ac: ControlNeXtModel(), without matrices of the base",
        {"base": "none"},
    ),
    Row("controlnet_xs", "SD 1.5 UNet", 53e6, "vislearn/ControlNet-XS, sd15_encD_canny_53m.yaml", within=5e5),
    Row(
        "controlnet_lora",
        "SDXL UNet",
        395_733_680 / 2,
        "stabilityai/control-lora@75590eb, control-lora-canny-rank128.safetensors: 395,733,680 bytes of float16, of "
        "which about 175,000 are names",
        within=1e5,
    ),
    Row("scedit", "SD 1.5 UNet", 19.68e6, "modelscope/ms-swift, GetStarted/SCEdit.md: 19.68M (in 2.1)", within=5e3),
    Row(
        "scedit",
        "SD 1.5 UNet",
        0.079 * 364.2e6,
        "2312.11392, abstract: 7.9 % of ControlNet, which in 2.1 has 364.2M",
        {"channels": 3, "kernel": 1},
        within=5e-4 * 364.2e6,
    ),
    Row("ominicontrol", "FLUX.1-dev", 0.1, "2411.15098, abstract: 0.1 %", share="model", within=5e-2),
    Row(
        "lidb",
        "SD 1.5 UNet and text encoder",
        25_000,
        "2307.06949, contributions: roughly 100 KB (of float32), and elsewhere 120",
        within=2_500,
    ),
    Row("perfusion", "SD 1.5 UNet", 100e3 / 4 / 2, "2305.01644, abstract: 100 KB, of values and of keys", within=50),
    Row("custom_diffusion", "SD 1.5 UNet", 19.17e6, "2212.04488: 75 MB of float32", within=2e5),
]


def ident(row: Row) -> str:
    return f"{row.method}-{row.host}"


@pytest.mark.share(3)
@pytest.mark.parametrize("row", ROWS, ids=ident)
def test_a_paper_counts_the_same(row: Row) -> None:
    model = host(row.host)
    count = peftcore.plan(model, row.method, **row.options).trainable - row.less
    whole = sum(p.numel() for p in model.parameters()) + (count if row.share == "all" else 0)
    found = 100 * count / whole if row.share else count
    assert abs(found - row.printed) <= row.within, (found, row.source)


# Not met: lst on T5 base, 1.74 % (2206.06522), since the paper has ladders beside encoder and decoder, and ours stand
# beside one stack (1.07 %); mov on T5 XL, where .286 and .857 % are counted and .32 and .68 % remembered (2309.05444).


def test_each_category_has_two() -> None:
    categories = Counter(peftcore.method(row.method).tags.category for row in ROWS)
    assert set(categories) == set(peftcore.contract.method.CATEGORIES)
    assert min(categories.values()) >= 2
