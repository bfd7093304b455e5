"""Bases on a hub: what is fetched, when, and at which commit. The hub is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN, outside, serving

pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")

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

def model(**wishes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    torch.manual_seed(wishes.pop("seed", 0))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **wishes)).eval()

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
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A base is put on a hub in two commits, and an adapter is made on the first one."""
    work = tmp_path_factory.mktemp("work")
    with serving() as hub:
        folder = f"{str(work)!r} + f'/{{seed}}'"
        prepare = f"{BEGIN}\nfor seed in (0, 1):\n    model(seed=seed).save_pretrained({folder})\nprint(0)"
        outside(prepare, hub, work / "none")
        first = hub.add_folder("someone/base", work / "0")
        more = {
            "modeling_evil.py": b"x",
            "pytorch_model.bin": b"x",
            "model.fp16.safetensors": b"x",
            "tokenizer.json": b"{}",
        }
        extra = hub.repositories["someone/base"].commit(more)
        made = outside(_make(work), hub, work / "maker", HF_TOKEN=TOKEN)
        assert made["commit"] == extra != first
        names = {each.name: each.read_bytes() for each in (work / "1").iterdir()}
        second = hub.repositories["someone/base"].commit(names)
        hub.asked.clear()
        seen = outside(_use(work, second), hub, work / "user")
        yield {**made, **seen, "first": extra, "second": second, "asked": list(hub.asked), "hub": hub, "work": work}


def _make(work: Path) -> str:
    return f"""{BEGIN}
base = transformers.LlamaForCausalLM.from_pretrained("someone/base").eval()
injection = adapted(base)
injection.save({str(work / "adapter")!r})
injection.save({str(work / "of-peft")!r}, format="peft")
injection.push_to_hub("someone/adapter")
local = transformers.LlamaForCausalLM.from_pretrained({str(work / "0")!r})
adapted(local).push_to_hub("someone/of-a-folder")
own = peftcore.load_base({str(work / "adapter")!r})
options = json.loads(Path({str(work / "of-peft/adapter_config.json")!r}).read_text())
print(json.dumps({{
    "expected": outputs(base), "cached": outputs(own), "revision": options["revision"],
    "commit": json.loads(Path({str(work / "adapter/adapter.json")!r}).read_text())["base_revision"],
    "name": [own.config._name_or_path, own.config._commit_hash], "warned": said,
    "card": Path({str(work / "adapter/README.md")!r}).read_text(),
}}))
"""


def _use(work: Path, second: str) -> str:
    return f"""{BEGIN}
adapter = {str(work / "adapter")!r}
files = lambda: sorted(each.name for each in Path(os.environ["HF_HOME"]).rglob("snapshots/*/*"))
found = {{"absent": told(lambda: peftcore.load_base("someone/adapter")), "before": files()}}
peft = told(lambda: peftcore.load_base({str(work / "of-peft")!r}))
fetched = peftcore.load_base("someone/adapter", fetch=True)
found |= {{"fetched": outputs(fetched), "after": files(), "quiet": list(said), "peft": peft}}
found["then"] = outputs(peftcore.load_base({str(work / "of-peft")!r}))
other = peftcore.load_base(adapter, base_revision={second!r}, fetch=True)
found |= {{"other": outputs(other), "warned other": list(said)}}
found["folder"] = told(lambda: peftcore.load_base("someone/of-a-folder", fetch=True))
found["folder by name"] = outputs(peftcore.load_base("someone/of-a-folder", base={str(work / "0")!r}))
found["gone"] = told(lambda: peftcore.load_base(adapter, base="someone/none", fetch=True))
found["branch"] = told(lambda: peftcore.load_base(adapter, base_revision="v9", fetch=True))
print(json.dumps(found))
"""


def test_the_commit_of_the_base_is_recorded(found: dict[str, Any]) -> None:
    assert found["name"] == ["someone/base", found["first"]] and found["revision"] == found["first"]
    assert "base_model: someone/base\nbase_model_relation: adapter\n" in found["card"]


def test_a_base_in_the_cache_is_taken(found: dict[str, Any]) -> None:
    assert found["cached"] == found["expected"] and not [each for each in found["warned"] if "commit" in each]


def test_a_base_that_is_not_there_is_not_fetched(found: dict[str, Any]) -> None:
    kind, words = found["absent"]
    assert kind == "CheckpointError" and "fetch=True" in words and "base=" in words
    assert "someone/base at revision " + found["first"] in words
    assert found["before"] == ["adapter.json", "adapter.safetensors"]
    assert found["peft"][0] == "CheckpointError" and "fetch=True" in found["peft"][1]


def test_configuration_and_safetensors_are_fetched_at_the_commit(found: dict[str, Any]) -> None:
    assert found["fetched"] == found["then"] == found["expected"]
    assert set(found["after"]) - set(found["before"]) == {"config.json", "generation_config.json", "model.safetensors"}
    resolved = [each for each in found["asked"] if "base/resolve" in each]
    assert resolved and not any(name in each for each in resolved for name in (".py", ".bin", "fp16", "tokenizer"))
    assert not [each for each in found["quiet"] if "commit" in each]


def test_another_commit_is_told(found: dict[str, Any]) -> None:
    assert found["other"] != found["expected"]
    (words,) = [each for each in found["warned other"] if "commit" in each]
    assert found["first"][:12] in words and found["second"][:12] in words


def test_a_file_from_a_hub_names_no_folders_here(found: dict[str, Any]) -> None:
    kind, words = found["folder"]
    assert kind == "CheckpointError" and "names no folders here" in words and "base=" in words
    assert found["folder by name"] == found["expected"]


def test_what_the_hub_lacks(found: dict[str, Any]) -> None:
    assert found["gone"][0] == "HubError" and "no repository of this name" in found["gone"][1]
    assert found["branch"][0] == "HubError" and "no revision 'v9'" in found["branch"][1]


def test_a_cache_that_has_another_commit(found: dict[str, Any], tmp_path: Path) -> None:
    """It is not taken in silence: the error names it."""
    adapter = str(found["work"] / "adapter")
    script = f"""{BEGIN}
transformers.LlamaForCausalLM.from_pretrained("someone/base")
refused = told(lambda: peftcore.load_base({adapter!r}))
taken = outputs(peftcore.load_base({adapter!r}, base_revision={found["second"]!r}))
print(json.dumps({{"refused": refused, "taken": taken, "said": said}}))
"""
    seen = outside(script, found["hub"], tmp_path)
    assert f"base_revision='{found['second']}' takes the one that is there" in seen["refused"][1]
    assert seen["taken"] == found["other"] and any("was made on commit" in each for each in seen["said"])
