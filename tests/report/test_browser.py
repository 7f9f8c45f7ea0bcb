"""The page in a real browser: it draws, sorts, filters, opens, and fits a phone, in light and in dark.

KERNELSWAP_SCREENSHOTS=DIR keeps what it looked like.
"""

import json
import os
import pathlib

import pytest

DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture
def show(browser, page):
    """Open the page: `show(PHONE, "dark")`. Anything that the console complains about, or that leaves the machine, fails."""
    opened, problems = [], []

    def show(size=DESK, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda m: problems.append(m.text))
        tab.on("pageerror", lambda e: problems.append(str(e)))
        tab.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        tab.goto(page.as_uri())
        opened.append(context)
        return tab

    yield show
    for context in opened:
        context.close()
    assert not problems


def names(tab):
    return tab.locator(".tree tbody tr:not(.more) .name").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_it_fits_and_nothing_is_cut_off(show, size, scheme):
    tab = show(size, scheme)
    tab.locator("tr[data-state=kernel]").first.click()
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width == size["width"]
    over = tab.evaluate(
        """() => [...document.querySelectorAll('main *, header *')].filter(e => {
            const box = e.getBoundingClientRect();
            return box.width && box.right > (e.closest('section') || document.body).getBoundingClientRect().right + 1;
        }).map(e => e.className + ' ' + e.textContent.slice(0, 40))"""
    )
    assert over == []
    if folder := os.environ.get("KERNELSWAP_SCREENSHOTS"):
        tab.screenshot(path=pathlib.Path(folder) / f"{'desk' if size is DESK else 'phone'}-{scheme}.png", full_page=True)


def contrast(tab, selector):
    """Of text with what is behind it, as WCAG 2.1 defines it."""
    return tab.locator(selector).first.evaluate(
        """e => {
            const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
            let under = e;
            while (under && /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(under).backgroundColor)) under = under.parentElement;
            const light = c => {
                const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const [a, b] = [rgb(getComputedStyle(e).color), rgb(getComputedStyle(under || document.body).backgroundColor)].map(light);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(show, scheme):
    tab = show(DESK, scheme)
    for selector in (
        "h1",
        ".lead",
        ".about",
        ".tiles span",
        ".kinds .by",
        ".kinds small",
        ".tag.kernel",
        ".chips button",
        "th button",
    ):
        assert contrast(tab, selector) >= 4.5, selector
    tab.locator("[data-only=refused]").click()
    assert contrast(tab, ".tag.refused") >= 4.5


def test_dark_is_dark_and_plots_follow(show):
    colours = {}
    for scheme in ("light", "dark"):
        tab = show(DESK, scheme)
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        plotted = tab.locator("#errors .wide [data-site] use").first.evaluate("e => getComputedStyle(e).fill")
        words = tab.locator("#errors .wide text").first.evaluate("e => getComputedStyle(e).fill")
        colours[scheme] = paper, plotted, words
    assert all(a != b for a, b in zip(colours["light"], colours["dark"], strict=True))


def test_the_tree_opens_and_closes(show):
    tab = show()
    before = names(tab)
    assert any("self_attn" in n for n in before), "the first layer is open"
    tab.get_by_role("button", name="Close 0", exact=True).click()
    assert not any("self_attn" in n for n in names(tab))
    folded = tab.locator(".tree tr", has_text="Qwen3DecoderLayer").first
    assert "4 kernels" in folded.inner_text()
    assert "2 refused" in folded.inner_text()
    tab.get_by_role("button", name="Open 0", exact=True).click()
    assert names(tab) == before


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(show, facts):
    tab = show()
    heading = tab.locator(".tree th", has_text="Error")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    shown = [float(t) for t in tab.locator(".tree tbody td[data-label=Error]").all_inner_texts() if t]
    served = [o for o in facts["outcomes"] if o["swapped"]]
    assert len(shown) == len(served)
    assert shown == sorted(shown, reverse=True)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    shown = [float(t) for t in tab.locator(".tree tbody td[data-label=Error]").all_inner_texts() if t]
    assert shown == sorted(shown)
    tab.locator("[data-only=all]").click()
    assert len(names(tab)) < len(facts["modules"]), "the tree is back"


def test_a_refused_kernel_makes_nothing_faster_and_its_error_fits_its_column(show):
    tab = show()
    refused, served = (tab.locator(f".tree tr[data-state={state}]") for state in ("refused", "kernel"))
    assert refused.count() == 2
    assert refused.locator("td[data-label=Faster]").all_inner_texts() == ["", ""]
    assert all(served.locator("td[data-label=Faster]").all_inner_texts())
    for text in refused.locator("td[data-label='vs original']").all_inner_texts():
        assert 1e3 < float(text.removesuffix("x")) < 1e9
        assert len(text) <= 8


def test_the_filter_finds_paths_classes_kernels_and_reasons(show, facts):
    tab = show()
    field = tab.get_by_label("Filter modules")
    norms = [o for o in facts["outcomes"] if o["layer"] == "RMSNorm"]
    field.fill("qwen3rmsnorm")
    assert len(names(tab)) == len(norms)
    assert f"{len(norms)} rows" in tab.locator("#shown").inner_text()
    field.fill("layers.1 q_norm")
    assert [n.split()[0].strip() for n in names(tab)] == ["model.layers.1.self_attn.q_normQwen3RMSNorm"]
    field.fill("skipped differs in output")
    assert names(tab) == []
    assert "Nothing matches." in tab.locator(".tree tbody").inner_text()
    field.fill("inside mlp")
    assert len(names(tab)) == sum("inside mlp" in o.get("reason", "") for o in facts["outcomes"]) == 2
    field.fill("")
    tab.locator("[data-only=refused]").click()
    assert len(names(tab)) == len(facts["refusals"]) == 4


def test_a_site_opens_to_its_reasons_and_verdicts_by_mouse_and_by_keyboard(show, facts):
    tab = show()
    tab.get_by_label("Filter modules").fill("model.norm")
    row = tab.locator(".tree tbody tr").first
    row.click()
    told = tab.locator(".more").inner_text()
    site = next(o for o in facts["outcomes"] if o["path"] == "model.norm")
    assert site["inference"]["verdict"]["reason"] in told
    assert site["inference"]["implementation"]["digest"][:12] in told
    assert site["inference"]["why"] in told, "why this candidate and this build"
    assert "training" in told
    row.click()
    assert tab.locator(".more").count() == 0
    row.focus()
    tab.keyboard.press("Enter")
    assert tab.locator(".more").count() == 1
    tab.locator("[data-only=refused]").click()
    tab.get_by_label("Filter modules").fill("q_norm")
    tab.locator(".tree tbody tr").first.click()
    assert "Refused: differs in output" in tab.locator(".more").first.inner_text()


def test_a_dot_of_the_plot_leads_to_its_module(show, facts):
    tab = show()
    dot = tab.locator("#errors .wide [data-site]").last
    index = int(dot.get_attribute("data-site"))
    assert facts["outcomes"][index]["path"] in dot.locator("title").text_content()
    dot.locator("use").dispatch_event("click")
    assert facts["outcomes"][index]["path"] in tab.locator(".more").inner_text()


def test_everything_but_the_table_of_modules_is_there_without_a_script(browser, page, facts):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    text = tab.locator("main").inner_text()
    assert all(kind["layer"] in text for kind in facts["kinds"])
    assert facts["kernels"][0]["digest"] in text
    assert "drawn by a script" in text
    context.close()


def test_the_facts_can_be_taken_away_as_json(show, facts):
    tab = show()
    with tab.expect_download() as download:
        tab.get_by_text("The same facts as JSON").click()
    assert json.loads(pathlib.Path(download.value.path()).read_text()) == facts
