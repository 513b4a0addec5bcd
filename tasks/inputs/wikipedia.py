"""The articles of a MediaWiki XML dump (.bz2) as plain text, read one after another."""

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from blocks.errors import CorpusError, first_line

_NO_TEXT_LINK = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_END_MATTER = {"references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes"}
_REFERENCE = re.compile(
    r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>", re.IGNORECASE | re.DOTALL
)  # the parser keeps its text
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;:]*\)")  # what a template for pronunciation or dates leaves
_LEFTOVER_LINE = re.compile(
    r"^(thumb\||[|!]|(file|image|category):|[*#:;]+$|.*(\[\[|\]\]|\{\{|\}\}|\{\||\|\}|'''|<ref|px\|))", re.IGNORECASE
)


def articles_of(path: Path) -> Iterator[str]:
    """The plain text of each article; empty for redirects and pages that are not articles. Raises CorpusError."""
    try:
        with bz2.open(path) as file:
            events = ElementTree.iterparse(file, events=("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "end" and element.tag.endswith("}page"):
                    yield _article(element)
                    root.clear()  # else the whole dump piles up in memory
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise CorpusError(f"{path} is not a whole MediaWiki XML dump in bz2 ({first_line(error)}).") from error


def _article(page: ElementTree.Element) -> str:
    """The plain text of a page; empty when it is not an article."""
    if page.find("{*}redirect") is not None or page.findtext("{*}ns", "0") != "0":
        return ""
    return plain_text(page.findtext("{*}revision/{*}text") or "")


def plain_text(wikitext: str) -> str:
    """The prose of an article, without templates, tables, files, categories, references and the lists at its end."""
    import mwparserfromhell
    from mwparserfromhell.nodes import Heading, Tag, Wikilink

    kept = []
    for node in mwparserfromhell.parse(_REFERENCE.sub("", wikitext)).nodes:
        if isinstance(node, Heading) and str(node.title).strip().lower() in _END_MATTER:
            break
        link = isinstance(node, Wikilink) and _NO_TEXT_LINK.match(str(node.title))
        table = isinstance(node, Tag) and str(node.tag).strip().lower() == "table"
        if not link and not table:
            kept.append(node)
    lines = mwparserfromhell.wikicode.Wikicode(kept).strip_code(normalize=True, collapse=True).split("\n")
    tidy = [_EMPTY_BRACKETS.sub("", re.sub(r"\s+", " ", line)).strip() for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in tidy if not _LEFTOVER_LINE.match(line))).strip()
