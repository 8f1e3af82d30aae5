"""The board: what its cells say, that its page has all that reports say, and what a browser makes of it.

Those in a browser need `pip install playwright`, which brings none, and a Chromium, such as Debian's.
"""

import contextlib
import copy
import html.parser
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbref.cli import main
from bnbref.conformance import board
from bnbref.conformance.board import page, picture
from bnbref.conformance.dialects import CHOICES, FP4_BY_MIDPOINTS, FP4_OF_EIGHTHS, in_words
from bnbref.conformance.explain import verdict
from bnbref.conformance.vectors import stored

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "content" / "conformance"
CASES = board.cases_of_rules()
EVERY = CASES["G-2"]
STATUSES = ("passed", "failed", "refused", "not implemented")
CHOICE, MISTAKE = "bnb-triton: x / absmax", "bnb-cpu: a vector comes back as a matrix of one row"


def finding(rule, cases, follows=(), **other):
    element = {"place": [1], "got": "131 (83)", "want": "127 (7f)"}
    body = {
        "rule": rule,
        "cases": list(cases),
        "follows": list(follows),
        "flags": [],
        "message": "1 of 2 elements are wrong",
    }
    return {**body, "input": ["x = [1.0, -0.0] float32, hex 3f800000 80000000"], "elements": [element], **other}


def body(cases, findings=(), **other):
    versions = {"torch": "2.13.0", "mine": "1.2-34+cpu"}
    return {
        "backend": "mine",
        "device": "cpu",
        "versions": versions,
        "made": "2026-11-27",
        "cases": cases,
        "findings": list(findings),
        **other,
    }


def read(folder, *bodies):
    files = [folder / f"report-{i}.json" for i in range(len(bodies))]
    for file, content in zip(files, bodies, strict=True):
        file.write_text(json.dumps(content), encoding="utf-8")
    return board.board(files)


# ---- cells ----------------------------------------------------------------------------------------------------------


def test_what_a_cell_says(tmp_path):
    first, *rest = CASES["Q4-4"]
    broken = dict.fromkeys(EVERY, "passed") | {first: "failed"}

    def state(cases, *findings, rule="Q4-4"):
        return read(tmp_path, body(cases, findings))[0].cells[rule]

    assert state(dict.fromkeys(EVERY, "passed")) == ("passed", {"passed": len(CASES["Q4-4"]), "failed": 0}, [])
    assert state(dict.fromkeys(EVERY, "refused")).state == "refused"
    assert state(dict.fromkeys(EVERY, "not implemented")).state == "not offered"
    assert state(dict.fromkeys(EVERY, "refused") | {first: "passed"}).state == "passed"
    assert state({}).state == "not judged"
    assert state(dict.fromkeys(CASES["Q4-4"], "failed")).state == "not judged"
    assert state(broken, finding("Q4-4", [first])).state == "defect"
    assert state(broken, finding("Q4-4", [first], [CHOICE])).state == "dialect"
    assert state(broken, finding("Q4-4", [first], [CHOICE, MISTAKE])).state == "defect"
    assert state(broken, finding("Q4-4", [first], [CHOICE]), finding("Q4-4", [first], [MISTAKE])).state == "defect"
    found = state(broken, finding("Q4-4", [first]))
    assert found.counts == {"passed": len(rest), "failed": 1}
    # A case that fails by another rule tells nothing of this one.
    assert state(broken, finding("Q4-1", [first])).counts == {"passed": len(rest), "failed": 0}


def test_every_rule_is_on_the_board_but_the_one_that_says_what_is_not_compared(tmp_path):
    (column,) = read(tmp_path, body(dict.fromkeys(EVERY, "passed")))
    assert set(board.RULES) - set(column.cells) == {"G-5"}
    assert column.title == "mine 1.2, cpu"
    versions = {"torch": "2.13.0", "mine": "1.2", "below": "9.0"}
    assert read(tmp_path, body({}, versions=versions))[0].title == "mine 1.2, cpu"
    assert column.count("passed") == len(column.cells)


def test_when_a_report_was_made(tmp_path):
    shown = page.as_page(read(tmp_path, body({}, made="2026-11-26")))
    assert "The report, made on 2026-11-26: " in shown


def test_another_table_of_the_same_name_is_no_choice():
    assert verdict(["mps-bitsandbytes: " + in_words("fp4", FP4_OF_EIGHTHS)]) == "defect"
    assert verdict(["bnb-default: " + in_words("fp4", FP4_BY_MIDPOINTS)]) == "dialect"


def test_published_verdicts_are_those_of_this_version():
    for file in RESULTS.glob("*.json"):
        for found in json.loads(file.read_text(encoding="utf-8"))["findings"]:
            assert found.get("verdict", verdict(found["follows"])) == verdict(found["follows"]), file


def test_a_verdict_is_of_all_that_explains():
    assert "x / absmax" in CHOICES
    assert verdict([CHOICE, MISTAKE]) == "defect"
    assert verdict(["bnb-triton: x / absmax; a tie goes to the lower code"]) == "dialect"
    assert verdict(["bnb-default: x / absmax in the partial last block; a tie goes to the lower code"]) == "defect"
    assert not any(";" in text for text in CHOICES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "no JSON"),
        ("[]", "no report"),
        (json.dumps({"backend": "mine"}), "no report"),
        (json.dumps(body({"quantize_4bit/of-tomorrow": "passed"})), "has not: quantize_4bit/of-tomorrow"),
        (json.dumps(body({}, [finding("Q4-99", [])])), "has not: Q4-99"),
        (json.dumps(body({}, [finding("Q4-1", CASES["Q4-1"], flags=["new"])])), "has not: new"),
        (json.dumps(body({}, versions={"mine": 1})), "it has no report.versions, or one of another kind"),
        (json.dumps(body({EVERY[0]: 1})), "it has no report.cases, or one of another kind"),
        (json.dumps(body({}, [3])), "it has no report.findings, or one of another kind"),
        (json.dumps(body({}, [finding("Q4-1", [])])), "a finding without a case"),
        (None, "No such file"),
    ],
)
def test_reports_that_are_none(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    assert main(["board", str(tmp_path / "r.json"), "--html", str(tmp_path / "b.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.html").exists()


def places(x, before=()):
    """Every place in what was read from JSON, by the keys that lead to it."""
    if isinstance(x, (dict, list)):
        for key, y in x.items() if isinstance(x, dict) else enumerate(x):
            yield *before, key
            yield from places(y, (*before, key))


WHOLE = body({EVERY[0]: "passed", EVERY[1]: "failed"}, [finding("Q4-1", CASES["Q4-1"], [MISTAKE], flags=["blocksize"])])
STRANGE = [
    None, 1, -1.5, True, "", "x", [], [[]], {}, [{}], [None], ["x", 1], {"x": None}, "\ud800", ["\ud800"], 10**400,
]  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(list(places(WHOLE))), st.sampled_from(STRANGE))
def test_whatever_a_report_has_is_shown_or_refused(tmp_path_factory, place, value):
    changed = part = copy.deepcopy(WHOLE)
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    columns = []
    with contextlib.suppress(ValueError):  # by which `board` says that it is none
        columns = read(tmp_path_factory.mktemp("board"), changed)
    if columns:
        assert page.as_page(columns).encode()
        assert picture.as_picture(columns).encode()


def test_a_report_in_a_report_in_a_report(tmp_path):
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        board.board([tmp_path / "r.json"])


def test_a_page_does_not_take_the_place_of_a_report_or_of_a_drawing(tmp_path, capsys):
    report = tmp_path / "r.json"
    report.write_text(text := json.dumps(body({})))
    for options in (["--html", str(tmp_path / "." / "r.json")], ["--html", "b", "--svg", "./b"]):
        assert main(["board", str(report), *options]) == 2
        assert "the command was given it twice" in capsys.readouterr().err
    assert report.read_text() == text


def test_two_reports_of_one_name_are_refused(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(body({})))
    assert main(["board", str(tmp_path / "r.json"), str(tmp_path / "r.json")]) == 2
    assert "names of their own, got r twice" in capsys.readouterr().err


def test_reports_of_a_cpu_have_every_case():
    for file in RESULTS.glob("*.json"):
        report = json.loads(file.read_text(encoding="utf-8"))
        assert report["device"] != "cpu" or report["cases"].keys() == set(stored()), f"{file.name} is of other vectors"


def test_numbers_in_prose_are_those_of_the_reports():
    root = RESULTS.parent.parent.parent

    def statuses(backend):
        return Counter(json.loads((RESULTS / f"{backend}.json").read_text(encoding="utf-8"))["cases"].values())

    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    of_cpu, of_cuda, count = statuses("bitsandbytes"), statuses("bitsandbytes-cuda"), len(list(RESULTS.glob("*.json")))
    cpu, cuda, has = of_cpu["failed"], of_cuda["failed"], len(stored()) - of_cpu["not implemented"]
    assert of_cuda["not implemented"] == of_cpu["not implemented"]
    assert f"runs {len(stored())} cases" in readme
    assert (
        f"Of the {has} for which bitsandbytes 0.50.2 has functions it fails {cpu} on a CPU and {cuda} on an H100"
        in readme
    )
    assert f"[the board](docs/content/board.md) of {count} backends" in readme
    assert f"rules each of {count} backends keeps" in " ".join((RESULTS.parent / "board.md").read_text("utf-8").split())
    page = (RESULTS.parent / "conformance.md").read_text(encoding="utf-8")
    causes = page.partition(f"Where the {cuda} come from:")[2].partition("bnbref itself")[0]
    assert sum(map(int, re.findall(r"^\| (\d+) \|", causes, re.MULTILINE))) == cuda


def test_the_page_of_drawings_is_of_the_reports_beside_it():
    """It has every finding of these five, and no other: `python docs/results.py` writes all of them."""
    text = (RESULTS / "report.html").read_text(encoding="utf-8")
    columns = [
        RESULTS / f"{name}.json"
        for name in ("bitsandbytes", "bitsandbytes-default", "torchao", "bnbref-eager", "bnbref")
    ]
    found = [f for file in columns for f in json.loads(file.read_text(encoding="utf-8"))["findings"]]
    for finding in found:
        for said in (finding["message"], *finding["input"]):
            assert html.escape(said) in text, said
    assert text.count("python -m bnbref check --backend") == len(found)


def test_what_is_published_is_made_of_what_is_published(tmp_path, capsys):
    reports = sorted(map(str, RESULTS.glob("*.json")))
    made = {"--html": tmp_path / "board.html", "--svg": tmp_path / "board.svg"}
    assert main(["board", *reports, *(word for option, file in made.items() for word in (option, str(file)))]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(reports)
    stored = {"--html": RESULTS / "board.html", "--svg": RESULTS.parent / "board.svg"}
    stale = [str(stored[option]) for option, file in made.items() if file.read_bytes() != stored[option].read_bytes()]
    assert stale == [], "make board"


# ---- the page, as a parser sees it ----------------------------------------------------------------------------------


class Parsed(html.parser.HTMLParser):
    """The ids, the buttons' targets, what is loaded, and the text without style and script."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets, self.links, self.words, self.skipped = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.targets += [found["popovertarget"]] if "popovertarget" in found else []
        self.links += [found[name] for name in ("href", "src", "action") if name in found]
        self.skipped = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.skipped = False

    def handle_data(self, data):
        if not self.skipped:
            self.words.append(data)


markup = st.sampled_from(["<b>", "</pre>", "</script>", '" id="x"', "&amp;", "'"])
words = st.lists(markup | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=9), max_size=3).map("".join)
conventions = st.lists(st.sampled_from([CHOICE, MISTAKE]))
findings = st.builds(
    lambda rule, count, follows, message, lines: finding(
        rule, CASES[rule][:count], follows, message=message, input=lines, flags=["blocksize"]
    ),
    st.sampled_from(sorted(CASES)), st.integers(1, 3), conventions, words, st.lists(words, max_size=3),
)  # fmt: skip
statuses = st.dictionaries(st.sampled_from(EVERY), st.sampled_from(STATUSES), max_size=5)
reports = st.builds(
    lambda cases, found, backend: body(cases, found, backend=backend), statuses, st.lists(findings, max_size=4), words
)


@settings(deadline=None, max_examples=25)
@given(st.lists(reports, min_size=1, max_size=3))
def test_all_that_reports_say_is_in_the_page(tmp_path_factory, bodies):
    columns = read(tmp_path_factory.mktemp("board"), *bodies)
    text = page.as_page(columns)
    parsed = Parsed(text)
    assert [name for name, count in Counter(parsed.ids).items() if count > 1] == []
    assert set(parsed.targets) <= set(parsed.ids)
    assert set(parsed.links) == {f"report-{i}.json" for i in range(len(bodies))}
    said = "".join(parsed.words)
    for i, report in enumerate(bodies):
        assert report["backend"] in said
        for found in report["findings"]:
            assert found["message"] in said
            assert "\n".join(found["input"]) in said
            assert parsed.targets.count(f"report-{i}/{found['rule']}") == 2  # its cell, and "close"
    assert sum("/" in name for name in set(parsed.targets)) == sum(
        len({f["rule"] for f in r["findings"]}) for r in bodies
    )
    drawn = picture.as_picture(columns)
    assert drawn.count("M") >= len(bodies) * len(CASES)


def test_a_program_beside_the_report_is_named(tmp_path):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "red_report-1.py").touch()
    broken = body(dict.fromkeys(EVERY, "passed"), [finding("Q4-1", CASES["Q4-1"])])
    links = Parsed(page.as_page(read(tmp_path, broken, broken))).links
    assert links.count("programs/red_report-1.py") == 2  # of the backend, and of its cell
    assert set(links) == {"report-0.json", "report-1.json", "programs/red_report-1.py"}


def test_the_page_is_light():
    assert len(page.SCRIPT) < 4096
    assert "http" not in page.SCRIPT + page.STYLE
    assert re.findall(r"https?://\S+", picture.as_picture([])) == ['http://www.w3.org/2000/svg"']


# ---- the page, in a browser -----------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# The contrast of each state's colour with the page, as WCAG 2 defines it.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = color => {
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const part = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(c => part(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return Object.fromEntries([...document.querySelectorAll('dt span, p, h3')].slice(0, 40).map(e => {
    const own = light(getComputedStyle(e).color);
    return [e.className || e.tagName, (Math.max(own, page) + .05) / (Math.min(own, page) + .05)];
  }));
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def shown(browser, tmp_path):
    """A function that opens a board of three reports, in a window of that width; all that was asked for is in `asked`."""
    known = ["passed", "failed", "refused", "not implemented"]
    first = {case: known[i % 4] for i, case in enumerate(EVERY)}
    wrong = [
        finding("Q4-1", CASES["Q4-1"][:2]),
        finding("Q4-8", CASES["Q4-8"][:1], [CHOICE]),
        finding("OB-2", CASES["OB-2"]),
    ]
    fine = dict.fromkeys(EVERY, "passed")
    text = page.as_page(read(tmp_path, body(first, wrong), body(fine), body(fine, [finding("Q4-1", CASES["Q4-1"])])))
    (tmp_path / "board.html").write_text(text, encoding="utf-8")
    contexts = []

    def open_(width, address="", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(5000)
        opened.asked, opened.errors = [], []
        opened.on("request", lambda request: opened.asked.append(request.url.partition("#")[0]))
        opened.on("console", lambda message: opened.errors.append(message.text))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto((tmp_path / "board.html").as_uri() + address)
        return opened

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_board_is_readable(shown, width, scheme):
    opened = shown(width, color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert opened.evaluate("document.querySelector('.scroll').scrollWidth <= innerWidth"), "the table scrolls sideways"
    tallest = opened.evaluate(
        "Math.max(...[...document.querySelectorAll('tr[data-find]')].map(row => row.offsetHeight))"
    )
    assert tallest <= (40 if width == 400 else 110), "what fits a desk does not fit a telephone"
    contrasts = opened.evaluate(CONTRAST)
    assert set(contrasts) >= {"passed", "dialect", "defect", "refused", "not-offered", "P"}
    assert min(contrasts.values()) >= 4.5, contrasts
    opened.locator("td.defect button").first.click()
    box = opened.locator("[popover]:popover-open").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways with a cell open"
    assert opened.errors == []
    assert len(set(opened.asked)) == 1


def test_every_cell_that_failed_opens(shown):
    opened = shown(400)
    buttons = opened.locator("td button")
    assert buttons.count() == 4
    for i in range(buttons.count()):
        name = buttons.nth(i).get_attribute("popovertarget")
        buttons.nth(i).click()
        (text,) = opened.locator("[popover]:popover-open").all_inner_texts()
        assert "3f800000 80000000" in text
        assert "131 (83)" in text
        assert "127 (7f)" in text
        assert name.partition("/")[2] in text
        opened.wait_for_url(f"**/board.html#{name}")
        opened.locator("[popover]:popover-open .close").click()
        assert opened.locator("[popover]:popover-open").count() == 0
    opened.locator("th[scope=row] button").first.click()
    assert board.RULES["G-1"].text in opened.locator("[popover]:popover-open").inner_text()


def test_the_board_by_keyboard(shown):
    opened = shown(1280)
    focused = "document.activeElement.getAttribute('popovertarget')"
    opened.locator("input[type=search]").focus()
    for _ in range(60):
        opened.keyboard.press("Tab")
        if str(opened.evaluate(focused)).startswith("report-0/"):
            break
    assert opened.evaluate(focused) == "report-0/Q4-1"
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    path = [
        ("ArrowRight", "report-2/Q4-1"),
        ("ArrowLeft", "report-0/Q4-1"),
        ("ArrowDown", "report-0/Q4-8"),
        ("ArrowLeft", "Q4-8"),
        ("ArrowUp", "Q4-7"),
        ("ArrowLeft", "Q4-7"),
    ]
    for key, name in path:
        opened.keyboard.press(key)
        assert opened.evaluate(focused) == name
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert opened.locator("[popover]:popover-open").get_attribute("id") == "report-0/Q4-8"
    assert opened.evaluate("document.activeElement.className") == "close"
    opened.keyboard.press("Escape")
    assert opened.locator("[popover]:popover-open").count() == 0
    assert opened.evaluate(focused) == "report-0/Q4-8"


def test_filters(shown):
    opened = shown(1280)
    rows, told = opened.locator("tr[data-find]:visible"), opened.locator("output")
    assert told.inner_text() == f"{len(CASES)} of {len(CASES)} rules"
    opened.fill("input[type=search]", "q4- ABSMAX")
    assert rows.count() == sum(rule.startswith("Q4") and "absmax" in board.RULES[rule].text.lower() for rule in CASES)
    opened.fill("input[type=search]", "")
    opened.check("[name=state][value=dialect]")
    assert rows.all_inner_texts()[0].startswith("Q4-8")
    assert told.inner_text() == f"1 of {len(CASES)} rules"
    opened.check("[name=state][value=defect]")
    assert rows.count() == 3
    assert opened.locator("th[scope=rowgroup]:visible").count() == 2
    opened.click("summary >> nth=0")
    opened.check("[name=column][value=report-2]")
    assert rows.count() == 1
    assert opened.locator("td:visible").count() == 1
    opened.click("[type=reset]")
    opened.wait_for_selector("tr[data-find][hidden]", state="detached")
    assert rows.count() == len(CASES)


def test_an_address_opens_a_cell(shown):
    opened = shown(1280, "#report-2/Q4-1")
    assert opened.locator("[popover]:popover-open").get_attribute("id") == "report-2/Q4-1"
    assert shown(1280, "#nobody").errors == []


def test_without_script_cells_open_too(shown):
    opened = shown(400, java_script_enabled=False)
    opened.locator("td.dialect button").click()
    assert "hex 3f800000 80000000" in opened.locator("[popover]:popover-open").inner_text()


def test_the_picture_is_one(shown, tmp_path):
    (tmp_path / "board.svg").write_text(picture.as_picture(read(tmp_path, body({}))), encoding="utf-8")
    opened = shown(400)
    opened.goto((tmp_path / "board.svg").as_uri())
    boxes = opened.evaluate(
        "[...document.querySelectorAll('text')].map(e => e.getBoundingClientRect()).map(r => [r.left, r.top])"
    )
    assert len(boxes) > 20
    assert min(min(box) for box in boxes) >= 0, "a label begins outside"
