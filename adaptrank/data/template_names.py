"""Read a chat template that is given as text, as a file, or by its name."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from adaptrank._errors import UserError, UserTypeError, did_you_mean, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDINGS = (".jinja", ".jinja2", ".j2")
"""Endings of files with a template."""

GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Statements around a reply, which plain Jinja does not know."""

FOLDERS = {"trl": "chat_templates"}
"""Package -> its folder of templates."""


def check_chat_template(given: Any) -> None:
    """Raise if a value of the key `chat_template` is no template, as far as a tokenizer is not
    needed to say so.

    Raises:
        UserError: if a file is missing, or if the template is no Jinja.
    """
    if given is None:
        return
    if not isinstance(given, str):
        raise UserTypeError(
            f"chat_template={given!r} is no text. Give a template, a file or a name."
        )
    if not given.strip():
        raise UserError(
            "chat_template is empty. Give a template, a file or a name, or leave it out."
        )
    text = _given_text(given)
    if text is not None:
        _check_jinja(text, given)


def template_text(given: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the template that a value of the key `chat_template` stands for.

    Args:
        given: a template, the path of a file, or the name of a template: one of the tokenizer's
            own, or one that an installed package brings.
        tokenizer: the tokenizer.

    Raises:
        UserError: if there is no such template.
    """
    text = _given_text(given)
    if text is not None:
        return text
    own = getattr(tokenizer, "chat_template", None)
    own_names = own if isinstance(own, dict) else {}
    if given in own_names:
        return str(own_names[given])
    shipped = shipped_templates()
    if given in shipped:
        return shipped[given].read_text(encoding="utf-8")
    names = [*own_names, *shipped]
    known = f"Known are {some(sorted(names))}." if names else "TRL brings some, if it is installed."
    raise UserError(
        f"chat_template={given!r} is no template ({{% ... %}}), no file and no name."
        f"{did_you_mean(given, names)} {known}"
    )


def shipped_templates() -> dict[str, Path]:
    """Return {name: file} of the chat templates that installed packages bring."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            files = sorted(Path(place, folder).glob("*.jinja"))
            found |= {file.stem: file for file in files}
    return found


def _given_text(given: str) -> str | None:
    """Return the template of a text or of a file, or None for a name.

    Raises:
        UserError: if a file is missing or cannot be read.
    """
    if "{{" in given or "{%" in given:
        return given
    file = Path(given).expanduser()
    is_path = given.endswith(ENDINGS) or "/" in given
    if not is_path and not _is_file(file):
        return None
    if not _is_file(file):
        names = [str(path) for path in file.parent.glob("*") if path.suffix in ENDINGS]
        raise UserError(
            f"chat_template={given!r} is no file.{did_you_mean(given, names)} Give a template, "
            "a file or a name."
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template={given!r} cannot be read as UTF-8 ({error}).") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A text may be too long for a path.
        return False


def _check_jinja(text: str, given: str) -> None:
    """Raise if a text is no template."""
    name = repr(given if len(given) <= 60 else given[:60] + "...")
    if "{{" not in text and "{%" not in text:
        raise UserError(
            f"chat_template={name} is no template: it has no `{{{{ ... }}}}` and no `{{% ... %}}`."
        )
    plain = GENERATION.sub("", text)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat_template={name} is no Jinja (line {error.lineno}: {error.message})."
        ) from error
