"""Models of a few thousand parameters and data to learn, in seconds and without a network. Each builder is seeded, so a
second call gives the same weights, and imports the library of its model alone."""

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import TensorDataset

COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "black": "schwarz", "white": "weiß", "grey": "grau"}
NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}


def text_classifier() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(_bert(64))


def texts(count: int = 512) -> list[dict[str, Tensor]]:
    """Rows of eight words; the label says whether the first is one of the first half of the vocabulary."""
    ids = torch.randint(2, 64, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] < 32).long()} for row in ids]


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes)


def convnet() -> nn.Module:
    """Without batch norms, which differential privacy rules out."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def pictures(count: int = 512) -> TensorDataset:
    """Handwritten digits [1, 8, 8] between -1 and 1, and what they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:count], dtype=torch.float32).unsqueeze(1)
    return TensorDataset(images / 8 - 1, torch.tensor(digits.target[:count]))


def unet() -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    widths = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **widths, **blocks)


def save_encoder(folder: str) -> str:
    """Write a BERT that knows colours and numbers in two languages, with its tokenizer, and return the folder."""
    marks = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>"}
    said = [*COLOURS, *COLOURS.values(), *NUMBERS, *NUMBERS.values()]
    known = {word: index for index, word in enumerate([*marks.values(), *said])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertModel(_bert(len(known))).save_pretrained(folder)
    return folder


def pairs(times: int = 4) -> dict[str, list[str]]:
    """Texts of a colour and a number, and their translations."""
    both = [(colour, number) for colour in COLOURS for number in NUMBERS] * times
    translated = [f"{COLOURS[colour]} {NUMBERS[number]}" for colour, number in both]
    return {"anchor": [" ".join(words) for words in both], "positive": translated}


def _bert(words: int) -> transformers.BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertConfig(vocab_size=words, max_position_embeddings=16, **sizes)
