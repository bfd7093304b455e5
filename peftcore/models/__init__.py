"""Models of transformers, timm and diffusers by name: opened with their weights, or built without them; and the costs
of a method on such a model.

It may import all lower packages except `peftcore.testing`, and only the command line imports it, so that ``import
peftcore`` stays fast. Code in a model's repository is never run, and pickles are never read. In the order of reading:

- `configurations`: configurations, and the classes that they name.
- `model_names`: the kinds of names that a MODEL may have, one class for each kind.
- `loading`: loads models and tokenizers for training, by folder, file, package or name.
- `opening`: opens and writes folders with a model of transformers, diffusers or timm.
- `example_inputs`: builds inputs of a forward from a configuration.
- `skeletons`: builds models without weights (skeletons) from a configuration.
- `resource_counters`: counts operations and allocated memory.
- `activation_memory`: counts the memory that a forward saves for its backward.
- `dry_run`: records the changes that a method would make to a model, without making them.
- `costs`: the parameters that a method would add, and the cost of a training step.
"""
