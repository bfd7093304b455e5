"""What transformers' and diffusers' classes expect of a model, and get from an adapted one.

It may import `roles`, and what is below. In the order of reading:

- `instance_methods`: methods of a model that do something else while it is adapted.
- `save_pretrained`: saving writes the bare base.
- `admission`: the mark by which transformers' Trainer takes an adapted quantized model.
"""
