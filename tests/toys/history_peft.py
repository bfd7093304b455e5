"""Random histories of peft's API: each call goes to a model of peft and to one of `peftcore.compat` with the same
values, and after each of them outputs, names, and what acts and trains are the same."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import peft
import torch
from history_world import Wrong
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn
from training_hosts import host

import peftcore
from peftcore import compat
from peftcore.errors import PeftcoreError

CLOSE = 1e-5
"""How far outputs may be apart, relative to the largest entry: peft takes a merge back by arithmetic, OFT's in
float32."""
IDS = torch.arange(3, 15).reshape(2, 6)
NAMES = ("default", "b", "c")
OTHERS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What peft raises where it refuses something."""

Config = Callable[[], peft.PeftConfig]
FAMILIES: dict[str, list[Config]] = {
    "lora": [
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
        lambda: peft.LoraConfig(r=2, lora_alpha=8, target_modules=["up_proj"], use_rslora=True),
        lambda: peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"], use_dora=True),
        lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    ],
    "loha": [
        lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]),
        lambda: peft.LoHaConfig(r=4, alpha=4, target_modules=["q_proj", "up_proj"]),
    ],
    "lokr": [lambda: peft.LoKrConfig(r=2, alpha=2, target_modules=["q_proj", "down_proj"])],
    "oft": [lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"])],
    "ia3": [
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
    ],
}

REFUSED: dict[tuple[str, str], str] = {
    ("delete_adapter", "ConfigError"): "of the last adapter peft leaves a model that has none and cannot run; unload()",
    ("merge_adapter", "MergeError"): "peft merges what does not act, and it acts from then on in every forward",
    ("add_adapter", "MergeError"): "an adapter is made of the base as it is without others: unmerge_adapter() first",
    ("load_adapter", "MergeError"): "likewise",
    ("load_adapter", "SwapError"): "peft takes what has the same names, and what is left over stays as it was",
    ("add_weighted_adapter", "MergeError"): "it is made of the base's own weights: unmerge_adapter() first",
    ("set_adapter", "MergeError"): "a merged one acts in every forward, and peft has the other one in its place then: "
    "unmerge_adapter() first",
    ("adapter_names", "MergeError"): "peft unmerges what is merged, for good, when rows are to have their own",
}
"""Calls that we refuse and peft takes, with the error and the reason."""
OTHERWISE = {
    "train while merged": "peft takes merges back within other calls (load_adapter, disable_adapter), for good, and "
    "trains; ours stays merged, and what is merged gets no gradient",
    "trains while disabled": "peft freezes the adapter within disable_adapter(); ours trains what it is told, and what "
    "does not act gets no gradient",
    "trains after disable_adapter": "in peft what acts and nothing else, whatever trained before; ours leaves it alone",
    "disable_adapter or set_adapter after add_adapter": "layers that peft adds within disable_adapter() are not "
    "disabled: what is set acts there, and at the end of an inner block all adapters act",
    "alpha of LoKr": "where both factors are full, peft multiplies with alpha / rank, and we have that in the values, "
    "so that steps have other sizes: here alpha is the rank",
    "delete_adapter of what is merged": "peft refuses it; ours takes it out of the weights first",
    "acts after delete_adapter": "peft asks the layers of the one that is deleted, so that none acts where no other "
    "one is at these; with us the first of the others acts always, as peft's documentation has it",
    "unload()": "peft leaves what is merged, and what was trained along (modules_to_save); ours has the weights of "
    "before",
    "linear": "peft sums factors of any LoRAs with roots of weights; `combine` sums parameters of equal adapters",
    "weighted adapters of rsLoRA and DoRA": "peft takes use_rslora and use_dora over from the first one beside "
    "alpha = rank, so that the sum is scaled once more, and leaves magnitudes out; ours is the sum of the changes, and "
    "refuses to put DoRA together by factors",
    "mixed batches of DoRA": "peft refuses them, and those beside modules_to_save, half-way: its hooks stay, and later "
    "forwards fail",
    "mixed batches and weighted adapters": "peft has them for LoRA alone: others pass adapter_names over",
}
"""What else is otherwise, with the reason. It is not compared, or both are told what to do next."""


class PeftWorld:
    """Two models, peft's and ours."""

    def __init__(self, family: str) -> None:
        self.disabled = 0
        """How many blocks of `disable_adapter` are open."""
        self.family = family
        self.configs, self.folder, self.count = FAMILIES[family], Path(tempfile.mkdtemp()), 0
        self.theirs: Any = peft.get_peft_model(host("llama").double(), self.configs[0]()).double().eval()
        self.ours: Any = compat.get_peft_model(host("llama").double(), self.configs[0]()).double().eval()
        self.same_values("default", 1)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def place(self) -> Path:
        """A folder that nobody has used."""
        self.count += 1
        return self.folder / str(self.count)

    def same_values(self, name: str, seed: int) -> None:
        """Move the values of an adapter of peft, and give them to ours."""
        drawn, place = torch.Generator().manual_seed(seed), self.place()
        with torch.no_grad():
            for key, each in self.theirs.named_parameters():
                if name in key.split("."):
                    each += 0.1 * torch.randn(each.shape, generator=drawn, dtype=torch.float64)
        self.theirs.save_pretrained(str(place), selected_adapters=[name])
        self.ours.adapters[name].swap(place if name == "default" else place / name)

    def both(self, what: str, call: Callable[[Any], Any]) -> None:
        """Let both do something. Ours may refuse what peft refuses, and what is known."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(self.ours)
            except PeftcoreError as error:
                if (what, type(error).__name__) in REFUSED:
                    return
                try:
                    call(copy.deepcopy(self.theirs))
                except OTHERS:
                    return
                raise Wrong(f"{what} is refused, and peft does it: {error!r}; {self}") from error
            try:
                call(self.theirs)
            except OTHERS as error:
                raise Wrong(f"{what} is done, and peft refuses it: {error!r}; {self}") from error

    def names(self) -> list[str]:
        return [*self.ours.peft_config]

    def check(self) -> None:
        """Compare the two.

        Raises:
            Wrong: they differ.
        """
        if [*self.theirs.peft_config] != self.names():
            raise Wrong(f"adapters are {self.names()}, and peft's {[*self.theirs.peft_config]}")
        if self.ours.active_adapters != self.theirs.active_adapters:
            raise Wrong(f"{self.ours.active_adapters} act, in peft {self.theirs.active_adapters}")
        ours, theirs = self.trained()
        if ours != theirs and not self.disabled:  # OTHERWISE["trains while disabled"]
            raise Wrong(f"{ours} train, in peft {theirs}; {self}")
        self.compare(*(self.logits(model) for model in (self.ours, self.theirs)), "output")

    def trained(self) -> tuple[list[str], list[str]]:
        """The adapters that train, in ours and in peft's."""
        ours = [name for name, each in self.ours.adapters.items() if any(p.requires_grad for p in each.parameters())]
        keys = [key.split(".") for key, each in self.theirs.named_parameters() if each.requires_grad]
        return ours, [name for name in self.theirs.peft_config if any(name in key for key in keys)]

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(input_ids=IDS).logits
            return found

    def compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        off = float((actual - expected).abs().max() / expected.abs().max())
        if not off <= CLOSE:
            raise Wrong(f"{what} is off by {off:.2e}; {self}")

    def __repr__(self) -> str:
        return f"adapters {self.names()}, of which {self.ours.active_adapters} act"


names = st.sampled_from(NAMES)
seeds = st.integers(1, 5)
STEPS = st.one_of(
    st.tuples(st.just("set_adapter"), names),
    st.tuples(st.just("set_adapter"), names),
    st.tuples(st.just("freeze"), names),
    st.tuples(st.just("add_adapter"), names),
    st.tuples(st.just("delete_adapter"), names),
    st.tuples(st.just("merge_adapter"), st.none()),
    st.tuples(st.just("unmerge_adapter"), st.none()),
    st.tuples(st.just("disable_adapter"), st.none()),
)
"""Calls inside of `disable_adapter`, each with the adapter that it is about."""


class PeftHistory(RuleBasedStateMachine):
    """One random history of peft's API."""

    world: PeftWorld

    @initialize(family=st.sampled_from(["lora", "lora", *FAMILIES]))
    def begin(self, family: str) -> None:
        self.world = PeftWorld(family)

    @rule(name=names, which=st.integers(0, 3), seed=seeds)
    def add_adapter(self, name: str, which: int, seed: int) -> None:
        world = self.world
        config = world.configs[which % len(world.configs)]
        there = name in world.names()
        world.both("add_adapter", lambda model: model.add_adapter(name, config()))
        if name in world.names() and not there:
            world.theirs.double()
            world.ours.double()
            world.same_values(name, seed)

    @rule(name=names, inference=st.booleans())
    def set_adapter(self, name: str, inference: bool = False) -> None:
        if name in self.world.names():
            self.world.both("set_adapter", lambda model: model.set_adapter(name, inference_mode=inference))

    @rule(name=names, trains=st.booleans())
    def set_requires_grad(self, name: str, trains: bool) -> None:
        if name in self.world.names():
            self.world.both("set_requires_grad", lambda model: model.set_requires_grad(name, trains))

    @rule(name=names)
    def delete_adapter(self, name: str) -> None:
        world = self.world
        if name not in world.names() or world.ours.adapters[name].merged:  # OTHERWISE, as it is called
            return
        acted = world.ours.active_adapters == [name]
        world.both("delete_adapter", lambda model: model.delete_adapter(name))
        if acted and name not in world.names():  # OTHERWISE["acts after delete_adapter"]
            self.set_adapter(world.names()[0])

    @rule(chosen=st.none() | st.lists(names, unique=True, min_size=1, max_size=2))
    def merge_adapter(self, chosen: list[str] | None = None) -> None:
        if all(name in self.world.names() for name in chosen or ()):
            self.world.both("merge_adapter", lambda model: model.merge_adapter(adapter_names=chosen))

    @rule()
    def unmerge_adapter(self) -> None:
        self.world.both("unmerge_adapter", lambda model: model.unmerge_adapter())

    @rule()
    def merge_and_unload(self) -> None:
        """Of copies: both are then models without adapters."""
        world, found = self.world, []

        def merged(model: Any) -> None:
            bare = copy.deepcopy(model).merge_and_unload()
            found.append(world.logits(bare))

        world.both("merge_and_unload", merged)
        if len(found) == 2:
            world.compare(*found, "output of what is merged")

    @rule()
    def unload(self) -> None:
        world = self.world
        along = any(each.modules_to_save for each in world.ours.peft_config.values())
        if along or any(each.merged for each in world.ours.adapters.values()):  # OTHERWISE["unload()"]
            return
        ours, theirs = (copy.deepcopy(model).unload() for model in (world.ours, world.theirs))
        world.compare(world.logits(ours), world.logits(theirs), "output without adapters")

    @rule(name=names, other=names, trains=st.booleans(), crossed=st.booleans())
    def save_and_load(self, name: str, other: str, trains: bool, crossed: bool) -> None:
        """Load what was saved under another name; each what it saved itself, or what the other did."""
        world = self.world
        if name not in world.names():
            return
        configs = world.theirs.peft_config
        if other in configs and configs[other].to_dict() != configs[name].to_dict():
            return  # peft writes into the tensors of the other one, which have other sizes; ours replaces it
        places = {}
        for model in (world.ours, world.theirs):
            place = world.place()
            model.save_pretrained(str(place), selected_adapters=[name])
            places[id(model)] = place if name == "default" else place / name
        if crossed:
            places = {id(world.ours): places[id(world.theirs)], id(world.theirs): places[id(world.ours)]}

        def load(model: Any) -> None:
            model.load_adapter(str(places.get(id(model), places[id(world.theirs)])), other, is_trainable=trains)

        world.both("load_adapter", load)

    @rule(rows=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=2, max_size=2))
    def mixed_batch(self, rows: list[str]) -> None:
        world, found = self.world, []

        def run(model: Any) -> None:
            with torch.no_grad():
                found.append(model.eval()(input_ids=IDS, adapter_names=rows).logits)

        if world.family != "lora" or any(row not in [*world.names(), "__base__"] for row in rows):
            return
        configs = world.theirs.peft_config.values()
        if not any(each.use_dora or each.modules_to_save for each in configs):  # OTHERWISE["mixed batches of DoRA"]
            world.both("adapter_names", run)
            if len(found) == 2:
                world.compare(*found, f"output of rows {rows}")

    @rule(pair=st.permutations(NAMES), how=st.sampled_from(["cat", "svd"]))  # OTHERWISE["linear"]
    def add_weighted_adapter(self, pair: list[str], how: str) -> None:
        world = self.world
        one, two, new = pair
        if world.family != "lora" or new in world.names() or any(name not in world.names() for name in (one, two)):
            return
        configs = [world.theirs.peft_config[name] for name in (one, two)]
        if configs[0].use_rslora or any(each.use_dora for each in configs):
            return  # OTHERWISE["weighted adapters of rsLoRA and DoRA"]
        rank = {"svd_rank": 3} if how == "svd" else {}

        def add(model: Any) -> None:
            if model is world.ours:
                sources = {one: 0.7, two: 0.3}
                peftcore.combine(model.get_base_model(), sources, how, name=new, rank=rank.get("svd_rank"))
            else:
                model.add_weighted_adapter([one, two], [0.7, 0.3], new, combination_type=how, **rank)
            model.set_adapter(new)

        world.both("add_weighted_adapter", add)

    @rule()
    def train(self) -> None:
        """One step of SGD."""
        if any(each.merged for each in self.world.ours.adapters.values()):  # OTHERWISE["train while merged"]
            return

        def step(model: Any) -> None:
            parameters = [each for each in model.parameters() if each.requires_grad]
            if not parameters:
                return
            loss = model.eval()(input_ids=IDS).logits.square().mean()
            if loss.requires_grad:
                loss.backward()
                torch.optim.SGD(parameters, lr=0.1).step()
            model.zero_grad()

        self.world.both("train", step)

    @rule(steps=st.lists(STEPS, max_size=3))
    def disable_adapter(self, steps: list[tuple[str, str | None]]) -> None:
        """Do something while adapters are disabled."""
        world = self.world
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with world.ours.disable_adapter(), world.theirs.disable_adapter():
                world.disabled += 1
                world.check()
                added = False
                for step, name in steps:
                    added |= step == "add_adapter"
                    if not (added and step in ("disable_adapter", "set_adapter")):  # OTHERWISE, as it is called
                        self.inside(step, name)
                    world.check()
                world.disabled -= 1
        for name in world.names():  # OTHERWISE["trains after disable_adapter"]
            if not world.disabled:
                world.theirs.set_requires_grad(name, name in world.trained()[0])
        world.check()

    def inside(self, step: str, name: str | None) -> None:
        if name is None:
            {
                "merge_adapter": self.merge_adapter,
                "unmerge_adapter": self.unmerge_adapter,
                "disable_adapter": lambda: self.disable_adapter([]),
            }[step]()
        elif step == "add_adapter":
            self.add_adapter(name, 1, 1)
        elif step == "freeze":
            self.set_requires_grad(name, False)
        else:
            {"set_adapter": self.set_adapter, "delete_adapter": self.delete_adapter}[step](name)

    @rule()
    def copied(self) -> None:
        world = self.world
        world.ours, world.theirs = copy.deepcopy(world.ours), copy.deepcopy(world.theirs)

    @invariant()
    def both_are_the_same(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
