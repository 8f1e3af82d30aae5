"""The built site in a browser, wide as a phone and as a desk, light and dark: no page scrolls sideways, every picture loads."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LOOK = """
<script>addEventListener("load", () => {
  const broken = [...document.images].filter(image => image.naturalWidth == 0).map(image => image.src);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage({page: location.href, width: innerWidth, wide, broken, images: document.images.length, paper}, "*");
})</script>
"""
FRAMES = """
<body><script>
const found = [];
addEventListener("message", ({data}) => {
  if (data.page) { found.push(data); document.body.setAttribute("data-look", JSON.stringify(found)); }
});
</script>
"""  # a browser window is never as narrow as a phone, a frame in it can be

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome"),
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs"),
]


def looked_at(pages, width, folder, dark=False):
    """What the script on each page found, in a frame of that width, for a reader who likes dark pages or light ones."""
    frames = folder / f"frames{width}.html"
    addresses = [page.as_uri() for page in pages]
    frames.write_text(FRAMES + "".join(f'<iframe width="{width}" height="900" src="{a}"></iframe>' for a in addresses))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
    command.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    done = subprocess.run([*command, frames.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(html.unescape(re.search(r'data-look="([^"]*)"', done.stdout)[1]))
    by_page = {look["page"]: look for look in found}
    assert set(by_page) == set(addresses)
    return by_page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / "docs/mkdocs.yml"),
        "-d",
        str(folder),
    ]
    subprocess.run(build, check=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    for page in folder.rglob("index.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_pages_fit_and_pictures_load(site, width, dark, tmp_path):
    found = looked_at(sorted(site.rglob("index.html")), width, tmp_path, dark).values()
    for look in found:
        red, green, blue = map(int, re.findall(r"\d+", look["paper"])[:3])
        assert (red + green + blue < 3 * 128) == dark, look
    frame = 4  # of two pixels on each side
    assert all(width - frame <= look["width"] <= width for look in found)
    assert [look for look in found if look["wide"] > 0 or look["broken"]] == []
    assert sum(look["images"] for look in found) >= 8


def test_what_is_too_wide_or_missing_is_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f'<body><div style="width: 900px">wide</div><img src="nothing.svg">{LOOK}</body>')
    (found,) = looked_at([page], 400, tmp_path).values()
    assert found["wide"] > 0
    assert len(found["broken"]) == 1
