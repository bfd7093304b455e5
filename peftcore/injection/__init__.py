"""Injections, the objects that users hold: `apply` returns one, which is activated, merged, quantized, removed.

It may import `training`, and what is below; saving is left to `files`, which is above. In the order of reading:

- `applied`: one method with its operators, and their values; the parts of a hybrid.
- `summary`: one injection at a glance.
- `router_report`: what the routers of a mixture did.
- `quantized_layer`: quantized layers, and how a module becomes one in place.
- `freezing`: the base is frozen while adapters are on it.
- `folding`: what computes a weight is folded away, and comes back.
- `originals`: the tensors from before a merge, kept as asked.
- `written`: what a merge wrote, and how it comes back.
- `merging`: folding into the weights, and the exact way back.
- `swapping`: the values of another adapter in the place of one's own.
- `injection`: the injection itself.
- `idle`: the values of an injection elsewhere, and back.
- `made_of_base`: what is made of values of the base that its file does not hold.
- `switching`: `activate`, `route`, `call`.
- `request`: what is asked for: a model, a method with its options, where to act, data or values.
- `applying`: the road of a request into the model: record, look at data, install, fill; `apply` and `plan`.
- `quantization`: `quantize`, and the contract of a scheme.
- `replicated_layers`: layers that a model runs again with the same weights.
"""
