"""The contract of plugins: methods, options, operators, compositions, hooks.

It may import `targets` and the packages below it. In the order of reading:

- `config`: the options of a method.
- `batches`: the user's data, for methods that look at it before training.
- `operators`: the trainable modules that a method adds at target modules.
- `surgeon_protocol`: the surgeon, the object that records the operators that a method puts at sites.
- `installed_methods`: a method with its operators in a model.
- `method`: a method and its tags.
- `presets`: named sets of a method's options.
- `calls`: records a module's calls, and finds the input of a call from its output.
- `compositions`: how several injections act together.
- `hookspecs`: every hook, and the version of the contract.
"""
