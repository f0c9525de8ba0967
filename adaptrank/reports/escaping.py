"""Text of a file inside of Markdown, a picture or a terminal: shown as it is, and never obeyed.

HTML is escaped by the templates themselves.
"""

import re
import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that move the cursor, break a line or reverse the text."""

MARKDOWN = re.compile(r"([\\`*\[\]|~#!])")
"""Characters that begin something in Markdown. An underscore inside a word begins nothing."""


PLAIN_NAME = re.compile(r"[\w./:@+ ~-]+")
"""Names of models and metrics, which mean nothing else in Markdown."""


def visible(text: object) -> str:
    """Return a text with control characters written as escapes, such as `\\x1b`."""
    shown = []
    for character in str(text):
        is_hidden = unicodedata.category(character) in HIDDEN
        shown.append(_escape(character) if is_hidden else character)
    return "".join(shown)


def markdown(text: object) -> str:
    """Return a text for a line or a table cell of Markdown."""
    escaped = MARKDOWN.sub(r"\\\1", visible(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code_span(text: object) -> str:
    """Return a name as code in a line of Markdown, or escaped if it is no plain name."""
    shown = visible(text)
    return f"`{shown}`" if PLAIN_NAME.fullmatch(shown) else markdown(text)


def fence(text: str) -> str:
    """Return the line that opens and closes a block of code around a text."""
    return "`" * max(3, _longest_run(text) + 1)


def in_picture(text: object) -> str:
    """Return a text for matplotlib, which reads formulas between dollar signs."""
    return visible(text).replace("$", r"\$")


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
