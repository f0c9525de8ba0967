"""Pages and cards from Jinja2 templates.

A template that ends in `.html.j2` escapes every value. The templates of pages extend `page.html.j2`
and share one stylesheet. A page needs nothing else: its pictures are inside, and it has no script.
"""

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"

DOTS_PER_INCH, PIXELS_PER_INCH = 160, 96
"""Resolution of a picture, and of a page. A picture is sharp on a fine screen."""


@dataclass(frozen=True)
class Picture:
    """A picture inside a page.

    Args:
        description: text for people who cannot see the picture.
        png: content of the file.
        caption: what to see in the picture.
    """

    description: str
    png: bytes
    caption: str = ""

    @property
    def width(self) -> int:
        """Width on a page in pixels. The header of a PNG has its own width at byte 16."""
        own = int.from_bytes(self.png[16:20], "big")
        return own * PIXELS_PER_INCH // DOTS_PER_INCH

    @property
    def smallest_width(self) -> int:
        """Width in pixels at which the texts can still be read. In a smaller window it scrolls."""
        return self.width * 7 // 10

    @property
    def address(self) -> str:
        """The picture as an address that contains all of it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def render(template: str, **values: Any) -> str:
    """Return the text of a template, such as "run.html.j2", with these values in it."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
