"""What TRL's tests fetch from the hub, made here by the scripts of a checkout of TRL: small models with random weights,
tokenizers with a small vocabulary, and the data sets.

The scripts run as they are. What they fetch themselves (tokenizers, and configurations of which they change some
entries) is made here too; what they would send to the hub goes into a folder that is laid out as the hub's cache.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import tokenizers
import torch
import transformers

MODELS = (
    "for_causal_lm.qwen2_for_causal_lm_2_5",
    "for_causal_lm.qwen3_for_causal_lm",
    "for_causal_lm.qwen3_moe_for_causal_lm",
    "for_causal_lm.llama_for_causal_lm_3_2",
    "for_causal_lm.mistral_for_causal_lm_0_2",
    "for_causal_lm.gpt_oss_for_causal_lm",
    "for_conditional_generation.qwen2_5_vl_for_conditional_generation",
    "for_conditional_generation.t5_for_conditional_generation",
    "for_sequence_classification.qwen2_for_sequence_classification_2_5",
)
"""The scripts of the models of the tests that are run."""
DATA = ("generate_zen_dataset", "generate_zen_image_dataset")
ORGANIZATION = "trl-internal-testing"
COMMIT = "0" * 40
WORDS = 500
"""Tokens beside those that stand for single bytes and those of templates."""

TOKENS: dict[str, tuple[str | None, str, str, str | None]] = {
    # the beginning of a base's name: its template in TRL, the end of a text, the padding, the start of a text
    "Qwen/Qwen2.5-VL": ("qwen2_5_vl", "<|im_end|>", "<|endoftext|>", None),
    "Qwen/Qwen2.5": ("qwen2_5", "<|im_end|>", "<|endoftext|>", None),
    "Qwen/Qwen3": ("qwen3", "<|im_end|>", "<|endoftext|>", None),
    "meta-llama/": ("llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>"),
    "mistralai/": (None, "</s>", "<unk>", "<s>"),
    "openai/gpt-oss": ("gptoss", "<|return|>", "<|endoftext|>", "<|startoftext|>"),
    "google/flan-t5": (None, "</s>", "<pad>", None),
}
CONFIGS = {
    "Qwen/Qwen2.5-VL": transformers.Qwen2_5_VLConfig,
    "Qwen/Qwen2.5": transformers.Qwen2Config,
    "google/flan-t5": transformers.T5Config,
}
SEEN = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
}
"""Entries of a configuration of a model that sees, and their tokens."""


class Hub:
    """A folder with what the tests fetch.

    Attributes:
        checkout: the checkout of TRL.
        home: the folder: what `HF_HOME` names, for models; and with data sets in ``zen``.
    """

    def __init__(self, checkout: Path, home: Path) -> None:
        self.checkout = checkout
        self.home = home
        self._texts: list[str] = []

    def make(self) -> None:
        """Make everything, data sets first: tokenizers learn from their texts."""
        sys.path.insert(0, str(self.checkout))
        for name in DATA:
            with mock.patch.object(
                datasets.DatasetDict, "push_to_hub", lambda *data, **to: self._keep_data(*data, **to)
            ):
                importlib.import_module(f"scripts.{name}").main(0.1, True, f"{ORGANIZATION}/{_dashed(name)}")
        common: Any = importlib.import_module("scripts.generate_tiny_models._common")
        for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff", "smoke_test"):
            setattr(common, name, lambda *_, **__: None)
        common.push_to_hub = self._keep_model
        with self._made_here():
            for name in MODELS:
                torch.manual_seed(0)
                importlib.import_module(f"scripts.generate_tiny_models.{name}")

    def tokenizer(self, base: str) -> Any:
        """Returns a tokenizer that stands for that of a base."""
        template, end, padding, start = _of(base, TOKENS)
        written = (self.checkout / f"trl/chat_templates/{template}.jinja").read_text() if template else None
        special = {end, padding, *filter(None, [start, written and "<|im_start|>"])}
        special.update(re.findall(r"<\|[a-z_]+\|>", written or ""))
        plain = tokenizers.Tokenizer(tokenizers.models.BPE())
        plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        plain.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        plain.train_from_iterator(
            self._texts,
            tokenizers.trainers.BpeTrainer(
                vocab_size=len(alphabet) + len(special) + WORDS,
                special_tokens=sorted(special),
                initial_alphabet=sorted(alphabet),
                show_progress=False,
            ),
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain, eos_token=end, pad_token=padding, bos_token=start, chat_template=written
        )

    def config(self, base: str, **changes: Any) -> Any:
        """Returns a configuration that stands for that of a base."""
        kind = _of(base, CONFIGS)
        tokens = self.tokenizer(base)
        if kind is not transformers.Qwen2_5_VLConfig:
            return kind(**changes)
        text = {"intermediate_size": 32, **changes.pop("text_config")}
        return kind(
            text_config=text, **{key: tokens.convert_tokens_to_ids(token) for key, token in SEEN.items()}, **changes
        )

    def generation(self, base: str, **_: Any) -> Any:
        """Returns how a base generates."""
        tokens = self.tokenizer(base)
        return transformers.GenerationConfig(
            do_sample=True,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
        )

    def processor(self, base: str) -> Any:
        """Returns what makes inputs of texts and images for a base."""
        tokens = self.tokenizer(base)
        return transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(),
            tokenizer=tokens,
            video_processor=transformers.Qwen2VLVideoProcessor(),
            chat_template=tokens.chat_template,
        )

    @contextmanager
    def _made_here(self) -> Iterator[None]:
        """Context manager in which what scripts fetch is made here."""
        made = {
            "AutoTokenizer": lambda base, **_: self.tokenizer(base),
            "AutoConfig": self.config,
            "AutoProcessor": lambda base, **_: self.processor(base),
            "GenerationConfig": self.generation,
        }
        with ExitStack() as stack:
            for name, make in made.items():
                stack.enter_context(mock.patch.object(getattr(transformers, name), "from_pretrained", make))
            yield

    def _keep_model(self, model: Any, tokenizer: Any, generation: Any, prefix: str = "", suffix: str = "") -> None:
        name = "-".join(filter(None, [prefix, type(model).__name__, suffix]))
        there = self.home / "hub" / f"models--{ORGANIZATION}--{name}"
        (there / "refs").mkdir(parents=True)
        (there / "refs" / "main").write_text(COMMIT)
        for part in (model, tokenizer, generation):
            part.save_pretrained(there / "snapshots" / COMMIT)

    def _keep_data(self, data: Any, repository: str, config_name: str = "default") -> None:
        for split, rows in data.items():
            there = self.home / "zen" / repository / config_name
            there.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(there / f"{split}.parquet")
            self._texts += [text for row in rows for value in row.values() for text in _texts(value)]


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in an entry of a data set."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _dashed(script: str) -> str:
    return script.removeprefix("generate_").removesuffix("_dataset").replace("_", "-")


def _of(base: str, table: dict[str, Any]) -> Any:
    return next(value for start, value in table.items() if base.startswith(start))
