"""Hosts of the kit that only tests have which name them."""

import pytest

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import HOSTS, check_method, conformance
from peftcore.testing.doors import Declared
from peftcore.testing.hosts import ALL_HOSTS
from peftcore.testing.kit import cases


def test_it_has_the_checks_of_the_host_that_it_is_like() -> None:
    lora = peftcore.method("lora")

    def checks(host: str) -> list[str]:
        return [check.name for check, _ in cases(lora, {host: ALL_HOSTS[host]}, {}) if not check.chooses]

    assert ALL_HOSTS["mamba"].like == "llama" and checks("mamba") == checks("llama")
    assert len(checks("mamba")) > len(checks("vit"))


def test_it_is_there_for_those_who_name_it() -> None:
    assert "mamba" not in HOSTS

    def asked(**hosts: list[str]) -> set[str]:
        @conformance("lora", **hosts)
        def test(check: object) -> None: ...

        declared: Declared = vars(test)["declared"]
        assert declared.case("mamba").host is ALL_HOSTS["mamba"]
        return {name.rpartition("-")[2] for name in declared.checks}

    assert asked(hosts=["mamba"]) == {"mamba", "task"} and "mamba" not in asked()
    with pytest.raises(ConfigError, match="there are: mlp, encoder"):
        check_method("lora", hosts=["nowhere"])
