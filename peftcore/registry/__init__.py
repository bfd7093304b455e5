"""The registry of plugins, and of methods by name.

It may import `contract` and lower packages. In the order of reading:

- `plugins`: loads plugins from entry points, and the core's own plugin by name.
- `evidence`: the sources of numbers with which a plugin's tests compare its methods, from a file in its package.
- `peft_names`: recognizes configurations of peft, and advises what to write instead of peft's options.
- `preset_methods`: the class of a preset, which is the method's class with other defaults.
- `catalogue`: methods by name, their descriptions, and the schema of their options.
- `method_text`: the description of a method, divided at the headings of its docstring.
- `equation_only`: the notice that a method was compared only with its equation.
"""
