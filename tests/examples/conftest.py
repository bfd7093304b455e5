"""A chat model small enough for a test, that reads the words of the examples."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of whole words."""
    text = (EXAMPLES / "chat-style" / "train.jsonl").read_text(encoding="utf-8")
    marks = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<pad>"}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=list(marks.values()), show_progress=False)
    said = (message["content"] for line in text.splitlines() for message in json.loads(line)["messages"])
    words.train_from_iterator([*said, "user assistant"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("talker")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
