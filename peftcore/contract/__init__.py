"""The contract of plugins: methods, options, operators, compositions, hooks.

It may import `peftcore.errors`. In the order of reading:

- `peft_names`: what peft calls otherwise.
- `config`: the options of a method.
- `method`: a method and its tags.
- `presets`: options of a method under a name of their own.
- `dropout`: dropout of an adapter turned off for good.
- `operators`: the trainable modules that a method puts at target modules.
- `calls`: what a module was given, by what it returned.
- `compositions`: how several injections act together.
- `hookspecs`: every hook, and the version of the contract.
"""
