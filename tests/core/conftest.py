"""The helper modules of this folder are importable, here and in fresh processes that a test starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

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
