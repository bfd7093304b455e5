"""Surgery: installs the operators of a method in a model, and removes them. If an error occurs, nothing is installed.

It may import `forward` and the packages below it. In the order of reading:

- `defaults`: default targets of a method, and notices for the user about them.
- `seeding`: random numbers that depend on a seed and a path.
- `table_rows`: rows of token tables that are saved with an adapter.
- `adapted_models`: a check of models that share modules. The operators in a shared module belong to one of the models.
- `parallel_models`: checks which operators are allowed in tensor-parallel models, which compute with pieces of their
  weights.
- `surgeon`: the object that `Method.inject` receives, which records operators.
- `forced_attributes`: attributes that some modules must have while a model is adapted.
- `installation`: installs and removes recorded operators.
- `watched_sites`: an error for target modules that were removed from the model, or that never ran.
- `sharding`: the memory per process if a planned model is sharded.
- `planning`: the result of `plan`, a dry run of `apply`.
"""
