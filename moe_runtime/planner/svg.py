"""The few shapes that a drawing is made of, as SVG text: nothing from outside, no script, no style sheet.

All lengths are pixels. Numbers are written to a hundredth of one, so equal drawings are equal texts.
"""

from html import escape

INK = "#222222"


def document(width: float, height: float, title: str, content: str) -> str:
    """A whole SVG file on a white ground."""
    ground = element("rect", width=width, height=height, fill="#ffffff")
    return element(
        "svg",
        element("title", escape(title)) + ground + content,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        font_family="sans-serif",
    )


def element(tag: str, content: str = "", /, **attributes: float | str) -> str:
    """One element on a line of its own; an underscore in an attribute's name stands for a dash.

    Args:
        content: what stands inside, escaped already.
    """
    start = " ".join([tag, *(_attribute(name, value) for name, value in attributes.items())])
    return f"<{start}>{content}</{tag}>\n" if content else f"<{start}/>\n"


def _attribute(name: str, value: float | str) -> str:
    text = escape(value) if isinstance(value, str) else number(value)
    return f'{name.rstrip("_").replace("_", "-")}="{text}"'


def number(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def box(x: float, y: float, width: float, height: float, fill: str, **more: float | str) -> str:
    """A filled rectangle."""
    return element("rect", x=x, y=y, width=width, height=height, fill=fill, **more)


def frame(x: float, y: float, width: float, height: float, thickness: float) -> str:
    """The border of a rectangle."""
    return box(x, y, width, height, "none", stroke=INK, stroke_width=thickness)


def words(x: float, y: float, text: str, size: float = 12, anchor: str = "start", **more: float | str) -> str:
    """A line of text; `y` is its base line, `anchor` start, middle or end."""
    return element("text", escape(text), x=x, y=y, font_size=size, text_anchor=anchor, fill=INK, **more)


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> str:
    """A thin straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=1)


def hatch(x: float, y: float, width: float, height: float, step: float = 5) -> str:
    """A rectangle paled and hatched with rising lines.

    The lines are cut to the rectangle here; a pattern would need a reference by URL, which a page that
    holds several drawings could mix up.
    """
    rises = []
    reach = step
    while reach < width + height:  # the line through (x + reach, y) and (x, y + reach)
        low, high = max(0.0, reach - height), min(width, reach)
        rises.append(
            f"M{number(x + low)} {number(y + reach - low)}L{number(x + high)} {number(y + reach - high)}"
        )
        reach += step
    paled = box(x, y, width, height, "#ffffff", fill_opacity=0.55)
    if not rises:
        return paled
    return paled + element("path", d="".join(rises), stroke=INK, stroke_width=1, fill="none")
