"""Bottleneck adapters and (IA)^3 in AdapterHub's files (checked against adapters 1.3.0).

The adapters package's `seq_bn`, `double_seq_bn` and `par_bn` are our Pfeiffer, Houlsby and parallel adapters, and its
`adapter_plus` is our Pfeiffer adapter around the whole block. The method that a file contains is determined by its
options for the adapter's position, its input, and the sum with its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore.author import Resolver, is_post_norm
from peftcore.author.formats import Found, HubArchitecture, HubPlace, Keys
from peftcore.errors import CheckpointError

WHERE = ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before", "original_ln_after")
KINDS = {
    (False, True, False, True, True): "pfeiffer_adapter",
    (True, True, False, False, True): "houlsby_adapter",
    (True, False, False, False, True): "houlsby_adapter",
    (False, True, False, False, True): "houlsby_adapter",
    (False, True, False, True, False): "pfeiffer_adapter",
    (False, True, True, False, True): "parallel_adapter",
}
"""The method in peftcore for each combination of the options in `WHERE`: adapter at the attention, adapter at the
feed-forward, adapter in parallel, norm before the adapter, norm after the adapter."""
BEHIND = (False, True, False, True, False)
"""The values of the options in `WHERE` for an adapter that is added to the output of the norm."""
STARTS = ("init_weights", "init_weights_seed", "reduction_factor", "leave_out", "dtype")
OF_OTHERS = (
    "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init",
    "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "inv_adapter_reduction_factor",
)  # fmt: skip
"""Options without an effect, since they belong to variants that other options switch off."""
ACTIVATIONS = {"gelu": "gelu", "gelu_orig": "gelu", "relu": "relu", "swish": "silu", "silu": "silu", "tanh": "tanh"}


class HubBottleneck(HubArchitecture):
    """Translates bottleneck adapters: two linear maps with a non-linearity between them."""

    holder = "adapters"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        keys.pass_over(*STARTS, *OF_OTHERS)
        for key in ("phm_layer", "cross_adapter", "use_gating", "ln_before", "ln_after", "adapter_residual_before_ln"):
            keys.only(key, False)
        keys.only("inv_adapter", None)
        keys.only("dropout", 0.0)
        where = tuple(keys.take(key, bool) for key in WHERE)
        if where not in KINDS:
            said = dict(zip(WHERE, where, strict=True))
            raise CheckpointError(f"{keys.where}: no method of peftcore has an adapter at this place: {said}")
        name = keys.take("non_linearity", str)
        if name not in ACTIVATIONS:
            raise CheckpointError(f"{keys.where}: 'non_linearity' is {name!r}; supported are {', '.join(ACTIVATIONS)}")
        size = shapes.get("adapter_up.weight", (0, 0))
        options = {"method": KINDS[where], "activation": ACTIVATIONS[name], "bottleneck": int(size[-1])}
        residual = keys.take("residual_before_ln", (bool, str), True)
        if isinstance(residual, str) or (where[3] and residual != (where != BEHIND)):
            raise CheckpointError(
                f"{keys.where}: with 'residual_before_ln' = {residual!r} the adapter's output is added at another "
                "place than in peftcore's method; this file cannot be read"
            )
        if where == BEHIND:
            options["placement"] = "pre"
        scale = keys.take("scaling", (float, str), 1.0)
        if isinstance(scale, str) and scale not in ("learned", "channel"):
            raise CheckpointError(
                f"{keys.where}: 'scaling' is {scale!r}; supported are numbers, 'learned' and 'channel'"
            )
        options["scale"] = scale if isinstance(scale, str) else float(scale)
        if options["method"] == "houlsby_adapter":
            options["train_layer_norm"] = False
        if options["method"] == "parallel_adapter":
            keys.only("stochastic_depth", 0.0)
            block = next((entry.block for entry in resolver.host.entries if entry.role == "mlp.down"), None)
            reads = "branch" if block is not None and is_post_norm(resolver, block) else "stream"
            return {**options, "reads": reads}
        return {**options, "stochastic_depth": float(keys.take("stochastic_depth", float, 0.0))}

    def role(self, place: str) -> str:
        return "attn.output" if "attention" in place else "mlp.output"

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        tensors = {
            f"{ours}.{part}": found.take(f"{theirs}.{part}", getattr(operator, ours).get_parameter(part).shape)
            for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
            for part in ("weight", "bias")
        }
        if "scale" in operator.state_dict():
            tensors["scale"] = found.take("scaling", operator.scale.shape)
        return tensors


class HubIA3(HubArchitecture):
    """Translates (IA)^3: a vector that scales a module's output."""

    holder = "loras"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        keys.pass_over("attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out")
        keys.pass_over("init_weights", "init_weights_seed", "dtype")
        for key in ("use_gating", "use_dora"):
            keys.only(key, False)
        keys.only("r", 1)
        keys.only("alpha", 1)
        keys.only("dropout", 0.0)
        return {"method": "ia3", "scale_inputs": []}

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        return {"gain": found.take("lora_B", operator.gain.shape, (*operator.gain.shape, 1))}
