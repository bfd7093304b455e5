"""The registry of plugins, and of methods by name.

It may import `contract` and lower packages. In the order of reading:

- `plugins`: loads entry points; the core's own hook implementations are a plugin that is loaded by name.
- `evidence`: the sources of numbers with which a plugin's tests compare its methods, read from the plugin's package.
- `peft_names`: configurations of peft, and what to write for its options.
- `preset_methods`: the class of a preset, which is the method's class with other defaults.
- `catalogue`: methods by name, a description of each, the schema of their options.
- `method_text`: the description of a method, divided at the headings of its docstring.
- `equation_only`: the notice that a method was compared only with its equation.
"""
