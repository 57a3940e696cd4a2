"""Finds near-duplicates: files that share most of their lines, by MinHash and locality-sensitive hashing (datasketch).

A file is represented by the set of its pairs of consecutive non-empty stripped lines. Two files are near-duplicates if the
estimated Jaccard similarity of their sets is at least THRESHOLD; the first in the given order is kept. The hashing uses 8
bands of 8 rows (datasketch's choice), which find 99% of the pairs with similarity 0.9, 77% of those with 0.8, and 38% right
at the threshold. So the hashing removes copies, and does not prove that none is left. `train.corpus` drops exact duplicates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

THRESHOLD = 0.7
PERMUTATIONS = 64  # with 64, the estimated similarity has a standard error of 0.06 at the threshold
SEED = 1

SCHEME: Literal["affine32"] = "affine32"

Signature = NDArray[np.uint32]


def signature(text: str) -> Signature:
    """Return the MinHash values [PERMUTATIONS] of `text`. Equal texts have equal values on every machine."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())] or [""]
    pairs = {f"{a}\n{b}".encode() for a, b in itertools.pairwise(lines)} or {lines[0].encode()}
    minhash = _minhash()
    minhash.update_batch(list(pairs))
    return np.asarray(minhash.hashvalues)


def near_duplicates(signatures: Sequence[Signature]) -> Iterator[bool]:
    """Yield for each signature, in order, whether it is too similar to an earlier signature that was kept."""
    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    for index, values in enumerate(signatures):
        minhash = _minhash(values)
        found = any(float(np.mean(values == signatures[other])) >= THRESHOLD for other in lsh.query(minhash))
        if not found:
            lsh.insert(index, minhash)
        yield found


def _minhash(values: Signature | None = None) -> MinHash:
    return MinHash(
        seed=SEED,
        num_perm=PERMUTATIONS,
        hashfunc=xxhash.xxh32_intdigest,
        hashvalues=values,
        permutations=_permutations(),
        scheme=SCHEME,
    )


@functools.cache
def _permutations() -> Any:
    """Return MinHash's permutations. They are made once, since making them takes longer than using them."""
    return MinHash(seed=SEED, num_perm=PERMUTATIONS, scheme=SCHEME).permutations
