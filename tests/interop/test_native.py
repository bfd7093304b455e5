"""Our own files: whole or as they were whatever happens to the writer, options of older versions, one base and no
other, the encoder of a host with a head, the card."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import peftcore
from peftcore import Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import CheckpointError, ExportError, HostMismatch, NewerFormat
from peftcore.files.formats.card import CARD, MARK
from peftcore.files.formats.native import ENVELOPE, METADATA, TENSORS
from peftcore.files.safe_io import TensorFile, write_tensors
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace


def host(name: str = "mlp") -> tuple[nn.Module, dict[str, Any]]:
    """A host of the kit, always the same."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.eval(), inputs


def adapted(value: float = 0.1, **wishes: Any) -> peftcore.Injection:
    """An adapter of LoRA on the smallest host, all of its numbers the same."""
    injection = peftcore.apply(host()[0], "lora", **{"target": ["first", "second"], "rank": 64, **wishes})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(value)
    return injection


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What stands in a folder."""
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}


# Writers that are killed, and disks that are full


KILLED = """
import os, sys, torch, peftcore
from peftcore.testing import HOSTS

torch.manual_seed(0)
injection = peftcore.apply(HOSTS["mlp"].build()[0], "lora", target=["first", "second"], rank=64)
for line in sys.stdin:
    number = int(line)
    if writer := os.fork():
        os.waitpid(writer, 0)
        print("dead", flush=True)
        continue
    print(os.getpid(), flush=True)
    while True:
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.fill_(number)
        injection.save(sys.argv[1])
        print(number, flush=True)
        number += 1
"""


def test_a_kill_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    folder, moments = tmp_path / "adapter", random.Random(0)
    adapted(0.0).save(folder)
    model, last, torn = host()[0], 0, 0
    writers = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writers.stdin is not None and writers.stdout is not None
    pause = 0.05
    for _ in range(300):
        print(last + 1, file=writers.stdin, flush=True)
        writer = int(writers.stdout.readline())
        time.sleep(moments.uniform(0.0, pause))
        os.kill(writer, signal.SIGKILL)
        finished = last
        while (line := writers.stdout.readline()) != "dead\n":
            finished = int(line)
        injection = peftcore.load(model, folder)
        found = {float(value) for each in injection.parameters() for value in each.unique()}
        injection.remove()
        assert len(found) == 1, "half of one adapter and half of another"
        pause *= 1.2 if finished == last else 0.8  # on any machine, about half of the writers get to write one
        last = int(found.pop())
        assert last in (finished, finished + 1)
        torn += any(each.suffix == ".partial" for each in folder.iterdir())
        if last > 20 and torn > 20:
            break
    writers.stdin.close()
    assert writers.wait() == 0
    assert last > 10 and torn, "no writer was killed while it wrote"
    adapted(0.5).save(folder)
    assert {each.name for each in folder.iterdir() if each.suffix != ".partial"} == {CARD, ENVELOPE, TENSORS}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_for_whom_the_user_lets_read_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        adapted().save(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "adapter").iterdir()} == {0o666 & ~mask}


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    old, new, theirs = (folder / f".{name}.partial" for name in ("old", "new", "link"))
    old.mkdir()
    (old / "adapter.safetensors").touch()
    new.mkdir()
    theirs.symlink_to("nothing")
    os.utime(old, (0, 0))
    adapted().save(folder)
    assert not old.exists() and new.exists() and theirs.is_symlink()


def _fails(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _fails_in_the_library(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _writes_half(tensors: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"half")
    _fails_in_the_library()


@pytest.mark.parametrize(
    ("what", "fails"),
    [
        ("peftcore.files.safe_io.os.replace", _fails),
        ("peftcore.files.safe_io.os.fsync", _fails),
        ("peftcore.files.safe_io.save_file", _fails_in_the_library),
        ("peftcore.files.safe_io.save_file", _writes_half),
        ("pathlib.Path.write_text", _fails),
    ],
)
def test_a_full_disk_leaves_the_old_adapter(what: str, fails: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    adapted(1.0).save(folder)
    before = bytes_of(folder)
    injection = adapted(2.0, alpha=16.0)
    with monkeypatch.context() as patch:
        patch.setattr(what, fails)
        with pytest.raises(OSError, match="No space left"):
            injection.save(folder)
        if what != "peftcore.files.safe_io.os.fsync":  # nobody waits for the disk where nothing is replaced
            with pytest.raises(OSError, match="No space left"):
                injection.save(outside)
    left = bytes_of(folder)
    assert left.keys() == before.keys(), "a part of a file was left"
    if what != "pathlib.Path.write_text":  # then the tensors, which alone are read, were there already
        assert left == before
    loaded = peftcore.load(host()[0], folder)
    assert float(next(loaded.parameters()).mean()) == (2.0 if what == "pathlib.Path.write_text" else 1.0)
    assert not [*folder.glob(".*.partial"), *outside.glob(".*.partial")]


def test_only_what_changes_is_written_and_only_what_is_replaced_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        "peftcore.files.safe_io.os.fsync",
        lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), real(number)),
    )
    folder = tmp_path / "adapter"
    adapted(1.0).save(folder)
    assert not synced
    before = {each.name: each.stat().st_ino for each in folder.iterdir()}
    adapted(2.0).save(folder)
    after = {each.name: each.stat().st_ino for each in folder.iterdir()}
    assert [Path(each).name for each in synced] == [TENSORS]
    assert {name for name in before if before[name] != after[name]} == {TENSORS}
    adapted(2.0, alpha=16.0).save(folder)
    assert {Path(each).name for each in synced[1:]} == {TENSORS, ENVELOPE, CARD}


LIMITED = """
import resource, sys, torch, peftcore
from peftcore.testing import HOSTS

torch.manual_seed(0)
injection = peftcore.apply(HOSTS["mlp"].build()[0], "lora", target=["first", "second"], rank=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    injection.save(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("limit", [0, 1000, 15_000])
def test_files_that_may_not_grow_leave_the_old_adapter(limit: int, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(1.0).save(folder)
    assert (folder / TENSORS).stat().st_size > 15_000
    before = bytes_of(folder)
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder), str(limit)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "OSError\n"
    assert bytes_of(folder) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_equal_tensors_are_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(ord(name))) for name in "dacb"}
    one, other = tmp_path / "one", tmp_path / "other"
    write_tensors(one, tensors, {METADATA: "text"})
    write_tensors(other, dict(sorted(tensors.items())), {METADATA: "text"})
    assert one.read_bytes() == other.read_bytes()
    assert list(TensorFile(one).shapes) == ["a", "b", "c", "d"]


# Options of other versions


class _ToyConfig(MethodConfig):
    method: Literal["third_version"] = "third_version"
    gain: float = 1.0


class _ToyOperator(Operator):
    def __init__(self, site: Site, config: _ToyConfig) -> None:
        super().__init__(site)
        self.gain = config.gain
        self.shift = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) + self.gain * self.shift


class ThirdVersion(Method):
    """Version 1 called its gain ``scale``; version 2 had percents; version 3 has a factor."""

    name = "third_version"
    Config = _ToyConfig
    tags = Tags(category="additive", paper="none")
    target = "all-linear"
    config_version = 3

    def inject(self, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, _ToyOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return site.out_features

    @classmethod
    def migrate(cls, options: dict[str, Any], version: int) -> dict[str, Any]:
        """One step."""
        if version == 1:
            return {"percent" if key == "scale" else key: value for key, value in options.items()}
        return {"gain" if k == "percent" else k: v / 100 if k == "percent" else v for k, v in options.items()}


@pytest.fixture
def saved_toy(tmp_path: Path) -> Path:
    peftcore.register(ThirdVersion)
    injection = peftcore.apply(host()[0], "third_version", target="first", gain=0.5)
    fill(injection)
    injection.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit(folder: Path, **changes: Any) -> None:
    """Change what the file says of itself."""
    from safetensors.torch import load_file

    envelope = json.loads((folder / ENVELOPE).read_text()) | changes
    write_tensors(folder / TENSORS, load_file(folder / TENSORS), {METADATA: json.dumps(envelope)})


@pytest.mark.parametrize(("version", "options"), [(3, {"gain": 0.5}), (2, {"percent": 50}), (1, {"scale": 50})])
def test_options_of_older_versions_are_brought_up_step_by_step(version: int, options: Any, saved_toy: Path) -> None:
    model, inputs = host()
    peftcore.load(model, saved_toy)
    expected = model(**inputs)
    _edit(saved_toy, config_version=version, config={"method": "third_version", **options})
    model, _ = host()
    injection = peftcore.load(model, saved_toy)
    assert injection.config == _ToyConfig(gain=0.5)
    assert torch.equal(model(**inputs), expected)
    injection.save(saved_toy)
    assert json.loads((saved_toy / ENVELOPE).read_text())["config_version"] == 3


def test_what_is_newer_is_refused_with_the_line_that_helps(saved_toy: Path) -> None:
    model, _ = host()
    before = trace(model)
    _edit(saved_toy, config_version=4, plugin_version="peftcore-toys 1.0")
    with pytest.raises(NewerFormat, match=r"version 4 of third_version.*knows 3.*pip install -U peftcore-toys$"):
        peftcore.load(model, saved_toy)
    _edit(saved_toy, format=2)
    with pytest.raises(NewerFormat, match=r"format 2.*reads up to 1.*pip install -U peftcore$"):
        peftcore.load(model, saved_toy)
    assert not differences(before, trace(model))


def test_old_options_that_make_no_sense_are_an_error_of_the_file(saved_toy: Path) -> None:
    model, _ = host()
    before = trace(model)
    for options in ({"percent": "half"}, {"percent": None}, {"percent": [1]}, {"percent": 50, "unheard": 1}):
        _edit(saved_toy, config_version=2, config=options)
        with pytest.raises(CheckpointError, match=TENSORS):
            peftcore.load(model, saved_toy)
    assert not differences(before, trace(model))


# One base and no other


def test_weights_of_another_base_are_refused_where_the_user_asked_for_it(tmp_path: Path) -> None:
    injection = adapted()
    for weights in (True, False):
        injection.save(tmp_path / str(weights), weights=weights)
    same, other, elsewhere = (host()[0] for _ in range(3))
    with torch.no_grad():
        other.first.weight[0, 0] += 1e-3
        elsewhere.head.weight[0, 0] += 1e-3  # the adapter does not stand there
    for model in (same, elsewhere):
        peftcore.load(model, tmp_path / "True")
    before = trace(other)
    with pytest.raises(HostMismatch, match="other weights") as caught:
        peftcore.load(other, tmp_path / "True")
    assert TENSORS in str(caught.value)
    assert not differences(before, trace(other))
    peftcore.load(other, tmp_path / "False")


def test_the_digest_is_of_the_base_and_of_nothing_on_top(tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "before", weights=True)
    second = peftcore.apply(injection.model, "bitfit", name="second")
    fill(second)
    injection.save(tmp_path / "after", weights=True)
    for name in (ENVELOPE, TENSORS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# An encoder in a host with a head


class WithHead(nn.Module):
    """An encoder below a name, and a head."""

    def __init__(self, *towers: str) -> None:
        super().__init__()
        for tower in towers:
            self.add_module(tower, host("encoder")[0])
        self.classifier = nn.Linear(5, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        towers = [module(**inputs) for name, module in self.named_children() if name != "classifier"]
        logits: Tensor = self.classifier(sum(towers))
        return logits


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "houlsby_adapter", "vera", "loreft", "shira"])
def test_the_adapter_of_an_encoder_goes_into_a_host_with_a_head_and_back(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shira": {"rank": 1}}.get(method, {})
    encoder, inputs = host("encoder")
    path = peftcore.plan(encoder, method, **options).sites[0].path
    injection = peftcore.apply(encoder, method, overrides={path: {}}, train=["head"] * (method != "bitfit"), **options)
    fill(injection)
    injection.save(tmp_path / "bare")
    base, expected = host("encoder")[0](**inputs), encoder(**inputs)
    assert (expected - base).abs().max() > 0.01
    whole = WithHead("bert").eval()
    inside = peftcore.load(whole, tmp_path / "bare")
    assert all(site.module_path.startswith("bert.") for site in inside.sites)
    torch.testing.assert_close(whole.bert(**inputs), expected)
    assert list(inside.config.overrides) == [f"bert.{path}"]
    inside.save(tmp_path / "whole")
    again, _ = host("encoder")
    peftcore.load(again, tmp_path / "whole").save(tmp_path / "again")
    torch.testing.assert_close(again(**inputs), expected)
    for name in (ENVELOPE, TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_an_adapter_that_fits_two_towers_fits_none(tmp_path: Path) -> None:
    encoder, _ = host("encoder")
    peftcore.apply(encoder, "lora").save(tmp_path / "adapter")
    two = WithHead("text", "image")
    before = trace(two)
    with pytest.raises(HostMismatch, match="several places of this host: 'text', 'image'"):
        peftcore.load(two, tmp_path / "adapter")
    assert not differences(before, trace(two))
    peftcore.load(two.image, tmp_path / "adapter")  # as the message says


def test_an_adapter_of_one_tower_does_not_end_in_another(tmp_path: Path) -> None:
    peftcore.apply(WithHead("text"), "lora", target="linear1").save(tmp_path / "adapter")
    other = WithHead("image")
    before = trace(other)
    with pytest.raises(HostMismatch, match=r"there is no text\.encoder"):
        peftcore.load(other, tmp_path / "adapter")
    assert not differences(before, trace(other))


# The card, and several formats at once


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.config._name_or_path = "someone/tiny-llama"
    injection = peftcore.apply(model, "lora", rank=4)
    values = injection.summary().parameters
    base = sum(each.numel() for each in host_parameters(model))
    injection.save(tmp_path)
    card = (tmp_path / CARD).read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "base_model: someone/tiny-llama" in head and "library_name: peftcore" in head and "- lora" in head
    for told in ("`someone/tiny-llama`", "method: lora", "`rank=4`", "2106.09685", f"{values:,} values", f"{base:,}"):
        assert told in body, told
    assert f"{values / base:.3%}" in body and MARK in body
    code = body.partition("```python\n")[2].partition("```")[0]
    there = code.replace("path of this folder", str(tmp_path))
    exec(there, {"model": transformers.LlamaForCausalLM(config)})


def host_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The base's own."""
    return [each for name, each in model.named_parameters() if ".peft." not in f".{name}"]


def test_a_card_of_the_users_own_is_kept(tmp_path: Path) -> None:
    injection = adapted()
    (tmp_path / CARD).write_text("# mine\n")
    injection.save(tmp_path)
    assert (tmp_path / CARD).read_text() == "# mine\n"
    (tmp_path / CARD).write_text(f"an older one\n{MARK}\n")
    injection.save(tmp_path)
    assert "method: lora" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).mkdir()
    injection.save(tmp_path)
    assert (tmp_path / CARD).is_dir()


def test_peft_beside_our_own(tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "both", format=["peftcore", "peft"])
    injection.save(tmp_path / "ours")
    injection.save(tmp_path / "theirs", format="peft")
    both = bytes_of(tmp_path / "both")
    alone = {**bytes_of(tmp_path / "ours"), **bytes_of(tmp_path / "theirs")}
    assert {name: both[name] for name in both if name != CARD} == {n: alone[n] for n in alone if n != CARD}
    assert b"library_name: peft\n" in both[CARD] and b"library_name: peftcore\n" in bytes_of(tmp_path / "ours")[CARD]
    outputs = []
    for folder in ("both", "ours", "theirs"):
        model, inputs = host()
        assert peftcore.load(model, tmp_path / folder).method.name == "lora"
        outputs.append(model(**inputs))
    for each in outputs[1:]:
        torch.testing.assert_close(each, outputs[0])
    import peft

    model, inputs = host()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "both")(**inputs), outputs[0])


def test_what_one_format_cannot_hold_is_written_in_none(tmp_path: Path) -> None:
    injection = peftcore.apply(host()[0], "compacter", bottleneck=4, target="first")
    for formats in (["peftcore", "peft"], ["peft", "peftcore"], ["peftcore", "unheard"]):
        with pytest.raises(ExportError):
            injection.save(tmp_path / "adapter", format=formats)
        assert not (tmp_path / "adapter").exists()
