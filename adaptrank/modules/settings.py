"""Parts of a configuration that are more than a plain value, such as adapters."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adaptrank._errors import UserError
from adaptrank.parameterizations import Parameterization
from adaptrank.training.compiled_blocks import check_compile_options


@dataclass
class Adapter:
    """One entry of `adapters`: which layers are wrapped, and with which parameterizations.

    Args:
        parameterization: list of parameterizations, innermost first: [HyperAdapt], or
            [HyperAdapt, {class_path: LoRA, init_args: {rank: 4}}].
        targets: "all-linear", a list of last components of paths ([q_proj, v_proj]), or a regular
            expression over paths.
        exclude: layers to leave alone, as a list or a regular expression.
        name: name of the adapter. Several adapters on one layer need different names.
        split_fused: whether the parts of a fused projection (GPT-2's c_attn) become separate
            layers. By default they do for methods that read the spectrum or the blocks of W.
    """

    parameterization: list[Callable[[nn.Module], Parameterization]]
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    name: str = "default"
    split_fused: bool | dict[str, list[str]] | None = None


def read_rank_pattern(pattern: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """Return a rank pattern as it is, or read it from a `ranks.json` file, or a run's folder.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the file holds no JSON mapping.
    """
    if not isinstance(pattern, str):
        return pattern
    file = Path(pattern)
    if file.is_dir():
        file = file / "ranks.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file rank_pattern={str(file)!r}. Give a mapping, a run's folder, or its "
            "ranks.json."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"rank_pattern={pattern!r} holds no JSON mapping. Give the ranks.json of a run."
        )
    return content


def read_compile_options(given: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options of `torch.compile`, or None where nothing is compiled.

    Raises:
        UserError: if it is neither true, false nor a mapping, or for an option that does not fit.
    """
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, Mapping):
        raise UserError(
            f"compile={given!r} makes no sense. Give true, false, or options of torch.compile, "
            f"such as {{mode: max-autotune-no-cudagraphs}}."
        )
    check_compile_options(given)
    return dict(given)
