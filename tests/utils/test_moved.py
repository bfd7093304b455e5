"""Old paths of modules are forwarded, with a word about the new ones."""

import importlib

import pytest

from peftcore.utils.moved import MOVED, WHOLE


def own(module: str) -> list[str]:
    """The public classes and functions that a module defines."""
    values = vars(importlib.import_module(module)).items()
    return [key for key, each in values if key[0] != "_" and getattr(each, "__module__", "") == module]


@pytest.mark.parametrize("old", MOVED)
def test_new_places_exist_and_old_ones_hand_on(old: str) -> None:
    importlib.import_module(f"peftcore.{old}")
    for new in MOVED[old]:
        for name in own(f"peftcore.{new}")[:1]:  # packages define nothing, and hand on what is in their modules
            with pytest.warns(DeprecationWarning, match=f"peftcore.{old}.{name} is peftcore."):
                getattr(importlib.import_module(f"peftcore.{old}"), name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hosts.vocabulary", "roles.vocabulary"),
        ("interop.peft", "files.formats.peft"),
        ("kernels.low_rank", "layers.kernels.low_rank"),
    ],
)
def test_modules_of_old_packages_are_the_new_ones(old: str, new: str) -> None:
    assert old.partition(".")[0] in WHOLE
    assert importlib.import_module(f"peftcore.{old}") is importlib.import_module(f"peftcore.{new}")


def test_what_was_never_there_is_no_module() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peftcore.never")
    with pytest.raises(ImportError), pytest.warns(DeprecationWarning):
        exec("from peftcore.weights import Layer, never")
