"""Charts: shapes to scale, everything named, nothing from outside."""

import xml.etree.ElementTree as ElementTree

import pytest

from moe_runtime.planner.charts import both_sides, curves, stacked_columns

SVG = "{http://www.w3.org/2000/svg}"


def _titled(text: str) -> dict[str, ElementTree.Element]:
    """Shapes by what they say."""
    found = {}
    for parent in ElementTree.fromstring(text).iter():
        said = parent.find(f"{SVG}title")
        if said is not None and said.text is not None:
            found[said.text] = parent
    return found


def test_parts_of_a_column_stand_on_each_other_to_scale() -> None:
    text = stacked_columns("memory", "GB", "rank", {"0": {"a": 10.0, "b": 30.0}}, ("limit", 50.0))
    shapes = _titled(text)
    a, b = (shapes[f"0, {part} GB"].find(f"{SVG}rect") for part in ("a: 10", "b: 30"))
    assert a is not None and b is not None
    height = {one: float(one.get("height", "nan")) for one in (a, b)}
    assert height[b] == pytest.approx(3 * height[a], abs=0.02)
    assert float(b.get("y", "nan")) + height[b] == pytest.approx(float(a.get("y", "nan")), abs=0.02)
    assert "limit" in text and "rank" in text and "GB" in text


def test_a_curve_has_a_point_for_each_size() -> None:
    shapes = _titled(curves("cost", "US$", "GPUs", [256, 512, 1024], {"with": [4.0, 2.0, 1.0]}))
    heights = [
        float(shapes[f"with, {size} US$"].get("cy", "nan")) for size in ("256: 4", "512: 2", "1,024: 1")
    ]
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.05)


def test_one_size_alone_is_drawn() -> None:
    assert "with, 256: 4 US$" in _titled(curves("cost", "US$", "GPUs", [256], {"with": [4.0]}))


def test_ends_go_to_the_side_of_their_sign() -> None:
    text = both_sides("what matters", ["link <1>"], [-0.04], [0.02])
    assert "-4.0%" in text and "+2.0%" in text and "link &lt;1&gt;" in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize("mark", ["http:", "https:", "<script", "url("])
def test_nothing_comes_from_outside(mark: str) -> None:
    text = stacked_columns("t", "s", "rank", {"0": {"a": 1.0}}) + both_sides("t", ["n"], [-0.1], [0.1])
    assert mark not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
