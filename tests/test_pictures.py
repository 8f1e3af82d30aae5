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


def copied(name, start, ms, way=None):
    """An event of torch's profiler."""
    if way is None:
        return {"cat": "kernel", "name": name, "ts": start * 1e3, "dur": ms * 1e3, "args": {"stream": 7}}
    args = {"stream": 20, "bytes": int(ms * 25e6)}
    return {
        "cat": "gpu_memcpy",
        "name": f"Memcpy {way} (Pinned -> Device)",
        "ts": start * 1e3,
        "dur": ms * 1e3,
        "args": args,
    }


def test_what_ran_at_the_same_time_is_drawn(pictures):
    """Two kernels, each after what was fetched for it; what the first one left goes back while the second is fetched."""
    benchmarks = str(ROOT / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        import overlap
    finally:
        sys.path.remove(benchmarks)
    events = [
        copied("", 0, 4, "HtoD"),
        copied("a", 4, 1),
        copied("", 4, 4, "HtoD"),
        copied("", 5, 4, "DtoH"),
        copied("b", 8, 1),
    ]
    others = [
        {"cat": "cpu_op", "ts": 0, "dur": 90_000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 0, "dur": 5},
    ]
    found = overlap.recorded({"traceEvents": [*events, copied("", 9.005, 4, "DtoH"), *others]})
    assert found["ms"] == pytest.approx(13.005)
    assert found["busy_ms"] == pytest.approx({"kernels": 2, "to the GPU": 8, "to the host": 8})
    assert found["GB/s"] == pytest.approx({"to the GPU": 25, "to the host": 25})
    assert (found["kernels beside copies_ms"], found["copies both ways_ms"]) == pytest.approx((2, 3))
    assert found["spans"]["to the host"] == [[5, 13.005]]  # a pause of 5 us is none
    assert found["spans"]["kernels"] == [[4, 5], [8, 9]]
    with pytest.raises(ValueError, match="both ways"):
        overlap.recorded({"traceEvents": events[:3]})
    machine = {"gpu": "a GPU", "packages": {"torch": "2.11.0"}}
    picture = pictures.timeline({**found, "what": "two matrices", "machine": machine})
    root = ElementTree.fromstring(picture.svg())
    bars = list(root.iter(f"{SVG}rect"))
    assert len(bars) == 4
    for box in bars:
        assert 0 <= float(box.get("x")) <= float(box.get("x")) + float(box.get("width")) <= 560
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"25.0 GB/s", "2.0 ms", "two matrices", "12"} <= set(words)
    assert "100% of the kernels' 2.0 ms are beside copies" in root.find(f"{SVG}desc").text


@pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES])
def test_images_of_a_page_exist_and_have_words(page):
    for image in IMAGE.finditer(page.read_text(encoding="utf-8")):
        assert len(image["alt"]) > 10, f"{page.name}: {image['path']} needs a description"
        if not image["path"].startswith("http"):
            assert (page.parent / image["path"]).is_file(), f"{page.name}: {image['path']} is not there"
