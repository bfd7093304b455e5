"""For each check of files a method that fails it, and it only."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from mutant_base import RANK, Entry, Small, SmallConfig, graft_all, mutant
from mutants_lifecycle import sabotaged
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import Method, MethodConfig, Site
from peftcore.contract.surgeon_protocol import Surgeon


class DrawnScale(Small):
    """Its scale is drawn and not saved."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.scale = 1 + torch.rand((), device="cpu").item()

    def forward(self, call: Any, x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A.flatten(1)).view(weight.shape)


class NamedScale(DrawnScale):
    """Its scale depends on the injection's name."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.scale = 1.0


def scaled_by_name(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    for operator in injection.operators.values():
        if isinstance(operator, NamedScale):
            operator.scale = 1 + zlib.crc32(injection.name.encode()) % 7 / 10


def trains_by_value(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    """What trains depends on whether the operators are fresh."""
    Method.trainable(self, model, config, injection)
    for operator in injection.operators.values():
        if isinstance(operator, Small) and not operator.B.is_meta:
            operator.A.requires_grad_(not operator.B.any())


class Ramped(Small):
    """Weighs the ranks by whole numbers that are divided, which gives torch's default dtype."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.register_buffer("ramp", (torch.arange(RANK) + 1) / 7, persistent=False)

    def forward(self, call: Any, x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B * self.get_buffer("ramp"))
        return self.layer.add(y, self.layer.apply(x, A), B, 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B * self.get_buffer("ramp") @ self.A.flatten(1)).view(weight.shape)


class Signed(Small):
    """Keeps a mark beside its factors."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site, config)
        self.register_buffer("mark", torch.zeros(1, dtype=torch.int64))


def signed_by_name(self: Method, model: nn.Module, config: Any, injection: Injection) -> None:
    Method.trainable(self, model, config, injection)
    for operator in injection.operators.values():
        if isinstance(operator, Signed):
            operator.get_buffer("mark").fill_(zlib.crc32(injection.name.encode()))


def saves_notes(injection: Injection, path: str | os.PathLike[str]) -> None:
    Injection.save(injection, path)
    (Path(path) / "notes.txt").write_text("an adapter\n", encoding="utf-8")


class SavesTwice(Small):
    """Writes a second copy of one factor."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}A_copy"] = self.A.detach().clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}A_copy", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SavesMemory(Small):
    """Writes the beginning of the memory in which its tensors are."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name, value in self.named_parameters():
                memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
                destination[prefix + name] = memory[: value.numel()].view(value.shape)


def sorts_targets(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    if isinstance(surgeon.wishes.target, list):
        surgeon.wishes = replace(surgeon.wishes, target=sorted(surgeon.wishes.target))
    graft_all(self, model, config, surgeon)


def forgets_trained_modules(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    surgeon.wishes = replace(surgeon.wishes, train=())
    graft_all(self, model, config, surgeon)


class SavesSinglePrecision(Small):
    """Writes float32 whatever it holds."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination.update({key: destination[key].float() for key in list(destination) if key.startswith(prefix)})


def touches_before_loading(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
    """Leaves an attribute on a host that a file may still be refused for."""
    graft_all(self, model, config, surgeon)
    if surgeon.dry and surgeon.wishes.saved is not None and surgeon.grafts[0].site.module.weight.any():
        model.touched = True


class AnyVersion(int):
    """No version is newer."""

    def __lt__(self, other: int) -> bool:
        return False


class Lenient(SmallConfig):
    """Passes over unknown options in files."""

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Self:
        options = {key: value for key, value in json.loads(json_data).items() if key in cls.model_fields}
        return super().model_validate_json(json.dumps(options), **kwargs)


class KnowsSomeSizes(Small):
    """Refuses a size with an error of its own."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        if site.in_features == 13:
            raise ValueError("13 inputs are too many")
        super().__init__(site, config)


class LoadsHalf(Small):
    """Keeps its own B when a state dict is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}B"] = self.B.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Forgives(Small):
    """Takes back what was noted as missing."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        args[2].clear()


class StartsAgain(Small):
    """Starts from zero when a state dict brings nothing new."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        same = torch.equal(state_dict[f"{prefix}B"], self.B)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if same:
            nn.init.zeros_(self.B)


class RankConfig(SmallConfig):
    """A rank."""

    rank: int = RANK
    """Rank of the update."""


class Diluted(Small):
    """Says that its factors may be larger, and divides by their size."""

    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, config: RankConfig) -> None:
        super().__init__(site, config)
        self.A = nn.Parameter(self.A.detach()[:1].repeat(config.rank, *[1] * (self.A.dim() - 1)))
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))

    def forward(self, call: Any, x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        return self.layer.add(y, self.layer.apply(x, A), B, RANK / len(A))

    def merged(self, weight: Tensor) -> Tensor:
        return weight + RANK / len(self.A) * (self.B @ self.A.flatten(1)).view(weight.shape)


MUTANTS: dict[str, Entry] = {
    "loading_gives_the_same_outputs": (mutant("drawn_scale", DrawnScale), "mlp"),
    "the_default_dtype_changes_nothing": (mutant("ramped", Ramped), "mlp"),
    "a_file_loads_under_any_name": (mutant("named_scale", NamedScale, trainable=scaled_by_name), "mlp"),
    "values_can_be_swapped": (mutant("diluted", Diluted, config=RankConfig), "mlp"),
    "a_loaded_adapter_is_frozen": (mutant("trains_by_value", trainable=trains_by_value), "mlp"),
    "equal_adapters_are_equal_bytes": (mutant("signed_by_name", Signed, trainable=signed_by_name), "mlp"),
    "save_writes_its_files": (sabotaged("saves_notes", save=saves_notes), "mlp"),
    "the_file_holds_each_tensor_once": (mutant("saves_twice", SavesTwice), "mlp"),
    "parameters_of_one_storage_are_saved": (mutant("saves_memory", SavesMemory), "mlp"),
    "options_come_back_as_written": (mutant("sorts_targets", inject=sorts_targets), "mlp"),
    "trained_modules_travel_along": (mutant("forgets_trained_modules", inject=forgets_trained_modules), "mlp"),
    "dtypes_come_back": (mutant("saves_single_precision", SavesSinglePrecision), "mlp"),
    "damaged_tensors_are_listed": (mutant("touches_before_loading", inject=touches_before_loading), "mlp"),
    "newer_files_are_refused": (mutant("any_version", config_version=AnyVersion(1)), "mlp"),
    "unknown_options_in_files_are_refused": (mutant("lenient", config=Lenient), "mlp"),
    "another_base_is_refused": (mutant("knows_some_sizes", KnowsSomeSizes), "mlp"),
    "an_absent_method_is_named": (mutant("answers_to_all", aliases=("unheard_of",)), "mlp"),
    "the_state_dict_round_trips": (mutant("loads_half", LoadsHalf), "bert"),
    "a_state_dict_that_lacks_a_site_is_refused": (mutant("forgives", Forgives), "mlp"),
    "base_weights_load_into_an_adapted_host": (mutant("starts_again", StartsAgain), "mlp"),
}
