"""Which rows stand for all negatives of a step (`head.sample_rate`), after Partial FC (arXiv:2203.15565).

The N rows are cut in order into strata of 1 / rate rows, and one row of each is drawn; it counts as often as
its stratum has rows. So each row's chance times its weight is 1, and the sum of exponentials is unbiased.
Rows that are a target in the batch always take part and count once. Neighbours in a file are often of one
class, which strata spread evenly.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitds import rng
from vitds.rng import Purpose


def drawn_rows(rows: int, first: int, last: int, *, rate: float, seed: int, step: int) -> Float[Tensor, "n"]:
    """How often each of rows first..last-1 counts as a negative in this step: 0 if it was not drawn.

    A function of (seed, step) and the stratum: the same rows are drawn however they are spread over ranks and
    micro steps.

    Args:
        rows: N.
        first: of the rows that are asked about.
        last: the one after them.
        rate: the share of rows that is drawn.
        seed: of the run.
        step: of the optimizer.
    """
    # Strata that may reach into these rows, with a margin for rounding; `is_here` drops what does not.
    near = np.arange(max(0, int(first * rate) - 2), int(last * rate) + 3)
    # Stratum i holds rows floor(i / rate) to floor((i + 1) / rate) - 1; the last one may be short.
    start = np.minimum(np.floor(near / rate), rows).astype(np.int64)
    stop = np.minimum(np.floor((near + 1) / rate), rows).astype(np.int64)
    # One uniform number a stratum says which of its rows; it counts for all of them.
    row = start + (rng.uniform(Purpose.NEGATIVES, seed, step, near) * (stop - start)).astype(np.int64)
    is_here = (row >= first) & (row < last) & (stop > start)
    counts_n = torch.zeros(last - first)
    counts_n[row[is_here] - first] = torch.from_numpy((stop - start)[is_here]).float()
    return counts_n
