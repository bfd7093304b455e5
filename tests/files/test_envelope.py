"""What a file says of itself: options of older versions, one base and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from file_toys import adapted, host
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import CheckpointError, HostMismatch, NewerFormat
from peftcore.files.formats.native import ENVELOPE, METADATA, TENSORS
from peftcore.files.safe_io import write_tensors
from peftcore.files.save_load import describe
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace


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


@pytest.mark.parametrize(
    ("options", "versions"), [({"scale": 50}, None), ({"scale": 50}, {"0": 1}), ({"percent": 50}, {"0": 2})]
)
def test_options_of_parts_are_migrated_too(tmp_path: Path, options: dict[str, Any], versions: Any) -> None:
    """Those of a part of a part as well; a file that says no version of parts is of the first."""
    peftcore.register(ThirdVersion)
    model, inputs = host()
    part = {"method": "third_version", "target": "first"}
    for nested in (False, True):
        whole = {"method": "config_union", "parts": [{**part, "gain": 0.5}]}
        injection = peftcore.apply(model, "config_union", parts=[whole] if nested else whole["parts"])
        fill(injection)
        expected = model(**inputs)
        injection.save(tmp_path / "adapter")
        injection.remove()
        kept = json.loads((tmp_path / "adapter" / ENVELOPE).read_text())
        inner = "0/0" if nested else "0"
        assert kept["part_versions"] == {"0": 1, inner: 3} if nested else {"0": 3}
        old = {**whole, "parts": [{**part, **options}]}
        saved = None if versions is None else {inner: versions["0"]}
        config = {"method": "config_union", "parts": [old]} if nested else old
        _edit(tmp_path / "adapter", config=config, part_versions=saved or {})
        loaded = peftcore.load(model, tmp_path / "adapter")
        assert torch.equal(model(**inputs), expected)
        loaded.remove()
        _edit(tmp_path / "adapter", part_versions={inner: 4})
        with pytest.raises(NewerFormat, match="version 4 of third_version"):
            peftcore.load(model, tmp_path / "adapter")


def test_what_is_newer_is_refused_with_the_line_that_helps(saved_toy: Path) -> None:
    model, _ = host()
    before = trace(model)
    _edit(saved_toy, config_version=4, plugin_version="peftcore-toys 1.0")
    with pytest.raises(NewerFormat, match=r"version 4 of third_version.*reads up to 3.*pip install -U peftcore-toys$"):
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


def classifier(*names: str, method: str = "lora", **options: Any) -> peftcore.Injection:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    named = {"id2label": dict(enumerate(names))} if names else {"num_labels": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes, **named))
    return peftcore.apply(model, method, **options)


def test_classes_of_a_head_are_in_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a head is in the file, and the model names the classes; whoever names others hears of it."""
    for number, (names, train, expected) in enumerate(
        [(("b", "a"), ["classifier"], ("b", "a")), (("b", "a"), [], ()), ((), ["classifier"], ())]
    ):
        classifier(*names, train=train).save(tmp_path / str(number))
        assert describe(tmp_path / str(number)).classes == expected
    for names, told in ((("b", "a"), False), ((), False), (("a", "b"), True)):
        caplog.clear()
        model = classifier(*names).model
        peftcore.load(model, tmp_path / "0", name="again")
        assert ("['b', 'a'], in this order; the config of the model names ['a', 'b']" in caplog.text) == told
