"""Decides which files are worth training on, and removes boilerplate from those that are.

Each dropped file has one reason, which the manifest counts. The thresholds were set by reading files on both sides of them.
Duplicates are handled elsewhere (`train.neardup`, `train.corpus`).
"""

from __future__ import annotations

import ast
import re
import string
import warnings
from collections.abc import Callable

MIN_BYTES, MAX_BYTES = 200, 100_000  # smallest and largest size of a file's cleaned text
MAX_MEAN_LINE, MAX_LINE = 100, 1000  # characters in the mean line and in the longest line
MIN_LETTERS = 0.45  # least share of letters among the characters that are not spaces
MAX_DIGITS = 0.2  # largest share of digits among the characters that are not spaces
MAX_NON_ASCII = 0.05  # largest share of all characters; English text has a few, in quotation marks and names
MIN_DISTINCT = 0.35  # least share of distinct lines among the non-empty lines, if a text has at least MIN_LINES
MIN_LINES = 20
MAX_BLOBS = 2  # largest number of lines of encoded data in a text
TOP = 2000  # number of characters at the start of a file that are searched for a licence
TOP_LINES = 10  # number of non-empty lines that are searched for a note that the file is generated

GENERATED = re.compile(
    r"\b(?:auto(?:matically|matic)?|machine)[- ]?generated\b|\bgenerated (?:by|from|with|using)\b"
    r"|\bdo not (?:edit|modify)\b|\bautogen",
    re.I,
)
COPYLEFT = re.compile(
    r"GNU\s+(?:#\s*)?(?:Lesser|Library|Affero|General)|\b[AL]?GPL(?:v?[23]|\b)|Mozilla\s+Public|\bMPL[- ]?[12v]"
    r"|CC[- ]BY[- ](?:SA|NC)|Attribution-?\s?(?:Share|NonCommercial)|\bCeCILL|\bEUPL\b",
    re.I,
)
LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved|SPDX-|\(c\)|warrant(?:y|ies)", re.I)
BLOB = re.compile(
    r"[A-Za-z0-9+/=]{100}|(?:\\x[0-9a-fA-F]{2}){16}|(?:0x[0-9a-fA-F]+[,\s]+){12}|(?:-?\d+(?:\.\d*)?(?:e[+-]?\d+)?[,\s]+){24}"
)
KEPT_COMMENT = re.compile(r"#!|#.*coding[:=]")


def clean(text: str) -> str:
    """Return `text` with \\n line ends, without trailing white space and licence header. Tabs stay."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\f", "")
    lines = strip_licence([line.rstrip() for line in text.split("\n")])
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"


def strip_licence(lines: list[str]) -> list[str]:
    """Remove the comment blocks at the top of `lines` that name a licence or a copyright: thousands of files repeat them.

    A shebang and an encoding line stay. A block is a run of `#` lines, or reStructuredText's `..` with its indented lines.
    """
    kept: list[str] = []
    at = 0
    while at < len(lines):
        end = _block_end(lines, at)
        block = lines[at:end]
        if not block[0].strip():
            kept += block if kept else []
        elif _is_comment(block[0]):
            named = LICENCE.search("\n".join(block)) is not None
            kept += [line for line in block if not named or KEPT_COMMENT.match(line)]
        else:
            break
        at = end
    return kept + lines[at:]


def why_dropped(text: str, *, python: bool) -> str | None:
    """Return the first reason not to train on `text`, or None if there is none. `clean` must have cleaned `text`."""
    for reason, fails in TEXT_CHECKS.items():
        if fails(text):
            return reason
    return "not_python" if python and not _parses(text) else None


def why_refused(text: str) -> str | None:
    """Return why the first lines of a file forbid training on it ("copyleft" or "generated"), or None. Call this function before
    `clean`, which would remove such lines."""
    if COPYLEFT.search(text[:TOP]):
        return "copyleft"
    top = [line for line in text[: 2 * TOP].splitlines() if line.strip()][:TOP_LINES]
    return "generated" if GENERATED.search("\n".join(top)) else None


def _block_end(lines: list[str], at: int) -> int:
    first, end = lines[at], at + 1
    while end < len(lines):
        line = lines[end]
        if first.startswith("#"):
            inside = line.startswith("#")
        elif first.startswith(".."):
            inside = line.startswith((" ", "\t")) or (not line and _indented_next(lines, end))
        else:
            inside = not first.strip() and not line.strip()
        if not inside:
            break
        end += 1
    return end


def _indented_next(lines: list[str], at: int) -> bool:
    following = next((line for line in lines[at:] if line), "")
    return following.startswith((" ", "\t"))


def _is_comment(line: str) -> bool:
    return line.startswith("#") or line == ".." or (line.startswith(".. ") and "::" not in line and not line.startswith(".. _"))


def _bad_size(text: str) -> bool:
    return not MIN_BYTES <= len(text.encode()) <= MAX_BYTES


def _long_lines(text: str) -> bool:
    lines = text.split("\n")
    return max(map(len, lines)) > MAX_LINE or len(text) > MAX_MEAN_LINE * len(lines)


def _non_ascii(text: str) -> bool:
    return len(text) - len(text.encode("ascii", "ignore")) > MAX_NON_ASCII * len(text)


def _few_letters(text: str) -> bool:
    return _count(text, string.ascii_letters) < MIN_LETTERS * len("".join(text.split()))


def _many_digits(text: str) -> bool:
    return _count(text, string.digits) > MAX_DIGITS * len("".join(text.split()))


def _count(text: str, characters: str) -> int:
    content = text.encode()
    return len(content) - len(content.translate(None, characters.encode()))


def _repetitive(text: str) -> bool:
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return len(lines) >= MIN_LINES and len(set(lines)) < MIN_DISTINCT * len(lines)


def _blobs(text: str) -> bool:
    return sum(BLOB.search(line) is not None for line in text.split("\n")) > MAX_BLOBS


def _parses(text: str) -> bool:
    """Return whether `text` is valid Python. Templates, Python 2 code and deliberately broken files are not valid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


TEXT_CHECKS: dict[str, Callable[[str], bool]] = {
    "size": _bad_size,
    "control_characters": lambda text: re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text) is not None,
    "long_lines": _long_lines,
    "non_ascii": _non_ascii,
    "few_letters": _few_letters,
    "many_digits": _many_digits,
    "repetitive": _repetitive,
    "blobs": _blobs,
}
