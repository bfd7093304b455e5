"""A stack of tokens as a site."""

from typing import Any

import pytest
import torch
from sequence_toys import host

from peftcore.errors import UnsupportedSite
from peftcore.injection.request import host_map
from peftcore.registry.plugins import layer_of
from peftcore.targets.resolver import Resolver
from peftcore.targets.sequence_sites import locate_stack


def test_a_stack_knows_its_table_and_its_other_sites() -> None:
    model: Any = host("gpt2")[0]
    resolver = Resolver(model, host_map(model), layer_of)
    site = locate_stack(resolver.module_site("transformer"), resolver)
    assert (site.path, site.tensor, site.form) == ("transformer:sequence", "wte.weight", "sequence")
    assert site.out_features == model.config.hidden_size
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(site.embedded(ids), model.transformer.wte(ids))


def test_a_module_that_embeds_no_ids_is_refused() -> None:
    model: Any = host("gpt2")[0]
    resolver = Resolver(model, host_map(model), layer_of)
    with pytest.raises(UnsupportedSite, match="is not a stack of tokens; those of this host are 'transformer'"):
        locate_stack(resolver.module_site("transformer.h.0"), resolver)
