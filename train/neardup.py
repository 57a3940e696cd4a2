"""Near-duplicates: files that share most of their lines, found by MinHash and locality-sensitive hashing (datasketch).

A file is the set of its pairs of consecutive non-empty lines, stripped; two files are near-duplicates where the Jaccard
similarity of those sets is estimated at THRESHOLD or more. The first in the order given stays. The hashing's bands (8 of
8 rows, datasketch's choice) find 99% of the pairs that share nine tenths, 77% of those that share eight, 38% right at the
threshold: this removes copies, and does not prove that there are none. Not here: exact duplicates.
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
PERMUTATIONS = 64  # the estimate's standard error is then 0.06 at the threshold
SEED = 1

SCHEME: Literal["affine32"] = "affine32"

Signature = NDArray[np.uint32]


def signature(text: str) -> Signature:
    """The MinHash values [PERMUTATIONS] of `text`; equal for equal texts, on every machine."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())] or [""]
    pairs = {f"{a}\n{b}".encode() for a, b in itertools.pairwise(lines)} or {lines[0].encode()}
    minhash = _minhash()
    minhash.update_batch(list(pairs))
    return np.asarray(minhash.hashvalues)


def near_duplicates(signatures: Sequence[Signature]) -> Iterator[bool]:
    """For each signature in turn, whether one before it that was itself kept is too similar."""
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
    """Drawn once: making them takes longer than using them."""
    return MinHash(seed=SEED, num_perm=PERMUTATIONS, scheme=SCHEME).permutations
