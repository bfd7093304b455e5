"""Models to train, as transformers loads them."""

import json
import shutil
from pathlib import Path

import transformers

from peftcore.models.loading import from_pretrained


def test_a_configuration_that_asks_for_code_of_the_hub_gets_attention_of_transformers(
    decoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(decoder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    wish = {"attn_implementation": "kernels-community/flash-attn", "experts_implementation": "someone/experts"}
    (folder / "config.json").write_text(json.dumps({**settings, **wish}))
    model = from_pretrained(transformers.AutoModelForCausalLM, folder)
    assert model.config._attn_implementation == "sdpa"
