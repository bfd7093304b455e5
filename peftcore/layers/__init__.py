"""How modules store their tensors, and what their linear maps are.

It may import `registry`, and what is below. In the order of reading:

- `fsdp`: parameters that are cut over processes.
- `kernels`: fused products, each equal to plain mathematics.
- `layer`: what the core asks of any layer.
- `kinds`: linear, embedding, convolution and their kin.
- `detect`: which kind a dense tensor of a module is.
"""

from peftcore.utils.moved import names_of

__getattr__ = names_of("layers")
