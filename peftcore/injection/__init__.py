"""Injections, the objects that users hold: `apply` returns one, which is activated, merged, quantized, removed.

It may import `training` and the layers below; saving is left to `files`, a layer above. In the order of reading:

- `freezing`: freezes the base while adapters are on it.
- `applied`: one method with its operators, and their values; the parts of a hybrid.
- `summary`: one injection at a glance.
- `router_report`: statistics of the routers of a mixture.
- `quantized_layer`: quantized layers, and how a module becomes one in place.
- `fold_parametrizations`: replaces a computed weight (a parametrization) by a plain parameter, and restores it.
- `originals`: the tensors from before a merge, kept as asked.
- `merge_writes`: the tensors that a merge wrote, and how they are undone.
- `merging`: folding into the weights, and the exact way back.
- `swapping`: replaces the values of an adapter by those of another.
- `injection`: the injection itself.
- `idle_adapters`: offloads an adapter's tensors to CPU or disk and restores them.
- `base_dependence`: adapter tensors that are computed from the base and not stored in the file.
- `switching`: `activate`, `route`, `call`.
- `request`: the arguments of `apply` as one object: a model, a method with its options, targets, data or values.
- `applying`: `apply` and `plan`, and the steps of a request: record, look at data, install, fill in values.
- `quantization`: `quantize`, and the contract of a scheme.
- `replicated_layers`: layers that a model runs again with the same weights.
"""
