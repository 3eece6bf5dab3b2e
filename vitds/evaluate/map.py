"""Features on a plane, for a person to look at."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEWEST = 8  # of fewer images a plane says nothing
PERPLEXITY = 30.0
COMPONENTS = 50  # that t-SNE gets, as its authors advise: noise is dropped, and distances are cheap


def plane(rows_MD: Float[Tensor, "M D"]) -> Float[np.ndarray, "M 2"]:
    """Where each image lies, in 0..1; images with like features lie together.

    Distances of far images mean nothing. The same features give the same plane on the same machine.

    Args:
        rows_MD: at least FEWEST. Time grows with M log M: 2,000 take some seconds.
    """
    # At the top scikit-learn costs every start a second.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit_MD = F.normalize(rows_MD.float(), dim=1).numpy()
    images = len(unit_MD)
    if min(unit_MD.shape) > COMPONENTS:
        unit_MD = PCA(COMPONENTS, random_state=0).fit_transform(unit_MD)
    # One image a feature, as after a collapse, leaves the plane's first guess without a scale.
    start = "pca" if unit_MD.std(0).max() > 1e-6 else "random"
    perplexity = min(PERPLEXITY, (images - 1) / 3)
    found = TSNE(perplexity=perplexity, init=start, angle=0.7, max_iter=400, random_state=0).fit_transform(
        unit_MD
    )
    low, high = found.min(0), found.max(0)
    return ((found - low) / np.maximum(high - low, 1e-9)).astype(np.float64)
