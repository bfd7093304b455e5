"""How modules store their tensors, and what their linear maps are.

It may import `registry`, and what is below. In the order of reading:

- `fsdp`: parameters that are cut over processes.
- `kernels`: fused products, each equal to plain mathematics.
- `layer`: the contract of a layer, and each kind of it.
- `detect`: which kind a dense tensor of a module is.
"""
