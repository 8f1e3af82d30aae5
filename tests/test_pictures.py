"""The pictures of the documentation: what their script draws, with words for those who do not see them."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/content").rglob("*.md"))]
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]+)\)")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("transformers")  # the picture of memory asks `plan`
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pictures
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return pictures


def test_pictures_are_what_the_script_draws(pictures):
    stale = [
        name
        for name, draw in pictures.PICTURES.items()
        if (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") != draw().svg()
    ]
    assert stale == [], "python docs/pictures.py"


@pytest.mark.parametrize("column", ["normal", pytest.param("demo", marks=pytest.mark.slow)])
def test_errors_of_the_formats_are_those_that_are_stored(pictures, column):
    """But for MiniLM's, whose weights are a download."""
    errors = pictures.errors
    stored = json.loads(errors.STORED.read_text(encoding="utf-8"))
    measured = errors.demo() if column == "demo" else errors.errors(errors.gaussian())
    assert {name: row[column] for name, row in stored.items()} == pytest.approx(measured, rel=2e-3)
    assert {name: row["bits"] for name, row in stored.items()} == {
        name: bits for name, (bits, _) in errors.FORMATS.items()
    }


def test_pictures_say_what_they_show_and_stay_inside(pictures):
    for path in sorted(pictures.FOLDER.glob("*.svg")):
        root = ElementTree.parse(path).getroot()
        assert root.find(f"{SVG}title").text, path.name
        assert len(root.find(f"{SVG}desc").text) > 80, path.name
        width, height = (float(root.get(key)) for key in ("width", "height"))
        for box in root.iter(f"{SVG}rect"):
            assert float(box.get("x")) + float(box.get("width")) <= width, path.name
        for text in root.iter(f"{SVG}text"):
            assert 0 <= float(text.get("x")) <= width, (path.name, text.text)
            assert 0 <= float(text.get("y")) <= height, (path.name, text.text)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_images_of_a_page_exist_and_have_words(page):
    for image in IMAGE.finditer(page.read_text(encoding="utf-8")):
        assert len(image["alt"]) > 10, f"{page.name}: {image['path']} needs a description"
        if not image["path"].startswith("http"):
            assert (page.parent / image["path"]).is_file(), f"{page.name}: {image['path']} is not there"
