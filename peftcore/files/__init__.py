"""Reading and writing adapters: files are untrusted, and none is left half-written.

It may import `injection` and the layers below. In the order of reading:

- `safe_io`: reads and writes JSON and safetensors files safely.
- `envelope`: the description of a saved adapter besides its tensors.
- `auto_classes`: the Auto classes of transformers that may build a base, and their tasks.
- `added_rows`: rows that were added to token tables of the base.
- `formats`: one module for each file format, of peftcore and of other libraries.
- `readers`: rules for the parts of an adapter's file that other programs read, as data for each version of a program.
- `save_load`: `load`, and the function behind `Injection.save`.
- `continuing`: the record of an adapter in a checkpoint, compared with the adapter that continues training.
- `adapter_pool`: keeps a model's adapters within a memory limit; the values of unused adapters are moved to files or to
  the CPU.
- `bases`: `load_base`, which builds the model that an adapter's file names.
- `peft_configs`: applies configurations of peft, by loading the files that peft writes for them.
- `composition_folders`: saves and loads compositions together with their adapters.
"""
