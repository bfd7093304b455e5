"""Names for readers and writers of other programs' files.

- For a format: `Format`, with `Files`, `Tensors` and `Content`. `Description` describes one adapter in a file.
- For a reader: `Found` has the tensors in a file for one module, `Place` the operator that gets them, and `Keys` the
  options in a file.
- For files of peft: `PeftMethod`, with one subclass for each type of configuration; `SoftPrompt` for prompts.
- For files of kohya's scripts, LyCORIS and diffusers: `KohyaMethod`.
- For files of AdapterHub: `HubArchitecture` and `HubPlace`.

See docs/write-a-format.md.
"""

from peftcore.files.added_rows import check_no_rows
from peftcore.files.envelope import FORMAT, Envelope, SavedSite
from peftcore.files.formats.adapterhub import HubArchitecture, HubPlace
from peftcore.files.formats.bundled_embeddings import only_table
from peftcore.files.formats.composing import composed
from peftcore.files.formats.description import Description, unique
from peftcore.files.formats.file_options import OFF, Keys
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.format import Content, Files, Format, Tensors
from peftcore.files.formats.kohya_method import ALPHA, VECTORS, Held, KohyaMethod, spelled
from peftcore.files.formats.ldm_names import ldm_names
from peftcore.files.formats.patterns import ending, matching
from peftcore.files.formats.peft_layers import is_one_of, not_added, uneven
from peftcore.files.formats.peft_method import PeftMethod, peft_variants
from peftcore.files.formats.peft_module_names import Group
from peftcore.files.formats.peft_prompts import BOTH, ROWS, SoftPrompt, halves, is_listed, task_of
from peftcore.files.formats.peft_writing import is_parameter, module_key
from peftcore.files.formats.pipelines import names_in, only_file
from peftcore.files.formats.rebasing import find_move
from peftcore.files.formats.translated_operators import Place
from peftcore.files.safe_io import TensorFile, read_json
from peftcore.injection.replicated_layers import replicated_layers, runs
from peftcore.injection.request import host_map
from peftcore.layers.layer import plain_class
from peftcore.registry.plugins import imported, layer_of
from peftcore.surgery.seeding import preserved_rng

__all__ = [
    "ALPHA",
    "BOTH",
    "FORMAT",
    "OFF",
    "ROWS",
    "VECTORS",
    "Content",
    "Description",
    "Envelope",
    "Files",
    "Format",
    "Found",
    "Group",
    "Held",
    "HubArchitecture",
    "HubPlace",
    "Keys",
    "KohyaMethod",
    "PeftMethod",
    "Place",
    "SavedSite",
    "SoftPrompt",
    "TensorFile",
    "Tensors",
    "check_no_rows",
    "composed",
    "ending",
    "find_move",
    "halves",
    "host_map",
    "imported",
    "is_listed",
    "is_one_of",
    "is_parameter",
    "layer_of",
    "ldm_names",
    "matching",
    "module_key",
    "names_in",
    "not_added",
    "only_file",
    "only_table",
    "peft_variants",
    "plain_class",
    "preserved_rng",
    "read_json",
    "replicated_layers",
    "runs",
    "spelled",
    "task_of",
    "uneven",
    "unique",
]
