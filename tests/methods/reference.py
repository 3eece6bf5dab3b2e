"""Contrastive losses and chunk statistics the slow way: one image, one anchor at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def simclr_losses(z: Tensor, is_real: Tensor, temperature: float) -> Tensor:
    """(chunks, 2, K, d), (chunks, K) -> (chunks, 2, K): the other view of the image among all other real
    crops of the chunk."""
    losses = torch.zeros(z.shape[:3], dtype=torch.float64)
    chunks, _, images, _ = z.shape
    for chunk in range(chunks):
        crops = [(view, image) for view in (0, 1) for image in range(images) if is_real[chunk, image]]
        for view, image in crops:
            others = [other for other in crops if other != (view, image)]
            scores = [cosine(z[chunk, view, image], z[chunk, v, i]) / temperature for v, i in others]
            own = scores[others.index((1 - view, image))]
            losses[chunk, view, image] = math.log(sum(map(math.exp, scores))) - own
    return losses


def mocov3_losses(query: Tensor, key: Tensor, is_real: Tensor, temperature: float) -> Tensor:
    """(chunks, 2, K, d) twice, (chunks, K) -> (chunks, 2, K): the image's key in the other view among all
    real keys there."""
    losses = torch.zeros(query.shape[:3], dtype=torch.float64)
    chunks, _, images, _ = query.shape
    for chunk in range(chunks):
        real = [image for image in range(images) if is_real[chunk, image]]
        for view in (0, 1):
            for image in real:
                scores = [
                    cosine(query[chunk, view, image], key[chunk, 1 - view, i]) / temperature for i in real
                ]
                losses[chunk, view, image] = math.log(sum(map(math.exp, scores))) - scores[real.index(image)]
    return losses


def chunk_norm(x: Tensor, is_real: Tensor, eps: float = 1e-5) -> Tensor:
    """(groups, n, D), (groups, n): each group by the mean and biased variance of its real crops; padding is
    0.
    """
    out = torch.zeros_like(x)
    for group in range(len(x)):
        real = x[group][is_real[group]]
        mean = real.mean(0)
        variance = ((real - mean) ** 2).mean(0)
        out[group][is_real[group]] = (real - mean) / (variance + eps).sqrt()
    return out


def plain_projector(x: Tensor, part: nn.Module, is_real: Tensor, norms: list[str]) -> Tensor:
    """(M, D), (groups, n) -> (M, d): for each of `norms` a linear layer and that norm, ReLU between them.

    Args:
        part: whose weights they have, all of which are used.
        norms: affine, scale or plain, see ChunkNorm; none stands for a bias alone.
    """
    weights = {name: value.double() for name, value in part.state_dict().items()}
    x = x.detach().double().unflatten(0, is_real.shape)
    for number, norm in enumerate(norms):
        x = (x.clamp_min(0) if number else x) @ weights.pop(f"layers.{number}.weight").T
        if norm == "none":
            x = x + weights.pop(f"layers.{number}.bias")
        else:
            x = chunk_norm(x, is_real)
        if norm in ("affine", "scale"):
            x = x * weights.pop(f"norms.{number}.weight")
        if norm == "affine":
            x = x + weights.pop(f"norms.{number}.bias")
    assert not weights
    return x.flatten(0, 1)


def epps_pulley(x: Tensor) -> float:
    """(n,): n ∫ |mean exp(i t x) - exp(-t² / 2)|² exp(-t² / 2) dt, the trapezoid rule with 33 points."""
    points = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal = (-(points**2) / 2).exp()
    found = torch.exp(1j * points[:, None] * x[None].double()).mean(1)
    return len(x) * float(torch.trapezoid((found - normal).abs() ** 2 * normal, points))


def lejepa_terms(z: Tensor, is_real: Tensor, directions: Tensor, global_views: int) -> tuple[Tensor, Tensor]:
    """(chunks, V, K, d), (chunks, K), (chunks, d, s) -> the distance of each image's views to the mean of its
    global ones (chunks, K), and each chunk's statistic (chunks,), one image and one direction at a time."""
    chunks, views, images, width = z.shape
    distance, statistic = torch.zeros(chunks, images), torch.zeros(chunks)
    for chunk in range(chunks):
        for image in range(images):
            own = z[chunk, :, image]
            distance[chunk, image] = ((own - own[:global_views].mean(0)) ** 2).sum() / (views * width)
        found = [
            epps_pulley(z[chunk, view, is_real[chunk]] @ direction)
            for view in range(views)
            for direction in directions[chunk].T.to(z.dtype)
            if is_real[chunk].any()
        ]
        statistic[chunk] = sum(found) / max(1, len(found))
    return distance, statistic


def supcon_losses(z: Tensor, label: Tensor, is_real: Tensor, temperature: float) -> Tensor:
    """(chunks, V, K, d), (chunks, K), (chunks, K) -> (chunks, V, K): the mean over all other real crops of
    the class of finding that one among all other real crops of the chunk; 0 where there is none."""
    chunks, views, images, _ = z.shape
    losses = torch.zeros(z.shape[:3], dtype=torch.float64)
    for chunk in range(chunks):
        crops = [(v, i) for v in range(views) for i in range(images) if is_real[chunk, i]]
        for view, image in crops:
            others = [other for other in crops if other != (view, image)]
            scores = [cosine(z[chunk, view, image], z[chunk, v, i]) / temperature for v, i in others]
            own = [
                s for s, (_, i) in zip(scores, others, strict=True) if label[chunk, i] == label[chunk, image]
            ]
            if own:
                losses[chunk, view, image] = math.log(sum(map(math.exp, scores))) - sum(own) / len(own)
    return losses


def dino_terms(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[float, float]:
    """Of one image, (V, outputs) and (G, outputs), the teacher centred: its mean entropy, and the mean cross-
    entropy of all pairs of a global view and another view, less the entropy."""

    def softmax(logits: Tensor) -> list[float]:
        powers = [math.exp(float(logit - logits.max())) for logit in logits]
        return [power / sum(powers) for power in powers]

    choices = [softmax(row / teacher_temperature) for row in teacher]
    answers = [softmax(row / student_temperature) for row in student]
    entropies = [-sum(q * math.log(q) for q in choice) for choice in choices]
    crossed = [
        -sum(q * math.log(p) for q, p in zip(choice, answer, strict=True))
        for g, choice in enumerate(choices)
        for v, answer in enumerate(answers)
        if v != g
    ]
    entropy = sum(entropies) / len(entropies)
    return entropy, sum(crossed) / len(crossed) - entropy


def mae_losses(painted: Tensor, images: Tensor, kept: Tensor, patch_px: int, eps: float = 1e-6) -> Tensor:
    """(M, L, p), (M, 3, S, S), (M, k) -> (M,): the mean squared error over the patches that were not kept, a
    patch at a time; pixels of a patch row by row, its three channels together."""
    crops, _, side_px, _ = images.shape
    columns = side_px // patch_px
    losses = torch.zeros(crops, dtype=images.dtype)
    for crop in range(crops):
        errors = []
        for patch in set(range(columns**2)) - set(kept[crop].tolist()):
            top, left = patch // columns * patch_px, patch % columns * patch_px
            pixels = images[crop, :, top : top + patch_px, left : left + patch_px]
            pixels = torch.stack(
                [pixels[:, y, x] for y in range(patch_px) for x in range(patch_px)]
            ).flatten()
            normal = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + eps).sqrt()
            errors.append(((painted[crop, patch] - normal) ** 2).mean())
        losses[crop] = sum(errors) / len(errors)
    return losses
