"""The optimizer of the engine's parameters: AdamW, SGD, or Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds.config.tree import Optimizer

# Of Muon (kellerjordan.github.io/posts/muon): momentum; the polynomial that brings singular values near 1.
MOMENTUM = 0.95
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
STEPS = 5
# By it an update is as large as AdamW's, so rate and weight decay mean the same (arXiv:2502.16982).
LIKE_ADAMW = 0.2
SGD_MOMENTUM = 0.9
CLASSIFIERS = ("head", "prototypes")  # parts of a method's module


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose next step can be cancelled, at every ZeRO stage: by the flag that all parts share."""

    skip = False

    def step(self, closure: Any = None) -> Any:
        """torch's step, or nothing."""
        return None if self.skip else super().step(closure)


class SkippableSGD(SkippableAdamW):
    """SGD with Nesterov's momentum, the weight decay in the gradient, as torch.optim.SGD has it.

    States and checkpoints are AdamW's. Momentum is kept as `exp_avg`; `exp_avg_sq` stays 0.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """An update of every group, or nothing."""
        if self.skip:
            return
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            moments = [_momentum(self.state[weight], weight) for weight in weights]
            gradients = torch._foreach_add(
                [weight.grad for weight in weights], weights, alpha=group["weight_decay"]
            )
            torch._foreach_mul_(moments, SGD_MOMENTUM)
            torch._foreach_add_(moments, gradients)
            torch._foreach_add_(gradients, moments, alpha=SGD_MOMENTUM)
            torch._foreach_add_(weights, gradients, alpha=-group["lr"])


class SkippableMuon(SkippableAdamW):
    """Muon for the groups of matrices, AdamW for the others; states and checkpoints are AdamW's.

    A matrix's momentum is turned to the nearest matrix whose singular values are all 1, so no direction of it
    learns faster than another. Momentum is kept as `exp_avg`; `exp_avg_sq` of a matrix stays 0.
    """

    def step(self, closure: Any = None) -> Any:
        """An update of every group, or nothing."""
        if self.skip:
            return None
        groups = self.param_groups
        for group in groups:
            if group["turned"]:
                self._turned_step(group)
        self.param_groups = [group for group in groups if not group["turned"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _turned_step(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            momentum = _momentum(self.state[weight], weight).lerp_(weight.grad, 1 - MOMENTUM)
            # Nesterov's: the momentum as it will be if the gradient stays.
            ahead = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
            scale = LIKE_ADAMW * max(ahead.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(orthogonalized(ahead).view_as(weight), alpha=-group["lr"] * scale)


def _momentum(state: dict[str, Any], weight: Tensor) -> Tensor:
    """The one of AdamW's two moments that Muon and SGD have, 0 at first."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(weight)
    return state["exp_avg"]


OPTIMIZERS = {"adamw": SkippableAdamW, "muon": SkippableMuon, "sgd": SkippableSGD}


def orthogonalized(matrix: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """U Vᵀ of the singular value decomposition U S Vᵀ, nearly: singular values come to lie at 0.7 to 1.2.

    Five steps of X <- (a + b XXᵀ + c (XXᵀ)²) X from X = matrix / |matrix|. All factors are polynomials of the
    first XXᵀ, so they are multiplied in its size, and X is seen twice: a third of the arithmetic where
    one side is nine times the other.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    a, b, c = POLYNOMIAL
    gram = wide @ wide.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    found = product @ wide
    return found.T if is_tall else found


def matrix_names(module: nn.Module) -> set[str]:
    """The weights that Muon turns: of linear layers and dense convolutions, but of no classifier.

    A classifier's rows belong to one class each and an embedding's to one token: neither is a map.
    """
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and getattr(layer, "groups", 1) == 1
        and not name.startswith(CLASSIFIERS)
    }


def parameter_groups(
    module: nn.Module,
    lr_scales: Mapping[str, float],
    held_epochs: Mapping[str, int],
    *,
    weight_decay: float,
    decay: str,
    kind: str,
) -> list[dict[str, Any]]:
    """What trains, in groups of one rate and one weight decay; a single group where nothing differs.

    Args:
        lr_scales: for parameters whose names begin so, what the loop multiplies their rate by.
        held_epochs: for parameters whose names begin so, the epochs from the start in which it is 0.
        weight_decay: of those that decay.
        decay: `all` parameters, as in the paper's code, or `matrices`: those of two dimensions and more.
        kind: of the optimizer; with `muon` the matrices that it turns are groups of their own.
    """
    # ZeRO makes each group a flat tensor, so there are as few as possible.
    groups: dict[tuple[float, int, bool, bool], dict[str, Any]] = {}
    turned_names = matrix_names(module) if kind == "muon" else set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # 1 for all that no prefix claims, such as the backbone.
        scale = next((value for prefix, value in lr_scales.items() if name.startswith(prefix)), 1.0)
        held = next((value for prefix, value in held_epochs.items() if name.startswith(prefix)), 0)
        # `matrices`: biases and norms' scales have one dimension; position embeddings have more, and decay.
        decays = decay == "all" or parameter.dim() > 1
        group = {"params": [], "lr_scale": scale, "held_epochs": held, "decays": decays}
        group |= {"weight_decay": weight_decay * decays, "turned": name in turned_names}
        groups.setdefault((scale, held, decays, group["turned"]), group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    module: nn.Module,
    settings: Optimizer,
    *,
    lr_scales: Mapping[str, float],
    held_epochs: Mapping[str, int] = {},  # noqa: B006 (never written to)
    on_host: bool = False,
) -> SkippableAdamW:
    """AdamW, Muon or SGD; each step sets rate and weight decay of its groups anew (vitds/engine/update.py).

    Args:
        module: whose parameters it updates; those that need no gradient are left out.
        settings: peak rate, betas, eps, weight decay.
        lr_scales, held_epochs: see `parameter_groups`.
        on_host: states are offloaded to host memory. torch's fused AdamW then does what DeepSpeed's CPU Adam
            does, one vectorised pass over memory, and needs no compiler at the first start.
    """
    groups = parameter_groups(
        module,
        lr_scales,
        held_epochs,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        kind=settings.kind,
    )
    # fused=False written out would also turn off torch's foreach path, which a GPU needs: there it is one
    # launch a tensor.
    is_on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    fused = {"fused": True} if on_host or is_on_gpu else {}
    return OPTIMIZERS[settings.kind](
        groups, lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, **fused
    )
