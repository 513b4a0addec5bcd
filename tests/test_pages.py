"""Pages of figures are what their commands wrote: benchmarks/pages.py finds those that are not."""

from dataclasses import replace

import pytest

from benchmarks import pages


def test_every_page_is_what_its_command_wrote() -> None:
    assert pages.problems() == {}


def test_what_a_page_measures_is_there() -> None:
    for name, places in pages.MEASURES.items():
        for place in places:
            assert (pages.ROOT / place).exists(), f"{name}: {place}"
    assert {page.name for page in pages.pages()} <= set(pages.MEASURES)


def page(commit: str, body: str = "# Title\n") -> pages.Page:
    return pages.parse("one", pages.with_header({"commit": commit}, body))


def test_a_page_that_was_edited_or_has_no_header_is_found() -> None:
    assert pages.problem(page("abc1234"), None) is None
    assert "edited by hand" in str(pages.problem(replace(page("abc1234"), body="# Title, mended\n"), None))
    assert "no header" in str(pages.problem(pages.parse("one", "# Title\n"), None))


def test_a_page_that_went_backwards_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_is_older", lambda commit, other: (commit, other) == ("abc1234", "def5678"))
    assert "put back" in str(pages.problem(page("abc1234"), page("def5678")))
    assert pages.problem(page("def5678"), page("abc1234")) is None
