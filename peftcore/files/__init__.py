"""Reading and writing adapters: files are untrusted, and none is left half-written.

It may import `injection`, and what is below. In the order of reading:

- `safe_io`: reads and writes JSON and safetensors files safely.
- `envelope`: the description of a saved adapter besides its tensors.
- `auto_classes`: the classes of transformers by which a base may be built, and their tasks.
- `added_rows`: rows that were added to token tables of the base.
- `formats`: one module a file format, ours and other libraries'.
- `readers`: the parts of these files that other programs read, by version, as data.
- `save_load`: `load`, and the function behind `Injection.save`.
- `continuing`: the record of an adapter in a checkpoint, compared with the adapter that continues training.
- `adapter_pool`: adapters within a limit of bytes, the idle ones in files.
- `bases`: `load_base`, which builds the model that an adapter's file names.
- `peft_configs`: configurations of peft, applied as a file of theirs is loaded.
- `composition_folders`: compositions with the adapters in them.
"""
