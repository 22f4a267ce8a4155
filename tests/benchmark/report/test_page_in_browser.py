"""The page in Debian's Chromium, as its readers use it: with mouse and keyboard, on a phone, on paper."""

import shutil
from pathlib import Path

import pytest

from kdtoolkit.benchmark.report import to_html
from tests.benchmark.report._views import CLASSES, made_up_across, made_up_view

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium")
NASTY = ("<script>document.title = 'taken'</script>", "[red]", "a & b", "{{ 7 * 7 }}")
MANY = tuple(f"class {number}" for number in range(24))
GAINS = {"CrossKD": 1.7, "CrossKD+PKD": 3.0, "FGD": -2.4}

CONTRAST = """() => {
  const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([red, green, blue]) => 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue);
  const behind = (element) => {
    for (let own = element; own; own = own.parentElement) {
      const colour = numbers(getComputedStyle(own).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    const [front, back] = [element.closest("svg") ? style.fill : style.color, behind(element)];
    const [high, low] = [light(numbers(front)), light(back)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const key = `${front} on ${back}`;
    if (!(key in found)) found[key] = [ratio, walker.currentNode.textContent.trim().slice(0, 40)];
  }
  for (const mark of document.querySelectorAll("svg .mark, svg .line")) {
    const colour = getComputedStyle(mark).color;
    const back = light(behind(mark.closest("svg").parentElement));
    const [high, low] = [light(numbers(colour)), back].sort((a, b) => b - a);
    found[`mark ${colour}`] = [1.5 * (high + 0.05) / (low + 0.05), mark.getAttribute("class")];  // marks need 3 : 1
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra dev)")
    if BROWSER is None:
        pytest.skip("needs Debian's package chromium")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    views = [
        made_up_view("cells", classes=(*CLASSES, *NASTY), gains=GAINS),
        made_up_view("many <b>classes</b>", classes=MANY, gains=GAINS, chance=2),
    ]
    file: Path = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(to_html(views, made_up_across(views)), "utf-8")
    return file.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens the page. At the end of the test, it must have asked for nothing and complained of nothing."""
    contexts, faults = [], []

    def opened(width=1280, *, at=address, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda made: made.url.startswith("data:") or made.url == at or faults.append(made.url))
        page.goto(at)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def rows_of(page, part="#part1"):
    """The names of the board's rows that can be seen, from top to bottom."""
    return [row.get_attribute("data-row") for row in page.locator(f"{part} .board tbody tr").all() if row.is_visible()]


def test_rows_are_sorted_by_mouse_and_keyboard_and_more_is_shown(open_page):
    page = open_page()
    assert rows_of(page)[0] == "teacher"
    head = page.locator("#part1 .board thead th").filter(has_text="ms/step")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert rows_of(page)[0] == "CrossKD+PKD"  # the slowest
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert rows_of(page)[-1] == "CrossKD+PKD"
    assert page.locator("#part1 .board [aria-sort]").count() == 1
    rank = page.locator("#part1 .board thead th").filter(has_text="rank").get_by_role("button")
    rank.click()
    assert set(rows_of(page)[-2:]) == {"teacher", "baseline (equal time)"}  # they have no rank
    page.locator("#part1 [data-columns]").click()
    assert page.locator("#part1 .board thead").get_by_text("parameters").is_visible()
    page.locator("#curves1 select").select_option("task/box")
    assert page.locator("#curves1 figure:visible").count() == 1
    assert page.locator("#part2 .more").is_hidden()
    more = page.locator("#part2 [data-more]")
    assert more.get_attribute("aria-expanded") == "false"
    more.focus()
    page.keyboard.press("Enter")
    assert page.locator("#sources2 table").first.locator("tbody tr:visible").count() == len(MANY)
    assert (more.get_attribute("aria-expanded"), page.locator(":focus").inner_text()) == ("true", "Show fewer")
    page.keyboard.press("Enter")
    assert page.locator("#part2 .more").is_hidden()


def test_rows_are_filtered_in_the_whole_part_and_only_there(open_page):
    page = open_page()
    page.locator("#part1 [data-filter]").fill("crossKD")
    assert rows_of(page) == ["CrossKD+PKD", "CrossKD"]
    assert page.locator("#part1 [data-count]").inner_text().startswith("2 of 6 rows shown below.")
    assert not page.locator("#part1 .stack tr[data-row=FGD]").first.is_visible()
    assert not page.locator("#part1 .chart svg [data-row=FGD]").first.is_visible()
    heads = page.locator("#sources1 table").first.locator("thead th:visible").all_inner_texts()
    assert heads == ["class", "CrossKD+PKD", "CrossKD"]
    assert len(rows_of(page, "#part2")) == 6
    page.locator("#part1 [data-filter]").fill("")
    chip = page.locator("#part1 [data-toggle=FGD]")
    chip.focus()
    page.keyboard.press("Space")
    assert chip.get_attribute("aria-pressed") == "false"
    assert len(rows_of(page)) == 5


def test_a_command_is_copied_and_the_theme_switched(open_page):
    page = open_page(color_scheme="light", permissions=["clipboard-read", "clipboard-write"])
    page.locator("#repeat1 summary").filter(has_text="CrossKD+PKD").click()
    page.locator("#repeat1 [data-row='CrossKD+PKD'] [data-copy]").first.click()
    page.get_by_text("Copied").wait_for()
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    for _ in range(2):
        page.locator("[data-theme-switch]").click()
    assert page.locator("[data-theme-switch]").inner_text() == "Theme: dark"
    assert page.evaluate(paper) != "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((own) => (own.open = true))")
    page.locator("#part1 [data-toggle=FGD]").click()
    found = page.evaluate(CONTRAST)
    assert len(found) > 10
    assert {key: value for key, value in found.items() if value[0] < 4.5} == {}


def test_a_phone_scrolls_down_alone(open_page):
    page = open_page(360, has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach((own) => (own.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#curves1 figure:visible").count() == 1


@pytest.mark.parametrize("width", [1280, 500])
def test_a_long_name_pushes_nothing_out_of_sight(open_page, tmp_path, width):
    long = "a_very_long_name_" * 8
    views = [made_up_view(title, gains={"PKD": 2.6, long: 1.0}) for title in ("cells", "cards")]
    file = tmp_path / "long.html"
    file.write_text(to_html(views, made_up_across(views)), "utf-8")
    page = open_page(width, at=file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((own) => (own.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in (".chips button", ".legend li", ".repeat > summary"):
        right = f"[...document.querySelectorAll('{name}')].map((own) => own.getBoundingClientRect().right)"
        assert max(page.evaluate(right)) <= width, name
    names = "[...document.querySelectorAll('th')].filter((own) => own.textContent.includes('a_very_long'))"
    assert page.evaluate(f"{names}.length") > 20
    assert page.evaluate(f"Math.max(...{names}.map((own) => own.getBoundingClientRect().width))") <= 340
    assert page.evaluate(f"{names}.every((own) => own.scrollWidth <= own.clientWidth)")  # none is cut
    ap = page.locator(f"#part1 .board tr[data-row={long}] td").nth(1)
    assert ap.bounding_box()["x"] + ap.bounding_box()["width"] < width
    assert page.locator(".across .name").filter(has_text="…").count() == 1


def test_paper_has_all_of_it(open_page):
    page = open_page(688)  # an A4 page between its margins
    page.emulate_media(media="print")
    shown = "[...document.querySelectorAll('main *')].filter((own) => own.checkVisibility())"
    wide = f"{shown}.filter((own) => own.getBoundingClientRect().right > 690)"
    assert page.evaluate(f"{wide}.map((own) => own.outerHTML.slice(0, 80))") == []
    assert page.locator(".js:visible, .numbers:visible, nav:visible").count() == 0
    assert page.locator("#part1 .board").is_visible()


def test_without_a_script_everything_is_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#curves1 figure:visible").count() > 5
    assert page.locator("#part1 .board thead th:visible").count() == 16
    assert page.locator(".js:visible").count() == 0


def test_pictures_load_and_what_users_wrote_stays_text_and_all_has_names(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the board"
    assert "taken" not in page.title()
    assert set(NASTY) <= set(page.locator("#sources1 table").first.locator("tbody th").all_inner_texts())
    assert page.locator("#part2 h1").inner_text() == "many <b>classes</b>"
    assert page.locator("main img").count() == 2 * 3 * 6
    everywhere = "[...document.querySelectorAll('%s')].every((own) => %s)"
    assert page.evaluate(everywhere % ("img", "own.complete && own.naturalWidth > 0 && own.alt"))
    assert page.evaluate(everywhere % ("table", "own.caption"))
    assert page.evaluate(everywhere % ("svg[role=img]", "own.ariaLabel"))
    assert page.evaluate(everywhere % ("th", "own.scope"))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((own) => own.id)")
    assert len(ids) == len(set(ids))
    assert set(page.evaluate("[...document.querySelectorAll('a')].map((own) => own.hash.slice(1))")) <= set(ids)
    page.locator(".zoom").first.click()
    assert page.locator("dialog img").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
