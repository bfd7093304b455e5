"""Small models under the names of large ones, in a cache as the hub's library keeps it: code that names a model runs
without a network, and on one core."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import transformers

COMMIT = "0" * 40
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def text(folder: Path, positions: int = 77) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {word: at for at, word in enumerate([*marks, *letters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=positions, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def llama(folder: Path) -> None:
    tokenizer = text(folder, 256)
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def encoder(folder: Path) -> None:
    tokenizer = text(folder, 128)
    transformers.BertModel(
        transformers.BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0)
    ).save_pretrained(folder)


def vit(folder: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=1000)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=64,
    )
    words = text(folder / "tokenizer")
    clip = transformers.CLIPTextConfig(
        **SIZES, vocab_size=len(words), max_position_embeddings=77, projection_dim=32, pad_token_id=0, eos_token_id=2
    )
    torch.manual_seed(0)
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(clip),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
    ).save_pretrained(folder)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M": llama,
    "meta-llama/Llama-3.2-1B": llama,
    "sentence-transformers/all-MiniLM-L6-v2": encoder,
    "google/vit-base-patch16-224": vit,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
}
"""What pages may name."""


def named_in(page: str) -> list[str]:
    """The models that a text names."""
    return [name for name in MODELS if name in page]


def stand_in(cache: Path, name: str) -> None:
    """Put a model of that name into a cache, unless it is there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    if folder.exists():
        return
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT, encoding="utf-8")
    MODELS[name](snapshot)
    for config in snapshot.rglob("config.json"):
        known = json.loads(config.read_text(encoding="utf-8"))
        assert known, f"{name} has an empty {config.name}"
