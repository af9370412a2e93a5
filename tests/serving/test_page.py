"""The page in a real headless Chromium: what people can do, by mouse, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import Served
from serving_load import wait_until_served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=30_000)  # answers of a busy machine too
QUIET = ["quic", "background-networking", "component-update", "sync", "gpu"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def page(browser: Browser, served: Served, faults: list[str], request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, open and connected; what the browser complains of, a breach of the content policy too, is a failure."""
    wait_until_served(served.url, served.store.versions()[-1])
    context = browser.new_context(**getattr(request, "param", {}))
    opened = context.new_page()
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(served.url)
    expect(opened.locator("#standing")).to_contain_text("version")
    yield opened
    context.close()
    assert faults == []


PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DARK = {"color_scheme": "dark"}
DONE = ".answer:not([aria-busy]) .voters"


def ask(page: Page, *pictures: Path) -> None:
    page.set_input_files("#files", [str(path) for path in pictures])
    expect(page.locator(DONE)).to_have_count(len(pictures))


def test_a_picture_is_answered_with_bars_and_voters(page: Page, served: Served) -> None:
    ask(page, served.pictures[0])
    answer = page.locator(".answer").first
    assert answer.locator(".bars li").count() >= 3
    assert "%" in answer.locator(".bars li").first.inner_text()
    assert answer.locator(".voters").get_attribute("aria-label").startswith("Votes: ")
    assert f"version {served.store.versions()[-1]}" in answer.inner_text()


def test_own_labels_and_tasks_ask_again(page: Page, served: Served) -> None:
    ask(page, served.pictures[0])
    page.get_by_label("my own labels").check()
    page.get_by_label("Labels, separated by commas").fill("a zebra, a red square")
    page.keyboard.press("Tab")
    expect(page.locator(".bars")).to_contain_text("zebra")
    assert page.locator(".answer .bars li").count() == 2
    page.get_by_label("one task").check()
    page.get_by_label("Task", exact=True).select_option("stripes")
    expect(page.locator(".bars")).to_contain_text("upright")
    assert page.locator(".answer .bars li").count() == 3


def test_pictures_can_be_dropped_and_pasted(page: Page, served: Served) -> None:
    body = list(served.pictures[0].read_bytes())
    for kind, key in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([body, kind, key]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(body)], 'given.png', { type: 'image/png' }));
                const Kind = kind === 'drop' ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new Kind(kind, { [key]: data, bubbles: true, cancelable: true }));
            }""",
            [body, kind, key],
        )
    expect(page.locator(DONE)).to_have_count(2)


def test_what_is_no_picture_is_said(page: Page, faults: list[str], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    page.set_input_files("#files", str(tmp_path / "no.png"))
    expect(page.locator(".answer")).to_contain_text("not a picture")
    assert [fault for fault in faults if "422" not in fault] == []
    faults.clear()  # Chromium logs every refused request


def tab_to(page: Page, wanted: str, key: str = "Tab") -> None:
    """Goes on until the element with this id or text has the focus; each one on the way shows that it has it."""
    seen = []
    while wanted not in seen:
        assert len(seen) < 15, f"{wanted} is not reached by Tab: {seen}"
        page.keyboard.press(key)
        focused = page.locator(":focus")
        expect(focused).to_have_css("outline-style", "solid")
        seen.append(focused.evaluate("element => element.id || element.textContent"))


def test_all_of_it_works_by_keyboard(page: Page, served: Served) -> None:
    tab_to(page, "Skip to the pictures")
    tab_to(page, "Versions")
    page.keyboard.press("Enter")
    expect(page.locator("#matrix td.own").first).to_be_visible()
    with page.expect_file_chooser() as chooser:  # around the whole walk: the browser is told of it without an answer
        tab_to(page, "Ask", "Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#ask")).to_be_visible()
        tab_to(page, "files")
        page.keyboard.press("Enter")
    chooser.value.set_files(str(served.pictures[0]))
    expect(page.locator(DONE)).to_have_count(1)


def test_tasks_and_versions_are_shown(page: Page, served: Served) -> None:
    page.get_by_role("link", name="Tasks").click()
    names = [card.name for card in served.store.manifest().tasks]
    assert page.locator("#task-list h3").all_inner_texts() == names
    page.get_by_role("link", name="Versions").click()
    page.wait_for_selector("#matrix td.own")
    assert page.locator("#version-list tbody tr").count() == len(served.store.versions())
    assert page.locator("#version-list tr.serving").count() == 1
    assert page.locator("#matrix tbody tr").count() == len(names)
    page.get_by_role("link", name="Interface").click()
    page.wait_for_selector("#routes li")
    assert f"{served.url}/v1/predict" in page.locator("#curl").inner_text()


@pytest.mark.parametrize(
    "page", [{}, PHONE, DARK, {**PHONE, **DARK}], ids=["desk", "phone", "dark", "dark-phone"], indirect=True
)
def test_an_accessibility_checker_finds_nothing(page: Page, served: Served, tmp_path: Path) -> None:
    ask(page, served.pictures[0], served.pictures[10])
    for view in ("ask", "tasks", "versions", "interface"):
        page.evaluate(f"location.hash = '{view}'")
        page.wait_for_selector(f"#{view}:not([hidden])")
        page.wait_for_load_state("networkidle")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{view} is wider than the screen by {wide} px"
        page.screenshot(path=tmp_path / f"{view}.png", full_page=True)
