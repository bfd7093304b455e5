"""A model, a CSV and a JSONL small enough that a whole comparison takes a second."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

GOOD = ("fine", "lovely", "happy", "great")
BAD = ("awful", "sad", "broken", "late")
REST = ("the", "plane", "was", "my", "phone", "is", "and", "so", "today")
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test forgets to place elsewhere lands in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """Texts whose label shows in one word."""
    draw = random.Random(0)
    table = []
    for index in range(120):
        label, words = ("good", GOOD) if index % 2 else ("bad", BAD)
        text = [*draw.choices(REST, k=draw.randint(1, 8)), draw.choice(words)]
        draw.shuffle(text)
        table.append({"id": str(index), "text": " ".join(text), "label": label})
    return table


@pytest.fixture
def csv_file(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["id", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def jsonl_file(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    """The same texts under other names, with integers for labels."""
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"Review": row["text"], "stars": 1 if row["label"] == "good" else 0}) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path) -> int:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *REST]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT encoder (pooler included) and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=vocabulary, **TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def still(encoder: Path, tmp_path: Path) -> Path:
    """Without dropout, of which each process draws its own."""
    folder = tmp_path / "still"
    folder.mkdir()
    for file in encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    described |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def poolerless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without pooler weights, as masked-language models are published."""
    folder = tmp_path_factory.mktemp("poolerless")
    config = transformers.BertConfig(vocab_size=save_tokenizer(folder), **TINY)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose tokenizer has no padding token."""
    folder = tmp_path_factory.mktemp("decoder")
    size = save_tokenizer(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer,
        unk_token="[UNK]",
        eos_token="[SEP]",
    )
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{a} phone"}, {"role": "assistant", "content": b}]
        for a, b in [("my", "fine"), ("the", "lovely"), ("so", "awful")] * 8
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    return path


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def talker(decoder: Path, tmp_path: Path) -> Path:
    """The decoder with a chat template."""
    folder = shutil.copytree(decoder, tmp_path / "talker")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Path(folder)
