"""Layers: how modules store their tensors, and the linear maps that they compute.

It may import `utils` and `peftcore.errors`. In the order of reading:

- `pieces`: a parameter of which this process holds a piece (FSDP2, tensor parallelism, ZeRO-3).
- `fsdp`: models whose parameters are sharded over processes.
- `adapter_modules`: the modules in which operators live.
- `model_locks`: locks of models, which threads hold while they change one.
- `kernels`: fused products, each equal to plain mathematics.
- `computed_tensors`: tensors that a module computes from others (weight norm, pruning).
- `layer`: the interface of any layer.
- `kinds`: linear layers, embeddings, convolutions and related kinds.
- `tensor_parallel`: linear layers of which each process holds rows or columns.
- `detect`: finds the kind of a module's dense tensor.
"""
