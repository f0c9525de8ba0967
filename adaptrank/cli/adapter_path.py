"""The option `model.adapter`: an adapter that is looked up before minutes of building."""

from pathlib import Path

from adaptrank._errors import UserError
from adaptrank.artifacts import WEIGHTS, read_adapter
from adaptrank.cli import errors
from adaptrank.cli.known_classes import subclasses
from adaptrank.modules import AdaptedModule


def check_adapter_path(adapter: object, class_path: str | None) -> None:
    """Refuse what is no adapter: a checkpoint, a file, a folder without one, an unknown name.

    An adapter that is named by its repository on the Hub is downloaded here, unless the Hub's cache
    has it.

    Args:
        adapter: value of `model.adapter`.
        class_path: class of the module. One of the user's own may read `adapter` in its own way.
    Raises:
        ConfigError: if the library's own modules could not load it.
    """
    if not isinstance(adapter, str):
        return
    if Path(adapter).suffix == ".ckpt" and Path(adapter).is_file():
        raise errors.ConfigError(f"model.adapter: {errors.a_checkpoint(adapter)}")
    own = [f"{cls.__module__}.{cls.__name__}" for cls in subclasses(AdaptedModule)]
    own += [f"adaptrank.modules.{cls.__name__}" for cls in subclasses(AdaptedModule)]
    if class_path not in own:
        return
    if Path(adapter).is_file():
        inside = Path(adapter).name == WEIGHTS
        example = repr(str(Path(adapter).parent)) if inside else "such as runs/NAME/0/adapter"
        raise errors.ConfigError(
            f"model.adapter: {adapter!r} is a file. Name the folder of an adapter, {example}."
        )
    try:
        read_adapter(adapter)
    except (FileNotFoundError, UserError) as error:
        raise errors.ConfigError(f"model.adapter: {error}") from error
