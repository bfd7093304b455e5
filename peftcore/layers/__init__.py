"""Layers: how modules store their tensors, and the linear maps that they compute.

It may import `utils` and `peftcore.errors`. The modules, in the order of reading:

- `pieces`: parameters that are partitioned over processes (FSDP2, tensor parallelism, ZeRO-3).
- `fsdp`: models whose parameters are sharded over processes.
- `adapter_modules`: the modules that contain the operators.
- `model_locks`: locks that a thread holds while it changes a model.
- `kernels`: fused kernels, each with an equal plain form.
- `computed_tensors`: tensors that a module computes from others (weight norm, pruning).
- `layer`: `Layer`, the interface of all layers.
- `kinds`: linear layers, embeddings, convolutions and related kinds.
- `tensor_parallel`: linear layers whose rows or columns are distributed over processes.
- `detect`: finds the kind of a module's dense tensor.
"""
