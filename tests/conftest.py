"""A registry that begins anew, for tests of plugins and of what is registered at run time."""

import pytest

import peftcore.registry.catalogue
import peftcore.registry.plugins


@pytest.fixture
def fresh_registry():
    """The plugins are looked for again in this test, and once more after it; nothing registered at run time stays."""

    def forget() -> None:
        peftcore.registry.plugins.registry.cache_clear()
        peftcore.registry.catalogue._loaded.clear()
        peftcore.registry.catalogue._registered.clear()

    forget()
    yield
    forget()
