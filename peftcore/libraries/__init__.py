"""Replaces methods and attributes of adapted models that transformers and diffusers use, such as ``save_pretrained``.

It may import `registry` and lower packages. In the order of reading:

- `instance_methods`: methods of a model that are replaced while it is adapted.
- `save_pretrained`: saving writes the base without adapters.
- `admission`: the attribute by which transformers' Trainer accepts an adapted quantized model.
"""
