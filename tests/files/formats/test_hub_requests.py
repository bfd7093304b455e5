"""Adapters are pushed to a hub and loaded from it: a stand-in for one that answers as a hub does, or refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import READER, TOKEN, Hub, outside, serving
from slowly import quick

pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.slow

BEGIN = """
import json, os, sys
import torch
from torch import nn
import peftcore
from peftcore.errors import CheckpointError, ExportError, HubError, PeftcoreError

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

def adapted(fill=0.5):
    base = model()
    injection = peftcore.apply(base, "lora", target=["0"], train=["2"], rank=2, name="mine")
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(fill)
    return base, injection

def told(action):
    try:
        action()
    except PeftcoreError as error:
        return [type(error).__name__, str(error)]
    return None

x = torch.linspace(-1, 1, 8).reshape(2, 4)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def pushed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An adapter goes to the hub and comes back, as it is and as a branch and a proposal have it."""
    hub.repository("someone/titled").commit({"README.md": b"# mine\n"})
    script = f"""{BEGIN}
base, injection = adapted()
commit = injection.push_to_hub("someone/trained", metrics={{"accuracy": 0.93}})
found = {{"commit": str(commit), "oid": commit.oid, "expected": base(x).tolist()}}
found["left"] = peftcore.injections(base).keys() == {{"mine"}}
second = injection.push_to_hub("someone/trained", format=["peftcore", "peft"], commit_message="as of peft")
found["second"] = second.commit_message
found["own card"] = str(injection.push_to_hub("someone/titled"))
found["private"] = str(injection.push_to_hub("someone/hidden", private=True, token={TOKEN!r}))
other, changed = adapted(0.25)
branch = changed.push_to_hub("someone/trained", revision="smaller")
proposed = changed.push_to_hub("someone/trained", create_pr=True)
found |= {{"branch": branch.oid, "proposed": proposed.pr_url, "smaller": other(x).tolist()}}

def outputs(name, **wishes):
    fresh = model()
    loaded = peftcore.load(fresh, name, **wishes)
    return fresh(x).tolist()

found["loaded"] = {{
    "main": outputs("someone/trained"),
    "first": outputs("someone/trained", revision=commit.oid),
    "branch": outputs("someone/trained", revision="smaller"),
    "at": outputs("someone/trained@smaller"),
    "both": outputs("someone/trained@smaller", revision="smaller"),
    "commit": outputs(f"someone/trained@{{branch.oid}}"),
    "proposed": outputs("someone/trained", revision="refs/pr/1"),
    "private": outputs("someone/hidden"),
}}
print(json.dumps(found))
"""
    home = tmp_path_factory.mktemp("home")
    return {**outside(script, hub, home, HF_TOKEN=TOKEN), "home": home}


def test_what_is_pushed_is_what_was_saved(pushed: dict[str, Any], hub: Hub) -> None:
    files = hub.repositories["someone/trained"].commits[pushed["oid"]]
    assert sorted(files) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert pushed["commit"] == f"{hub.address}/someone/trained/commit/{pushed['oid']}" and pushed["left"]
    assert json.loads(files["adapter.json"])["method"] == "lora" and b"accuracy" in files["README.md"]
    main = hub.repositories["someone/trained"].branches["main"]
    assert "adapter_model.safetensors" in hub.repositories["someone/trained"].commits[main]
    assert pushed["second"] == "as of peft"


@pytest.mark.parametrize("name", ["main", "first", "private"])
def test_loaded_back_it_computes_the_same(pushed: dict[str, Any], name: str) -> None:
    assert pushed["loaded"][name] == pushed["expected"] != pushed["smaller"]


@pytest.mark.parametrize("name", ["branch", "at", "both", "commit", "proposed"])
def test_a_revision_is_named_in_either_way(pushed: dict[str, Any], name: str) -> None:
    assert pushed["loaded"][name] == pushed["smaller"]


def test_branches_proposals_and_private_ones(pushed: dict[str, Any], hub: Hub) -> None:
    found = hub.repositories["someone/trained"].branches
    assert found["smaller"] == pushed["branch"] != found["main"] != found["refs/pr/1"]
    assert pushed["proposed"] == f"{hub.address}/someone/trained/discussions/1"
    assert hub.repositories["someone/hidden"].private and not hub.repositories["someone/trained"].private


def test_a_card_that_is_not_ours_is_kept(pushed: dict[str, Any], hub: Hub) -> None:
    repository = hub.repositories["someone/titled"]
    files = repository.commits[repository.branches["main"]]
    assert files["README.md"] == b"# mine\n" and "adapter.safetensors" in files


def test_only_the_files_of_an_adapter_are_fetched(hub: Hub, tmp_path: Path) -> None:
    """What could be a program, a pickle or a checkpoint's state stays where it is."""
    names = ["modeling_evil.py", "pytorch_model.bin", "optimizer.pt", "README.md", "config.json", "tokenizer.json"]
    script = f"{BEGIN}\nadapted()[1].save({str(tmp_path / 'plain')!r}, format=['peftcore', 'peft'])\nprint(0)"
    outside(script, hub, tmp_path / "home")
    commit = hub.add_folder("someone/crowded", tmp_path / "plain")
    hub.repositories["someone/crowded"].commit(dict.fromkeys(names, b"x"))
    hub.asked.clear()
    outside(f"{BEGIN}\npeftcore.load(model(), 'someone/crowded')\nprint(0)", hub, tmp_path / "home")
    resolved = {each.rpartition("/")[2] for each in hub.asked if "/resolve/" in each}
    assert resolved == {"adapter.safetensors", "adapter.json", "adapter_config.json", "adapter_model.safetensors"}
    cached = {each.name for each in (tmp_path / "home/hub").rglob("*") if "snapshots" in each.parts and each.is_file()}
    assert cached == resolved and commit


@pytest.fixture(scope="module")
def refused(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is said when a hub refuses, by the case."""
    hub.repository("someone/gated", gated=True).commit({"adapter.safetensors": b"x"})
    hub.repository("someone/open").commit({"adapter.json": b"{}"})
    hub.repository("someone/secret", private=True)
    home = tmp_path_factory.mktemp("refused")
    script = f"""{BEGIN}
os.chdir({str(home)!r})
base, injection = adapted()
injection.save("folder")
injection.save("one/two")
fresh = model()
found = {{
    "unknown": told(lambda: peftcore.load(fresh, "someone/none")),
    "secret": told(lambda: peftcore.load(fresh, "someone/secret")),
    "gated": told(lambda: peftcore.load(fresh, "someone/gated")),
    "revision": told(lambda: peftcore.load(fresh, "someone/open", revision="v9")),
    "revision after": told(lambda: peftcore.load(fresh, "someone/open@v9")),
    "two": told(lambda: peftcore.load(fresh, "someone/open@v1", revision="v2")),
    "path": told(lambda: peftcore.load(fresh, "folder", revision="v2")),
    "like a name": told(lambda: peftcore.load(fresh, "one/two", revision="v2")),
    "missing path": told(lambda: peftcore.load(fresh, "./none", revision="v2")),
    "no token": told(lambda: injection.push_to_hub("someone/new")),
    "reader": told(lambda: injection.push_to_hub("someone/open", token={READER!r})),
    "wrong": told(lambda: injection.push_to_hub("someone/open", token="hf_wrong")),
    "no name": told(lambda: injection.push_to_hub("a/b/c", token={TOKEN!r})),
    "format": told(lambda: injection.push_to_hub("someone/new", format="kohya", token={TOKEN!r})),
    "metrics": told(lambda: injection.push_to_hub("someone/new", metrics={{"accuracy": "high"}}, token={TOKEN!r})),
    "left": len(peftcore.injections(fresh)),
    "works": told(lambda: peftcore.load(fresh, "one/two")),
}}
print(json.dumps(found))
"""
    found: dict[str, Any] = outside(script, hub, home)
    return found


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("unknown", "HubError", ("someone/none", "no repository of this name", "private", "log in")),
        ("secret", "HubError", ("no repository of this name", "or it is private", "log in")),
        ("gated", "HubError", ("gated", "ask for access at", "someone/gated")),
        ("revision", "HubError", ("no revision 'v9'", "branches and tags")),
        ("revision after", "HubError", ("no revision 'v9'", "branches and tags")),
        ("two", "CheckpointError", ("'v1'", "'v2'", "pass only one")),
        ("path", "CheckpointError", ("folder is a path", "remove it")),
        ("like a name", "CheckpointError", ("one/two is a path", "remove it")),
        ("missing path", "CheckpointError", ("./none is a path", "remove it")),
        ("no token", "HubError", ("no token", "hf auth login", "HF_TOKEN", "token=")),
        ("reader", "HubError", ("may not write", "log in")),
        ("wrong", "HubError", ("does not know the token", "settings/tokens")),
        ("no name", "HubError", ("a/b/c",)),
        ("format", "ExportError", ()),
        ("metrics", "ExportError", ("accuracy", "'high'")),
    ],
)
def test_a_refusal_says_what_to_do(refused: dict[str, Any], case: str, kind: str, words: tuple[str, ...]) -> None:
    assert refused[case][0] == kind
    for word in words:
        assert word in refused[case][1], refused[case][1]


def test_a_refusal_changes_nothing(refused: dict[str, Any], hub: Hub) -> None:
    assert refused["left"] == 0 and refused["works"] is None
    assert "someone/new" not in hub.repositories
    assert len(hub.repositories["someone/open"].commits) == 2
    assert not any("hf_" in said[1].replace("HF_", "") for said in refused.values() if isinstance(said, list))


@pytest.fixture(scope="module")
def cached(hub: Hub, pushed: dict[str, Any]) -> Path:
    """A cache with ``someone/trained`` in it."""
    home: Path = pushed["home"]
    return home


UNANSWERED = [
    ("failing", ("failed (status 503)", "try again")),
    ("late", ("does not answer in time", "HF_HUB_ETAG_TIMEOUT")),
    ("away", ("cannot be reached", "HF_ENDPOINT")),
    ("offline", ("HF_HUB_OFFLINE is set", "unset it")),
]


@pytest.mark.parametrize(("case", "words"), quick(UNANSWERED, UNANSWERED[:1]))
def test_a_hub_that_fails_or_does_not_answer(case: str, words: tuple[str, ...], cached: Path) -> None:
    """What is in the cache is used all the same; a push, and loading what is not there, say what to do."""
    script = f"""{BEGIN}
base, injection = adapted()
load = lambda name: told(lambda: peftcore.load(model(), name))
push = lambda: told(lambda: injection.push_to_hub("someone/trained", token={TOKEN!r}))
print(json.dumps({{"cached": load("someone/trained"), "other": load("someone/other"), "push": push()}}))
"""
    with serving() as hub:
        hub.status, hub.seconds = 503 if case == "failing" else 0, 20.0 if case == "late" else 0.0
        variables = {
            "late": {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
            "offline": {"HF_HUB_OFFLINE": "1"},
        }
        where: Hub | str = "http://127.0.0.1:9" if case == "away" else hub
        said = outside(script, where, cached, **variables.get(case, {}))
        assert bool(hub.asked) == (case in ("failing", "late"))
    assert said["cached"] is None
    for refusal in (said["other"], said["push"]):
        assert refusal[0] == "HubError" and all(word in refusal[1] for word in words), refusal
