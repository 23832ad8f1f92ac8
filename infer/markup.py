"""HTML out of plain strings: tag("td", "1 < 2", class_="best"). What is not Html already is escaped, always.

Standard library only.
"""

import html
import re

from data.common.errors import printable

VOID = {"img", "input", "meta"}  # they hold nothing, and have no closing tag
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # no HTML may hold them; newline and tab stay


class Html(str):
    """A string that is HTML already."""


def escaped(text):
    """Any text -> Html that shows it, between tags as well as in an attribute."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", printable(str(text)))))


def join(parts, between=""):
    """Parts, Html or text -> Html."""
    return Html(escaped(between).join(map(escaped, parts)))


def tag(name, *inside, **attributes):
    """An element -> Html. An attribute that is None or False is left out, one that is True has no value.

    class_ is class, and aria_label is aria-label, because Python's names have no "-".
    """
    words = [name]
    for attribute, value in attributes.items():
        if value is not None and value is not False:
            attribute = attribute.rstrip("_").replace("_", "-")
            words.append(attribute if value is True else f'{attribute}="{escaped(str(value))}"')
    return Html(f"<{' '.join(words)}>" + ("" if name in VOID else f"{join(inside)}</{name}>"))
