"""The registry of plugins, and of methods by name.

It may import `contract` and lower packages. In the order of reading:

- `plugins`: loads plugins from entry points, and the core's own plugin by name.
- `evidence`: lists the libraries and authors' code with whose results a plugin's tests compare its methods.
- `peft_names`: recognizes configurations of peft, and advises what to write instead of peft's options.
- `preset_methods`: builds the class of a preset, a copy of the method's class with other defaults.
- `catalogue`: methods by name, their descriptions, and the schema of their options.
- `method_text`: splits the description of a method, its docstring, at the headings.
- `equation_only`: logs a warning for methods whose tests compare them only with their equation.
"""
