"""Sphinx configuration. `_ext.py` writes the method pages into docs/methods/ at every build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from adaptrank import __version__

project = "adaptrank"
author = "the adaptrank contributors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
    "_ext",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_fence_as_directive = ["mermaid"]  # a fence that GitHub draws as well
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"adaptrank {release}"
html_copy_source = False
