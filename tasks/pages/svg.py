"""Matplotlib figures as inline SVG in the colours and the font of the page, light or dark.

A figure is drawn once, in the colours below. In the SVG they become CSS variables; in a PNG they stay as they are.
"""

import io
import re

from matplotlib import rc_context
from matplotlib.figure import Figure

from tasks.pages.picture import FAINT, INK

GRID = "#e4e7eb"
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--line)",
    "#ffffff": "var(--paper)",
    "#000000": "var(--ink)",
}


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for HTML, without ids that two pictures could share and without external files.

    name: what a screen reader says in its place (aria-label).
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}'
    return re.sub(r"<svg[^>]*>", f'{opening} role="img" aria-label="{name}">', text, count=1).strip()
