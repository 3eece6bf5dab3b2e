"""Contrastive losses within chunks: a crop has to find others, of its image or of its class, among those of
its chunk.

Crops stand in the order (chunk, view, image), V views of K images. Padded crops are nobody's negative; their
own loss is a finite number that the caller weighs with 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def among_all_views(
    z_MD: Float[Tensor, "M d"], is_real_cA: Bool[Tensor, "c A"], temperature: float
) -> Float[Tensor, "M"]:
    """Each crop's cross-entropy of finding the other view of its image among all other crops of its chunk.

    Args:
        z_MD: not normalised yet.
        is_real_cA: for each chunk its A = 2K crops, the first views of all images before the second ones.
        temperature: what cosines are divided by.
    Source: SimCLR's NT-Xent, arXiv:2002.05709, as a mean over all anchors. (The authors' code adds the means
        over either view's anchors, so it prints twice this.)
    """
    chunks, crops = is_real_cA.shape
    # Crops of a chunk stand together, so cutting M into (chunks, A) is enough: no gather, no mask of chunks.
    z_cAD = normalize(z_MD, dim=1).unflatten(0, (chunks, crops))
    # (c, A, D) @ (c, D, A) -> (c, A, A); of length one, so these are cosines.
    similarity_cAA = z_cAD @ z_cAD.transpose(1, 2) / temperature
    is_itself_AA = torch.eye(crops, dtype=torch.bool, device=z_MD.device)
    # Rows are anchors, columns what they choose from: real crops other than themselves.
    is_candidate_cAA = is_real_cA[:, None, :] & ~is_itself_AA
    # Crops i and i + K are the two views of an image: rolling by K leads from either to the other.
    other_A = torch.arange(crops, device=z_MD.device).roll(-(crops // 2))
    return _cross_entropy(similarity_cAA, is_candidate_cAA, is_real_cA, other_A).flatten()


def among_class(
    z_MD: Float[Tensor, "M d"],
    label_cA: Int[Tensor, "c A"],
    is_real_cA: Bool[Tensor, "c A"],
    temperature: float,
) -> Float[Tensor, "M"]:
    """Each crop's cross-entropy of finding another crop of its class among all other crops of its chunk, the
    mean over those crops; 0 where there is none.

    Args:
        z_MD: not normalised yet.
        label_cA: class of each of a chunk's A crops.
        is_real_cA: False for padded crops.
        temperature: what cosines are divided by.
    Source: SupCon's L_out, arXiv:2004.11362, without the factor of its code.
    """
    z_cAD = normalize(z_MD, dim=1).unflatten(0, label_cA.shape)
    similarity_cAA = z_cAD @ z_cAD.transpose(1, 2) / temperature
    is_itself_AA = torch.eye(label_cA.shape[1], dtype=torch.bool, device=z_MD.device)
    is_candidate_cAA = is_real_cA[:, None, :] & ~is_itself_AA
    is_wanted_cAA = is_candidate_cAA & (label_cA[:, :, None] == label_cA[:, None, :])
    # A padded crop keeps all candidates, or its softmax might have none, and so a gradient of NaN.
    is_left_out_cAA = ~is_candidate_cAA & is_real_cA[..., None]
    lse_cA = similarity_cAA.masked_fill(is_left_out_cAA, -torch.inf).logsumexp(2)
    wanted_cA = is_wanted_cAA.sum(2)
    own_cA = (similarity_cAA * is_wanted_cAA).sum(2) / wanted_cA.clamp_min(1)
    return torch.where(is_real_cA & (wanted_cA > 0), lse_cA - own_cA, 0.0).flatten()


def among_other_view(
    query_MD: Float[Tensor, "M d"],
    key_MD: Float[Tensor, "M d"],
    is_real_cVK: Bool[Tensor, "c 2 K"],
    temperature: float,
) -> Float[Tensor, "M"]:
    """Each query's cross-entropy of finding its image among the keys of the other view in its chunk.

    Args:
        query_MD, key_MD: of all crops, not normalised yet.
        is_real_cVK: for each chunk its two views of K images.
        temperature: what cosines are divided by.
    Source: MoCo v3, arXiv:2104.02057.
    """
    chunks, views, images = is_real_cVK.shape
    query_gKD = normalize(query_MD, dim=1).unflatten(0, (chunks * views, images))
    key_cVKD = normalize(key_MD, dim=1).unflatten(0, is_real_cVK.shape)
    # The two views of each chunk change places: queries of view 0 meet keys of view 1, and the reverse.
    other_gKD = key_cVKD.flip(1).flatten(0, 1)
    # (g, K, D) @ (g, D, K) -> (g, K, K), g = chunks · views
    similarity_gKK = query_gKD @ other_gKD.transpose(1, 2) / temperature
    is_real_gK = is_real_cVK.flatten(0, 1)  # an image is real in both views or in none
    is_candidate_gKK = is_real_gK[:, None, :].expand_as(similarity_gKK)
    # The positive stands at the image's own place, as both views have the same images in order.
    own_K = torch.arange(images, device=query_MD.device)
    return _cross_entropy(similarity_gKK, is_candidate_gKK, is_real_gK, own_K).flatten()


def _cross_entropy(
    similarity_gAB: Float[Tensor, "g A B"],
    is_candidate_gAB: Bool[Tensor, "g A B"],
    is_real_gA: Bool[Tensor, "g A"],
    positive_A: Tensor,
) -> Float[Tensor, "g A"]:
    """-log softmax over the candidates, at the positive; 0 for anchors that are padding."""
    # A padded anchor may have no candidate at all: without this its softmax, and so its gradient, were NaN.
    similarity_gAB = similarity_gAB.masked_fill(~is_candidate_gAB & is_real_gA[..., None], -torch.inf)
    # (g, A, B) at one column a row -> (g, A)
    positive_gA1 = positive_A.expand(is_real_gA.shape)[..., None]
    own_gA = similarity_gAB.gather(2, positive_gA1).squeeze(2)
    return torch.where(is_real_gA, similarity_gAB.logsumexp(2) - own_gA, 0.0)
