"""Injections: `apply` returns one, and its user activates, trains, merges, saves and removes it.

It may import `training` and the layers below it. Saving is in `files`, a layer above. The modules, in the
order of reading:

- `freezing`: freezes the base while adapters are on it.
- `applied`: the parts of a hybrid method; copies values into an adapter's tensors.
- `summary`: the summary of one injection.
- `router_report`: statistics of the routers of a mixture.
- `quantized_layer`: quantized layers, and how a module becomes one in place.
- `fold_parametrizations`: replaces a computed weight (a parametrization) by a plain parameter, and restores it.
- `originals`: keeps the original tensors of a merge.
- `merge_writes`: records the writes of a merge, and undoes them.
- `merging`: merges an injection into the weights, and unmerges it exactly.
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
