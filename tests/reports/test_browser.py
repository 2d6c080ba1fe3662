"""The page in a real browser: drawn without complaint, readable everywhere, and its files worth having."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eckart.reports import write_report

from .make_runs import CORPORA, KEEPS, METHODS, make_probing_study, make_run, make_study

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
CHARTS = (
    *("perplexity", "kept", "spectra", "tasks", "scores"),
    *("stereoset", "agreement", "divergence", "similarity", "cost"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return write_report([make_study(folder / "study")], folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


class Seen:
    """A page and what it did on the way: complaints on its console, and what it asked for."""

    def __init__(self, browser: Any, file: Path, **settings: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        usual = {"viewport": {"width": 1360, "height": 900}, "color_scheme": "light", "reduced_motion": "reduce"}
        self.context = browser.new_context(**{**usual, **settings})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)


@pytest.fixture(scope="module")
def desktop(browser: Any, report: Path) -> Iterator[Seen]:
    seen = Seen(browser, report, accept_downloads=True)
    yield seen
    seen.context.close()


def saved(seen: Seen, selector: str) -> tuple[str, bytes]:
    """The name and the content of what a click saves."""
    with seen.page.expect_download(timeout=60_000) as waiting:
        seen.page.locator(selector).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_every_chart_is_drawn_without_complaint_or_network(desktop: Seen, report: Path) -> None:
    for chart in CHARTS:
        box = desktop.page.locator(f"figure[data-chart={chart}] .plot .main-svg").first.bounding_box()
        assert box["width"] > 500, chart
        assert box["height"] > 100, chart
    assert desktop.page.locator(".plot .js-plotly-plot, .plot.js-plotly-plot").count() == len(CHARTS)
    assert desktop.complaints == []
    assert desktop.requests == [report.as_uri()]


def test_panels_and_marks_are_all_there(desktop: Seen) -> None:
    plot = desktop.page.locator("figure[data-chart=perplexity] .plot")
    assert plot.locator(".subplot.xy, [class*='subplot x']").count() >= len(CORPORA)
    # a mark for every method and share, for int8, and for the dense model, in every panel
    marks = len(METHODS) * len(KEEPS) + 1 + 2
    assert plot.locator(".scatterlayer .point").count() == marks * len(CORPORA)


@pytest.mark.slow
def test_a_hover_shows_a_number(desktop: Seen) -> None:
    mark = desktop.page.locator("figure[data-chart=perplexity] .scatterlayer .trace .point").nth(3)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    desktop.page.mouse.move(box["x"] + box["width"] / 2 - 1, box["y"] + box["height"] / 2 - 1)
    desktop.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = desktop.page.locator("figure[data-chart=perplexity] .hoverlayer .hovertext")
    tip.first.wait_for(timeout=10_000)
    text = tip.first.text_content()
    assert re.search(r"perplexity [\d,.]+ ± [\d.]+", text), text
    assert "MB" in text


@pytest.mark.slow
def test_a_hover_on_the_heat_map_names_the_linear(desktop: Seen) -> None:
    plot = desktop.page.locator("figure[data-chart=kept] .plot")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()
    desktop.page.mouse.move(box["x"] + 20, box["y"] + 20)
    desktop.page.mouse.move(box["x"] + 24, box["y"] + 22)
    tip = plot.locator(".hoverlayer .hovertext")
    tip.first.wait_for(timeout=10_000)
    assert re.search(r"self_attn\.q_proj, block 0.*% kept", tip.first.text_content())


@pytest.mark.parametrize("chart", ["perplexity", "kept", "agreement"])
def test_a_figure_is_saved_as_svg(desktop: Seen, chart: str) -> None:
    name, content = saved(desktop, f"figure[data-chart={chart}] .save[data-format=svg]")
    text = content.decode("utf-8")
    assert name.startswith(chart)
    assert name.endswith(".svg")
    assert text.startswith("<svg")
    assert text.rstrip().endswith("</svg>")
    expected = {"perplexity": "Perplexity against size", "kept": "self_attn.q_proj", "agreement": "unlearned"}
    assert expected[chart] in text


def test_a_figure_is_saved_as_png(desktop: Seen) -> None:
    name, content = saved(desktop, "figure[data-chart=tasks] .save[data-format=png]")
    assert name.endswith(".png")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width == 2200
    assert height > 400
    assert len(content) > 20_000


def test_the_summary_is_saved_as_csv(desktop: Seen) -> None:
    name, content = saved(desktop, "#summary .csv")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    assert name == "summary.csv"
    assert rows[0][:3] == ["Model", "Method", "Keep"]
    assert "Perplexity ptb ↓" in rows[0]
    assert len(rows) == 1 + 2 * (1 + len(METHODS) * len(KEEPS) + 1)
    values = [float(row[rows[0].index("Perplexity ptb ↓")]) for row in rows[1:]]
    assert all(value > 1 for value in values)
    assert any(value != round(value, 2) for value in values)  # in full, not as shown


def test_the_numbers_behind_a_figure_are_a_table_and_a_csv(desktop: Seen) -> None:
    details = desktop.page.locator("figure[data-chart=stereoset] details.numbers")
    assert details.locator("table").count() == 0
    details.locator("summary").click()
    details.locator("table").wait_for()
    assert details.locator("tbody tr").count() == 2 * (1 + len(METHODS) * len(KEEPS) + 1)
    _, content = saved(desktop, "figure[data-chart=stereoset] .csv")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    assert "icat.gender" in rows[0]
    assert 0 < float(rows[1][rows[0].index("icat.gender")]) <= 100


def test_tables_sort_by_number(desktop: Seen) -> None:
    header = desktop.page.locator("#summary th[data-label='ptb ↓'][data-group=Perplexity]")
    at = header.evaluate("cell => cell.cellIndex")

    def values() -> list[float]:
        return desktop.page.locator("#summary tbody tr").evaluate_all(
            f"rows => rows.map((row) => Number(row.cells[{at}].dataset.v))"
        )

    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())


def test_the_sorting_leaves_gaps_last(desktop: Seen) -> None:
    header = desktop.page.locator("#summary th[data-label=Keep]")
    for _ in range(2):
        header.locator("button").click()
        last = desktop.page.locator("#summary tbody tr").last.locator("td").nth(2)
        assert last.text_content() == "\u2013"


def test_a_selector_changes_the_figure(desktop: Seen) -> None:
    figure = desktop.page.locator("figure[data-chart=kept]")
    before = figure.locator(".heatmaplayer").inner_html()
    figure.get_by_label("Model", exact=True).select_option("sable-60M")
    desktop.page.wait_for_function(
        "old => document.querySelector('figure[data-chart=kept] .heatmaplayer').innerHTML !== old", arg=before
    )
    assert figure.locator(".xtick").count() == 6
    # svd has no relative error: the choice falls back to what there is, and the selectors say so
    figure.get_by_label("Show", exact=True).select_option("relative error")
    assert figure.get_by_label("Method", exact=True).input_value() != "svd"
    figure.get_by_label("Method", exact=True).select_option("svd")
    assert figure.get_by_label("Show", exact=True).input_value() == "kept share"


def test_the_legend_hides_a_method(desktop: Seen) -> None:
    figure = desktop.page.locator("figure[data-chart=divergence]")
    count = figure.locator(".scatterlayer .point").count()
    button = figure.locator(".legend button", has_text="nsvd-i")
    button.focus()
    desktop.page.keyboard.press("Enter")
    assert figure.locator(".legend button", has_text="nsvd-i").get_attribute("aria-pressed") == "false"
    assert figure.locator(".scatterlayer .point").count() == count - len(KEEPS) * len(CORPORA)
    assert desktop.page.evaluate("document.activeElement.textContent") == "nsvd-i"


def test_the_log_button_straightens_the_axis(desktop: Seen) -> None:
    button = desktop.page.locator("figure[data-chart=perplexity] button.log")
    kind = "() => document.querySelector('figure[data-chart=perplexity] .plot')._fullLayout.yaxis.type"
    assert (button.get_attribute("aria-pressed"), desktop.page.evaluate(kind)) == ("true", "log")
    button.click()
    assert (button.get_attribute("aria-pressed"), desktop.page.evaluate(kind)) == ("false", "linear")


@pytest.mark.slow
def test_dark_and_light(browser: Any, report: Path) -> None:
    background = "() => getComputedStyle(document.body).backgroundColor"
    tick = "() => getComputedStyle(document.querySelector('figure[data-chart=perplexity] .xtick text')).fill"
    seen = Seen(browser, report)
    light = (seen.page.evaluate(background), seen.page.evaluate(tick))
    seen.page.click("#theme")
    seen.page.wait_for_function(f"old => ({tick})() !== old", arg=light[1])
    dark = (seen.page.evaluate(background), seen.page.evaluate(tick))
    assert dark[0] != light[0]
    assert sum(map(int, re.findall(r"\d+", dark[0])[:3])) < 150
    assert sum(map(int, re.findall(r"\d+", light[0])[:3])) > 650
    assert seen.page.locator("#theme").get_attribute("aria-pressed") == "true"
    seen.page.reload()
    seen.page.wait_for_selector("html[data-ready]")
    assert seen.page.evaluate(background) == dark[0]  # the choice stays
    seen.context.close()
    wishes_dark = Seen(browser, report, color_scheme="dark")
    assert (wishes_dark.page.evaluate(background), wishes_dark.page.evaluate(tick)) == dark
    wishes_dark.context.close()


@pytest.mark.slow
def test_a_phone_scrolls_in_one_direction(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
    wide = seen.page.evaluate("""() => [...document.querySelectorAll('main *')].filter((element) =>
        !element.closest('.table-box, pre, svg, .unseen') && element.getBoundingClientRect().right > 391
    ).map((element) => element.outerHTML.slice(0, 80))""")
    assert wide == []
    assert seen.page.evaluate(
        "(box => box.scrollWidth > box.clientWidth)(document.querySelector('#summary .table-box'))"
    )
    for chart in CHARTS:
        assert 250 < seen.page.locator(f"figure[data-chart={chart}] .main-svg").first.bounding_box()["width"] <= 390
    menu = seen.page.locator("#menu")
    assert not menu.locator("a").first.is_visible()
    menu.locator("summary").click()
    menu.locator("a", has_text="StereoSet").click()
    assert not menu.locator("a").first.is_visible()
    assert seen.complaints == []
    seen.context.close()


@pytest.mark.slow
def test_the_keyboard_reaches_every_control(browser: Any, report: Path) -> None:
    seen = Seen(browser, report)
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.className") == "skip"
    outline = seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    controls = {
        "#theme",
        "button.sort",
        "button.csv",
        "select",
        "button.log",
        "button.save",
        "details.numbers > summary",
    }
    met: set[str] = set()
    for _ in range(120):
        seen.page.keyboard.press("Tab")
        met |= {w for w in controls - met if seen.page.evaluate("w => document.activeElement.matches(w)", w)}
    assert met == controls
    seen.context.close()


def test_every_control_has_a_name_and_every_figure_a_text(desktop: Seen) -> None:
    unnamed = desktop.page.evaluate("""() => [...document.querySelectorAll('button, select, summary, a')].filter(
        (element) => !(element.getAttribute('aria-label') ?? element.textContent).trim()).length""")
    assert unnamed == 0
    for chart in CHARTS:
        plot = desktop.page.locator(f"figure[data-chart={chart}] .plot")
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 60
        assert desktop.page.locator(f"figure[data-chart={chart}] details.numbers summary").count() == 1


@pytest.mark.slow
def test_a_window_made_narrower_folds_the_panels(browser: Any, report: Path) -> None:
    seen = Seen(browser, report)
    domain = "() => document.querySelector('figure[data-chart=perplexity] .plot')._fullLayout.xaxis2.domain[0]"
    assert seen.page.evaluate(domain) > 0.4
    seen.page.set_viewport_size({"width": 500, "height": 800})
    seen.page.wait_for_function(f"() => ({domain})() === 0", timeout=10_000)
    seen.context.close()


@pytest.mark.slow
def test_a_table_that_scrolls_shows_it(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, viewport={"width": 700, "height": 900})
    box, note = seen.page.locator("#summary .table-box"), seen.page.locator("#summary .more")
    fades = "box => getComputedStyle(box).maskImage !== 'none'"
    assert box.evaluate(fades)
    assert note.text_content() == "This table is larger than its frame: scroll sideways."
    box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    seen.page.wait_for_function("() => !document.querySelector('#summary .table-box.more-right')")
    assert not box.evaluate(fades)
    assert note.is_visible()
    seen.page.locator("#perplexity details.numbers summary").click()
    longer = seen.page.locator("#perplexity .table-box")
    seen.page.wait_for_function("() => document.querySelector('#perplexity .table-box.more-down')")
    assert longer.evaluate(fades)
    assert "down" in seen.page.locator("#perplexity .more").text_content()
    seen.context.close()


def test_a_browser_that_cannot_unpack_says_so_and_has_the_numbers(browser: Any, report: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.html"
    text = report.read_text(encoding="utf-8")
    old.write_text(text.replace("<head>", "<head><script>delete window.DecompressionStream</script>", 1))
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(old.as_uri())
    page.wait_for_selector("#old-browser:not([hidden])")
    page.locator("#perplexity details.numbers summary").click()
    assert page.locator("#perplexity tbody tr").count() > 10
    page.locator("#theme").click()
    assert complaints == []
    context.close()


@pytest.mark.slow
def test_the_page_prints(browser: Any, report: Path) -> None:
    seen = Seen(browser, report, color_scheme="dark")
    content = seen.page.pdf(format="A4")
    assert content.startswith(b"%PDF")
    assert len(content) > 50_000
    seen.context.close()


@pytest.mark.slow
def test_probing_and_its_questions_are_drawn_without_complaint(browser: Any, tmp_path: Path) -> None:
    make_probing_study(tmp_path / "study")
    seen = Seen(browser, write_report([tmp_path / "study"], tmp_path / "r.html"))
    figure = seen.page.locator("figure[data-chart=probing]")
    assert figure.locator(".scatterlayer .trace").count() > 4
    figure.get_by_label("Show", exact=True).select_option("selectivity")
    seen.page.locator("#pitfalls-relation details.numbers summary").click()
    assert seen.page.locator("#related-layers-table tbody tr").count() == 2 * 4
    assert seen.complaints == []
    seen.context.close()


def test_a_hostile_name_stays_text(browser: Any, tmp_path: Path) -> None:
    name = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
    make_run(tmp_path / "runs" / "a", method=name)
    make_run(tmp_path / "runs" / "b", method="=1+1")
    make_run(tmp_path / "runs" / "c", method="%{x}", keep=0.5)
    seen = Seen(browser, write_report([tmp_path], tmp_path / "r.html"), accept_downloads=True)
    assert seen.page.evaluate("window.hit") is None
    assert seen.page.locator("img").count() == 0
    assert name in seen.page.locator("#summary tbody").text_content()
    assert name in seen.page.locator("figure[data-chart=perplexity] .legend").text_content()
    assert "<img" in seen.page.locator("figure[data-chart=tasks] .ytick text").nth(1).text_content()
    _, content = saved(seen, "#summary .csv")
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    assert {row[1] for row in rows} == {"Method", "dense", name, "'=1+1", "%{x}"}
    assert seen.complaints == []
    seen.context.close()
