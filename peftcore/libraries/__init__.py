"""Replaces methods and attributes of adapted models that other libraries call or read, such as ``save_pretrained`` of
transformers and diffusers.

It may import `registry` and lower packages. In the order of reading:

- `instance_methods`: replaces methods of a model while it is adapted.
- `save_pretrained`: a ``save_pretrained`` that writes the base without adapters.
- `admission`: the attribute by which transformers' Trainer accepts an adapted quantized model.
"""
