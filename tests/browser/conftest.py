"""Fixtures of the browser's tests: one Chromium for all, pages that were watched."""

import pytest
from drawing import PAGE, chromium


@pytest.fixture(scope="session")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser):
    """Return a function that opens a file; afterwards nothing was complained of or asked for."""
    contexts, complaints, requests = [], [], []

    def opened(path=PAGE, **settings):
        settings = {"viewport": {"width": 1400, "height": 1000}, "color_scheme": "light"} | settings
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints
    assert {url.split(":")[0] for url in requests} <= {"file"}
    assert len(requests) == len(contexts)
