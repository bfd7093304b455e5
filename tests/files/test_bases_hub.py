"""Bases on a hub: what is fetched, when, and at which commit. The hub is a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, outside, serving

pytest.importorskip("huggingface_hub")
transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

BEGIN = """
import json, logging, os, sys
import torch, transformers
from pathlib import Path
import peftcore
from peftcore.errors import PeftcoreError

said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("peftcore").addHandler(Said())
ids = torch.arange(1, 9)[None]

def adapted(base):
    injection = peftcore.apply(base, "lora", rank=2)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(0.3)
    return injection

@torch.no_grad()
def outputs(base):
    return base(ids).logits.flatten().tolist()

def told(action):
    try:
        action()
    except PeftcoreError as error:
        return [type(error).__name__, str(error)]
    return None
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An adapter is made on a base of a hub, and loaded where the cache is empty; then the base moves on."""
    work = tmp_path_factory.mktemp("work")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for seed in ("0", "1"):
        torch.manual_seed(int(seed))
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(work / seed)
    with serving() as hub:
        hub.add_folder("someone/base", work / "0")
        more = ["modeling_evil.py", "pytorch_model.bin", "model.fp16.safetensors", "tokenizer.json"]
        first = hub.repositories["someone/base"].commit(dict.fromkeys(more, b"{}"))
        return {**outside(_script(work), hub, work / "home", HF_TOKEN=TOKEN), "first": first}


def _script(work: Path) -> str:
    return f"""{BEGIN}
import shutil
os.chdir({str(work)!r})
base = transformers.LlamaForCausalLM.from_pretrained("someone/base").eval()
injection = adapted(base)
injection.save("adapter")
injection.save("of-peft", format="peft")
injection.push_to_hub("someone/adapter")
local = transformers.LlamaForCausalLM.from_pretrained({str(work / "0")!r})
adapted(local).push_to_hub("someone/of-a-folder")
own = peftcore.load_base("adapter")
found = {{
    "expected": outputs(base), "cached": outputs(own),
    "revision": json.loads(Path("of-peft/adapter_config.json").read_text())["revision"],
    "commit": json.loads(Path("adapter/adapter.json").read_text())["base_revision"],
    "name": [own.config._name_or_path, own.config._commit_hash], "card": Path("adapter/README.md").read_text(),
}}

shutil.rmtree("home/hub")
files = lambda: sorted(each.name for each in Path("home").rglob("snapshots/*/*"))
found |= {{"absent": told(lambda: peftcore.load_base("someone/adapter")), "before": files()}}
found["peft"] = told(lambda: peftcore.load_base("of-peft"))
fetched = peftcore.load_base("someone/adapter", fetch=True)
found |= {{"fetched": outputs(fetched), "after": files()}}
found["then"] = outputs(peftcore.load_base("of-peft"))
found["folder"] = told(lambda: peftcore.load_base("someone/of-a-folder", fetch=True))
found["folder by name"] = outputs(peftcore.load_base("someone/of-a-folder", base={str(work / "0")!r}))
found["gone"] = told(lambda: peftcore.load_base("adapter", base="someone/none", fetch=True))
found["branch"] = told(lambda: peftcore.load_base("adapter", base_revision="v9", fetch=True))
found["quiet"] = list(said)

from huggingface_hub import HfApi
second = HfApi().upload_folder(repo_id="someone/base", folder_path="1").oid
shutil.rmtree("home/hub")
transformers.LlamaForCausalLM.from_pretrained("someone/base")
found |= {{"second": second, "moved on": told(lambda: peftcore.load_base("adapter"))}}
found["there"] = outputs(peftcore.load_base("adapter", base_revision=second))
found["told"] = list(said)
found["two"] = outputs(peftcore.load_base("adapter", fetch=True))
twice = transformers.LlamaForCausalLM.from_pretrained("someone/base")
adapted(twice).save("twice")
found["unsure"] = json.loads(Path("twice/adapter.json").read_text())["base_revision"]
print(json.dumps(found))
"""


def test_the_commit_of_the_base_is_recorded(found: dict[str, Any]) -> None:
    assert found["commit"] == found["first"] and found["unsure"] is None
    assert found["name"] == ["someone/base", found["first"]] and found["revision"] == found["first"]
    assert "base_model: someone/base\nbase_model_relation: adapter\n" in found["card"]


def test_a_base_in_the_cache_is_taken(found: dict[str, Any]) -> None:
    assert found["cached"] == found["expected"]


def test_a_base_that_is_not_there_is_not_fetched(found: dict[str, Any]) -> None:
    kind, words = found["absent"]
    assert kind == "CheckpointError" and "fetch=True" in words and "base=" in words
    assert "someone/base at revision " + found["first"] in words
    assert found["before"] == ["adapter.json", "adapter.safetensors"]
    assert found["peft"][0] == "CheckpointError" and "fetch=True" in found["peft"][1]


def test_configuration_and_safetensors_are_fetched_at_the_commit(found: dict[str, Any]) -> None:
    assert found["fetched"] == found["then"] == found["expected"]
    assert set(found["after"]) - set(found["before"]) == {"config.json", "generation_config.json", "model.safetensors"}
    assert not [each for each in found["quiet"] if "commit" in each]


def test_another_commit_is_told(found: dict[str, Any]) -> None:
    """A cache that has another one is not taken in silence."""
    assert f"base_revision='{found['second']}' for the cached revision" in found["moved on"][1]
    assert found["there"] != found["expected"] == found["two"]
    (words,) = [each for each in found["told"] if "commit" in each]
    assert found["first"][:12] in words and found["second"][:12] in words


def test_a_file_from_a_hub_names_no_folders_here(found: dict[str, Any]) -> None:
    kind, words = found["folder"]
    assert kind == "CheckpointError" and "names no local folder" in words and "base=" in words
    assert found["folder by name"] == found["expected"]


def test_what_the_hub_lacks(found: dict[str, Any]) -> None:
    assert found["gone"][0] == "HubError" and "no repository of this name" in found["gone"][1]
    assert found["branch"][0] == "HubError" and "no revision 'v9'" in found["branch"][1]
