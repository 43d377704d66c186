"""How likely a limit is kept: a prediction just below it is about as often above when it is measured.

Errors are taken as normal in their logarithm, and as large as the band says, which nine in ten rows that were not
fitted are within. What is wanted of a plan counts times these odds: tokens that come too late are of no use. So plans
close to a limit must be better than others by more than the risk.
"""

from __future__ import annotations

import math

NINE_IN_TEN = 1.645
"""Standard deviations to either side that nine in ten of a normal distribution are within."""


def odds(limit: float | None, predicted: float, band: float) -> float:
    """From 0 to 1; 1 where there is no limit. `band`: the factor within which nine in ten predictions are."""
    if limit is None:
        return 1
    deviation = max(math.log(band) / NINE_IN_TEN, 1e-6)
    return (1 + math.erf(math.log(limit / predicted) / deviation / math.sqrt(2))) / 2
