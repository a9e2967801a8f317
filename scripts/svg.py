"""Pictures as parts of an HTML page: in its colours, and nothing else in them."""

from __future__ import annotations

import html
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")  # files, no windows
import matplotlib.pyplot as plt
from matplotlib.colors import TABLEAU_COLORS

from repopt.errors import UserError, one_line

INK, PAPER = "#010203", "#040506"  # stand for the colours of the text around a picture and of what is behind it
SERIES = [*TABLEAU_COLORS.values()]
PAGE_COLORS = {INK: "currentColor", PAPER: "var(--paper)"} | {
    color: f"var(--c{index})" for index, color in enumerate(SERIES)
}
PAGE_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("grid.color", "legend.edgecolor"), SERIES[7]),
    "legend.facecolor": PAPER,
    "axes.prop_cycle": plt.cycler(color=SERIES),
    "font.size": 8,
    "font.family": "DejaVu Sans",  # wide: what the page has in its place takes no more room
    "svg.fonttype": "none",
    "svg.hashsalt": "repopt",
}
# What a picture in a page consists of: elements, and attributes that are coordinates.
SHAPES = {"path", "rect", "line", "polyline", "polygon", "circle", "ellipse", "text", "tspan", "image"}
ELEMENTS = {"svg", "g", "defs", "use", "clipPath"} | SHAPES
GEOMETRY = {"d", "points", "transform", "x", "y", "width", "height"}
VIEW_BOX = re.compile(r"-?[\d.]+ -?[\d.]+ \d+(?:\.\d+)? \d+(?:\.\d+)?")
ELSEWHERE = re.compile(r"\\|//|:\s*data|javascript|image-set|url\((?!#)", re.IGNORECASE)


def svg_of(draw: Callable[[Path], None]) -> ElementTree.Element:
    """What a function of plots.py draws, for `inline_svg`.

    Args:
        draw: calls it with a path.
    """
    with tempfile.TemporaryDirectory() as folder, plt.rc_context(PAGE_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page has other fonts
        path = Path(folder, "picture.svg")
        draw(path)
        return read_svg(path)


def read_svg(path: Path) -> ElementTree.Element:
    """An SVG file; UserError where it is none."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{str(path)!r} is no SVG: {one_line(error)}") from None
    if _local(root.tag) != "svg" or not VIEW_BOX.fullmatch(root.get("viewBox", "")):
        raise UserError(f"{str(path)!r} is no SVG with a viewBox")
    return root


def inline_svg(picture: ElementTree.Element, prefix: str, description: str) -> str:
    """A picture as a part of an HTML page: in the page's colours, and without all that runs or comes from elsewhere.

    Args:
        picture: with the colours of PAGE_STYLE for those that the page has.
        prefix: of its ids, by which those of many pictures are told apart.
        description: for those who do not see it.
    """
    box = picture.attrib["viewBox"]
    width = float(box.split()[2])
    content = "".join(_markup(child, prefix) for child in picture)
    attributes = {"viewBox": box, "style": f"--w: {width:.0f}", "role": "img", "aria-label": description}
    return f"<svg{_attributes(attributes)}>{content}</svg>"


def _local(name: object) -> str:
    """A name without its namespace; empty for comments and the like."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""


def _markup(element: ElementTree.Element, prefix: str) -> str:
    name = _local(element.tag)
    if name not in ELEMENTS:
        return ""
    attributes = {}
    for full, value in element.attrib.items():
        key = _local(full)
        if key == "id":
            value = prefix + value
        elif key == "href":
            if name == "image" and value.startswith("data:image/png;base64,"):
                pass
            elif value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            else:
                continue
        elif key.startswith("on") or ELSEWHERE.search(value):
            continue
        else:
            value = value.replace("url(#", f"url(#{prefix}")
            value = _rounded(value) if key in GEOMETRY else _in_page_colors(value)
        attributes[key] = value
    inner = html.escape(element.text or "", quote=False) if name in ("text", "tspan") else ""
    for child in element:
        inner += _markup(child, prefix)
        inner += html.escape(child.tail or "", quote=False) if name == "text" else ""
    return f"<{name}{_attributes(attributes)}>{inner}</{name}>" if inner else f"<{name}{_attributes(attributes)}/>"


def _attributes(attributes: Mapping[str, str]) -> str:
    return "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())


def _rounded(value: str) -> str:
    """Coordinates to a hundredth, which is less than what is seen."""
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)


def _in_page_colors(value: str) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: PAGE_COLORS.get(match[0].lower(), match[0]), value)
