"""Foreign text is shown as it is, and makes no tag of a page."""

import html
import re

import pytest
from markdown_it import MarkdownIt

from semivim.hub.markdown import bullets, inert, plain, table

ACTIVE = [
    "[a](http://evil)", "![a](http://evil/x.png)", "<img src=x onerror=alert(1)>", "<script>x</script>", "</td>",
    "<!--", "**b** _i_ ~~s~~ `c`", "`", "``` x", "a|b", "a\\|b", "\\", "| --- |", "http://evil.example",
    "www.evil.example", "WWW.evil.example", "me@evil.example", "mailto:me@evil.example", "[a]: http://evil", "[^1]",
    "&lt;b&gt;", "&#60;b&#62;", "$x^2$", ":smile:", "a\n\n# b", "a\r\n---\nb: c", "a\u2028b", "\x1b[2J",
    "\u202egnp.exe", "\x07", "- x", "+ x", "---", "===", "1. x", "# x", "<http://evil>",
]  # fmt: skip


def render(text: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).enable("table").render(text)


def html_tags(text: str) -> list[str]:
    """The tags of a page, comments left out."""
    return re.findall(r"<[a-z/][^>]*>", re.sub(r"<!-- -->", "", render(text)))


@pytest.mark.parametrize("evil", ACTIVE, ids=ascii)
def test_text_makes_no_tag_and_is_shown_whole(evil: str) -> None:
    line = inert(evil)
    assert "\n" not in line
    page = render(f"x {line} x")
    assert html_tags(f"x {line} x") == ["<p>", "</p>"]
    assert html.unescape(page.replace("<!-- -->", "")) == f"<p>x {plain(evil)} x</p>\n"
    # pages that link addresses in the text itself, entities decoded, see no whole one
    for part in html.unescape(page).split("<!-- -->"):
        assert not re.search(r"https?://\w|www\.\w|\w@\w", part)
    assert html_tags(table(["a", "b"], [[evil, 1]])) == html_tags(table(["a", "b"], [["x", 1]]))
    assert html_tags(bullets({"a_b": evil})) == html_tags(bullets({"a_b": "x"}))


def test_what_a_reader_cannot_see_is_written_out() -> None:
    assert plain("a\n b\x1b\u202e") == "a b\\x1b\\u202e"
    assert inert("bee, wasp - 0.5/1 = 50 %") == "bee, wasp - 0.5/1 = 50 %"
    assert table(["a"], [["b|c"]]) == "| a |\n| --- |\n| b&#124;c |"
