"""Accuracy: how predictions of first tokens turn out, for all tenants together and for each of them.

Each tenant has its own figures. In a flood, its requests mostly wait longer than predicted, and those of a calm tenant shorter,
since it was served least and goes first. With common figures, the calm one would be refused for the errors of the other.
"""

from __future__ import annotations

import math

MEMORY = 0.05  # weight of the latest observation in a running mean
FIRST_SPREAD = 0.2  # deviation of log(actual / predicted) before it is known
SPREAD_MEMORY = 0.02
SURE = 1.3  # deviations to allow for: nine of ten requests then have their first token in time
LARGEST_CORRECTION = math.log(2.0)  # a prediction that is further off is wrong for a reason that a ratio does not mend
MOST_TENANTS = 1024  # tenants whose figures are kept: those that were observed last


class Accuracy:
    """The usual error of predictions, as log(actual / predicted)."""

    def __init__(self, correction: float = 0.0, variance: float = FIRST_SPREAD**2) -> None:
        self._correction = correction
        self._variance = variance  # usual squared deviation from `_correction`

    @property
    def factor(self) -> float:
        """How many times its prediction a wait usually lasts."""
        return math.exp(self._correction)

    @property
    def margin(self) -> float:
        """How many times its corrected prediction a wait hardly exceeds."""
        return math.exp(SURE * math.sqrt(self._variance))

    def copy(self) -> Accuracy:
        return Accuracy(self._correction, self._variance)

    def observe(self, error: float, *, telling: bool) -> None:
        """Learn from a wait that lasted exp(`error`) times its corrected prediction.

        A short one is not `telling` about deviations, since it is off by a step or two.
        """
        ratio = max(-LARGEST_CORRECTION, min(LARGEST_CORRECTION, self._correction + error))
        if telling:
            self._variance += SPREAD_MEMORY * ((ratio - self._correction) ** 2 - self._variance)
        self._correction += MEMORY * (ratio - self._correction)


class AccuracyByTenant:
    """A tenant that was not observed yet has the figures of all."""

    def __init__(self) -> None:
        self.all = Accuracy()
        self._of: dict[str, Accuracy] = {}  # the one that was observed last is the last

    def of(self, tenant: str) -> Accuracy:
        return self._of.get(tenant, self.all)

    def observe(self, tenant: str, error: float, *, telling: bool) -> None:
        own = self._of.pop(tenant, None) or self.all.copy()
        self._of[tenant] = own
        factor = own.factor
        own.observe(error, telling=telling)
        self.all.observe(error + math.log(factor / self.all.factor), telling=telling)
        if len(self._of) > MOST_TENANTS:
            del self._of[next(iter(self._of))]
