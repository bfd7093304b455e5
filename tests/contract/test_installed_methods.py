"""A method with its operators in a model, as the method's own functions see it."""

import inspect

from core_toys import perceptron

import peftcore
from peftcore import Injection
from peftcore.author import AppliedMethod, Method
from peftcore.contract.installed_methods import Installed


def test_functions_of_methods_get_what_both_have() -> None:
    takes = [each for _, each in inspect.getmembers(Method, inspect.isfunction) if "injection" in each.__annotations__]
    assert len(takes) == 8
    assert {each.__annotations__["injection"] for each in takes} == {"AppliedMethod"}
    assert issubclass(Injection, Installed) and issubclass(Installed, AppliedMethod)


def test_a_part_belongs_to_what_is_installed() -> None:
    injection = peftcore.apply(perceptron(), [{"method": "lora", "rank": 2, "target": "first"}])
    whole = next(iter(injection.parts.values())).whole
    assert whole is injection.whole is injection and isinstance(whole, Installed)
    with whole.disabled():
        assert not injection.active
    assert injection.active and not whole.merged and not whole.low_memory and whole.made_dense == ()
