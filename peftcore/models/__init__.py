"""Models of transformers, timm and diffusers by name: opened with their weights, or built without, and the costs of a
method there.

It may import all of peftcore that is above it in this list of layers but `peftcore.testing`, and nothing of peftcore
but the command line imports it, so that ``import peftcore`` stays light. No code of a repository runs, and no pickle is
read. In the order of reading:

- `configurations`: configurations, and the classes that they name.
- `model_names`: what a MODEL names, one class a kind.
- `loading`: models and tokenizers to train, by folder, file, package or name.
- `opening`: models of any library in folders, opened and written again.
- `example_inputs`: inputs of a forward, from a configuration.
- `skeletons`: models without their weights, from a configuration.
- `resource_counters`: the tensors that a forward keeps for its backward.
- `activation_memory`: the memory that a forward keeps for its backward.
- `dry_run`: a method as the user asks for it, recorded on a model and not done.
- `costs`: the parameters that it would add, and the cost of a step of training.
"""
