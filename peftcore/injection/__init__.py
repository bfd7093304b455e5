"""What a user holds: `apply` gives an injection, which is switched, merged, quantized, removed.

It may import `training`, and what is below; saving is handed to `files`, which is above. In the order of reading:

- `applied`: what a method put into a model; the parts of a hybrid.
- `summary`: one injection at a glance.
- `quantized_layer`: modules whose weights are packed, and how one is replaced in place.
- `freezing`: the base is frozen while adapters are on it.
- `merging`: folding into the weights, and the exact way back.
- `injection`: the injection itself.
- `switching`: `activate`, `route`, `call`.
- `applying`: `apply` and `plan`.
- `quantization`: `quantize`, and the contract of a scheme.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("injection")
