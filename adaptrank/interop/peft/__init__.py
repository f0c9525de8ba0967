"""Adapters in the format of HF PEFT.

`export_peft` writes an adapter so that PEFT and servers load it. `import_peft` reads an adapter of
PEFT into our own classes. How a method is converted stands in `conversions.py`: the methods know
nothing of PEFT.
"""

from adaptrank.interop.peft.configuration import read_config
from adaptrank.interop.peft.conversions import READERS, OurLayer, PeftLayer, StoredLayer, to_peft
from adaptrank.interop.peft.keys import TASKS
from adaptrank.interop.peft.reading import import_peft, read_peft
from adaptrank.interop.peft.writing import export_peft

__all__ = [
    "READERS",
    "TASKS",
    "OurLayer",
    "PeftLayer",
    "StoredLayer",
    "export_peft",
    "import_peft",
    "read_config",
    "read_peft",
    "to_peft",
]
