"""How vocabularies write bytes: GPT-2's alphabet of byte-level BPE, and the byte tokens ("<0x0A>") of SentencePiece."""

from __future__ import annotations


def _byte_of() -> dict[str, int]:
    """Build GPT-2's table from characters to bytes.

    A printing byte is written as the character of the same number. The other bytes are written as U+0100 and the following
    characters, in order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printing)]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()
"""The byte that each of the 256 characters of GPT-2's alphabet stands for."""


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes that a token of a byte-level BPE stands for. An added token is ordinary text: its bytes are its UTF-8."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def fallback_byte(token: str) -> int | None:
    """Return the byte of a byte token, such as 65 for "<0x41>", and None for any other token."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
