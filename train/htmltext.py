"""Extracts the text of a documentation page: HTML in, plain text out, with paragraphs, list items and preformatted blocks.

The extraction handles the HTML that Sphinx, DocBook and the projects of `sources.toml` write. It drops navigation, scripts and
page decoration by tag, class or id. It is not a renderer: tables become lines of cells; images and link targets are dropped.
"""

from __future__ import annotations

import re
import textwrap
from html.parser import HTMLParser

WIDTH = 80  # columns of a paragraph, as in the corpus's hand-written documentation
SKIPPED_TAGS = frozenset(["script", "style", "head", "nav", "header", "footer", "form", "button", "select", "svg", "noscript"])
SKIPPED_CLASSES = frozenset(
    [
        "sphinxsidebar",
        "related",
        "nav",
        "navheader",
        "navfooter",
        "headerlink",
        "footer",
        "toc",
        "global-nav",
        "breadcrumb",
        "breadcrumbs",
        "sidebar",
        "top",
        "bottom",
        "up",
        "copyright",
        "skip-link",
        "navbar",
        "fancy_toc",
        "rightmenu",
        "leftmenu",
        "menu",
        "linenos",
        "tagline",
        "srclinks",
        "api_stability",
        "pageheader",
        "toplang",
        "quickview",
        "site-title",
        "modal",
    ]
)
SKIPPED_IDS = frozenset(["column2", "footer", "sidebar", "ft", "hd", "path", "page-header", "comments_section", "leftnav", "toc"])
BLOCKS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "li",
        "table",
        "tr",
        "pre",
        "blockquote",
        "br",
        "hr",
    ]
)
# Block elements that get an empty line before and after them.
SPACED = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "pre", "blockquote", "dt"])
VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])


def html_to_text(html: str) -> str:
    page = _Page()
    page.feed(html)
    page.close()
    page.end_line()
    return "\n".join(page.lines).strip("\n") + "\n"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []  # complete lines of the text
        self.line: list[str] = []  # pieces of the current line
        self.indent = ""  # put before each continuation line when the current line is wrapped
        self.skipped: list[str] = []  # open tags with the name of the element that is skipped, that element first
        self.pre = 0  # number of <pre> elements that are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            if tag == self.skipped[0]:  # other tags are not counted, since pages leave <p> and <li> open
                self.skipped.append(tag)
        elif tag not in VOID and _is_furniture(tag, dict(attrs)):
            self.skipped.append(tag)
        elif tag in BLOCKS:
            self.end_line(spaced=tag in SPACED)
            self.pre += tag == "pre"
            if tag == "li":
                self.line, self.indent = ["- "], "  "
        elif tag in ("td", "th"):
            self.line.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            if tag == self.skipped[0]:
                self.skipped.pop()
        elif tag in BLOCKS:
            self.end_line(spaced=tag in SPACED)
            self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.line.append(data if self.pre else re.sub(r"\s+", " ", data))

    def end_line(self, *, spaced: bool = False) -> None:
        """Append the current line to the complete lines, followed by an empty line if `spaced`."""
        text = "".join(self.line)
        if self.pre:
            self.lines += [line.rstrip() for line in text.strip("\n").split("\n")] if text.strip() else []
        elif text.strip() == "-" and self.indent:
            return  # the text of this list item follows in a paragraph of its own
        else:
            self.lines += _wrap(text.strip(), self.indent)
        self.line, self.indent = [], ""
        if spaced and self.lines and self.lines[-1]:
            self.lines.append("")


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _is_furniture(tag: str, attrs: dict[str, str | None]) -> bool:
    classes = (attrs.get("class") or "").split()
    return tag in SKIPPED_TAGS or not SKIPPED_CLASSES.isdisjoint(classes) or attrs.get("id") in SKIPPED_IDS
