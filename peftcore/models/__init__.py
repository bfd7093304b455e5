"""Models of transformers, timm and diffusers by name: opened with their weights, or built without them; and the costs
of a method on such a model.

It may import all lower packages except `peftcore.testing`, and only the command line imports it, so that ``import
peftcore`` stays fast. Code in a model's repository is never run, and pickles are never read. In the order of reading:

- `configurations`: configurations, and the classes that they name.
- `model_names`: the kinds of names that a MODEL may have, one class for each kind.
- `loading`: models and tokenizers to train, by folder, file, package or name.
- `opening`: opens and writes folders with a model of any of the three libraries.
- `example_inputs`: inputs of a forward, from a configuration.
- `skeletons`: models without their weights, from a configuration.
- `resource_counters`: the tensors that a forward keeps for its backward.
- `activation_memory`: the memory that a forward keeps for its backward.
- `dry_run`: records the changes that a method would make to a model, without making them.
- `costs`: the parameters that a method would add, and the cost of a training step.
"""
