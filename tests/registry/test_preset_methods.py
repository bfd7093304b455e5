"""Names of papers for options of methods: found as methods are, and equal to the method with these options."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_toys import plugin, point

import peftcore
from peftcore.author import Preset, hookimpl
from peftcore.errors import ConfigError, TargetError, UnknownMethod, UnsupportedSite
from peftcore.registry.preset_methods import class_of, preset_of
from peftcore.testing import HOSTS, NotApplicable, conformance

PRESETS = {info.name: info.preset for info in peftcore.methods(presets=True) if info.preset is not None}
CALLED = [name for name, preset in PRESETS.items() if not preset.workflow]
PLACES = ("llama", "unet", "encoder", "vit", "t5")
"""Hosts in the order in which a preset is tried."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lotr": {"rank": 2},
    "sparse_combos": {"parts": [{"method": "lora"}, {"method": "shira", "rank": 1}]},
    "mhr": {"splits": 2},
}


def filled(injection: peftcore.Injection) -> peftcore.Injection:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return injection


def test_there_are_fifty_six() -> None:
    assert len(PRESETS) == 56
    assert not {info.name for info in peftcore.methods()} & PRESETS.keys()


@pytest.mark.share(3)
@pytest.mark.parametrize("name", CALLED)
def test_a_preset_is_its_method_with_its_options(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    for host in PLACES:
        torch.manual_seed(0)
        model, inputs = HOSTS[host].build()
        other, _ = HOSTS[host].build()
        other.load_state_dict(model.state_dict())
        data = [lambda host, given=inputs, of=host: HOSTS[of].output(host(**given)).square().mean()]
        looks = {"data": data} if peftcore.method(name).tags.needs_data else {}
        try:
            ours = filled(peftcore.apply(model, name, seed=0, **OPTIONS.get(name, {}), **looks))
        except (TargetError, UnsupportedSite, ConfigError):
            continue
        break
    else:
        assert name == "b_lora", "its targets are blocks of SDXL"
        return
    options = {**preset.options, **OPTIONS.get(name, {})}
    arguments: dict[str, Any] = {} if preset.target is None else {"target": [s.path for s in ours.main_selection]}
    arguments |= looks
    theirs = filled(peftcore.apply(other, preset.method, seed=0, train=preset.train, **arguments, **options))
    assert ours.name == name and ours.method.name == preset.method
    assert {site.path for site in ours.sites} == {site.path for site in theirs.sites}
    torch.manual_seed(2)
    expected = HOSTS[host].output(other.eval()(**inputs))
    torch.manual_seed(2)
    assert torch.equal(HOSTS[host].output(model.eval()(**inputs)), expected)
    ours.save(tmp_path / "adapter")
    again, _ = HOSTS[host].build()
    again.load_state_dict({k: v for k, v in other.state_dict().items() if k in again.state_dict()})
    assert peftcore.load(again, tmp_path / "adapter").method.name == preset.method


CLAIMED = ("a_fresh_adapter_changes_nothing", "draws_are_declared", "routers_are_declared")
"""Checks of what options may change of a method's tags."""


@pytest.mark.share(3)
@pytest.mark.parametrize("name", CALLED)
def test_its_tags_are_those_of_its_options(name: str) -> None:
    """By the kit's checks, on the first host where it acts; without looks at data, which a case makes itself."""
    options = {"*": OPTIONS[name]} if name in OPTIONS else None

    @conformance(name, hosts=PLACES, options=options)
    def given(check: Any) -> None: ...

    declared: Any = vars(given)["declared"]
    for host in PLACES:
        case = declared.case(host)
        if case.inapplicable is None:
            break
    else:
        pytest.skip("it acts on none of these hosts")
    ran = [check for check in declared.checks.values() if check.name in CLAIMED]
    for check in {check.name: check for check in ran}.values():
        with contextlib.suppress(NotApplicable):
            check(case)
    assert ran


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.workflow])
def test_a_workflow_is_told_where_it_is_applied(name: str) -> None:
    model, _ = HOSTS["llama"].build()
    with pytest.raises(ConfigError, match=f"{name} cannot be applied with one call: .*(load|activate|apply)"):
        peftcore.apply(model, name)
    assert not peftcore.injections(model)


def test_what_the_user_says_goes_first() -> None:
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "rslora", rank=3, target="mlp.down", name="mine")
    assert injection.name == "mine"
    assert injection.config == peftcore.method("lora").Config(rank=3, scaling="sqrt_rank")
    assert {site.role for site in injection.sites} == {"mlp.down"}
    assert peftcore.apply(model, "rslora", scaling="rank").config.scaling == "rank"
    with pytest.raises(ConfigError, match=r"rslora.*no option"):
        peftcore.apply(model, "rslora", ranks=3)


@pytest.mark.parametrize("written", ["LoRA", "lora", "LORA", "IA3", "houlsby-adapter", "LoRA+", "rsLoRA", "QLoRA"])
def test_capitals_and_dashes_do_not_matter(written: str) -> None:
    assert peftcore.method(written).name in ("lora", "ia3", "houlsby_adapter", "lora_plus", "rslora", "qlora")


def test_a_part_of_a_union_may_be_a_preset() -> None:
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, ["rslora", "red"])
    first, second = (injection.parts[key] for key in ("0", "1"))
    assert first.config.scaling == "sqrt_rank" and first.method.name == "lora"
    assert second.config.init_std == 0.0 and {graft.site.role for graft in second.grafts} == {"mlp.output"}
    with pytest.raises(ConfigError, match="hadamard_adapter also trains norm"):
        peftcore.apply(model, ["hadamard_adapter"], name="other")


def test_a_plan_counts_as_the_adapter_does() -> None:
    model, _ = HOSTS["encoder"].build()
    planned = peftcore.plan(model, "hadamard_adapter")
    assert planned.trainable == sum(p.numel() for p in peftcore.apply(model, "hadamard_adapter").parameters())
    assert planned.trainable > peftcore.plan(HOSTS["encoder"].build()[0], "ssf", target="attn.output").trainable


def test_a_class_is_a_presets_or_a_methods() -> None:
    lora = peftcore.method("lora")
    assert preset_of(lora) is None
    made = class_of("other", Preset("lora", "none", {"rank": 2}), lora)
    assert preset_of(made) == Preset("lora", "none", {"rank": 2})
    assert made.Config().rank == 2 and lora.Config().rank == 8


@pytest.mark.usefixtures("fresh_registry")
def test_a_plugin_brings_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin()
    made.peftcore_presets = hookimpl(lambda: {"twice": Preset("toy_doubling", "none")})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [point("good", made)])
    assert [info.name for info in peftcore.methods(presets=True)] == ["toy_doubling", "twice"]
    assert preset_of(peftcore.method("twice")) == Preset("toy_doubling", "none")


@pytest.mark.usefixtures("fresh_registry")
def test_a_preset_of_a_method_that_is_not_there_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin()
    made.peftcore_presets = hookimpl(lambda: {"twice": Preset("nothing", "none"), "wrong": Preset("toy_doubling", "")})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [point("good", made)])
    assert "twice" not in {info.name for info in peftcore.methods(presets=True)}
    with pytest.raises(UnknownMethod, match="no method named 'twice'"):
        peftcore.method("twice")


@pytest.mark.usefixtures("fresh_registry")
def test_presets_that_are_none_are_a_broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin()
    made.peftcore_presets = hookimpl(lambda: {"twice": "toy_doubling"})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [point("good", made)])
    with pytest.warns(peftcore.registry.plugins.PluginWarning, match="must map names to Preset"):
        assert not peftcore.methods()
