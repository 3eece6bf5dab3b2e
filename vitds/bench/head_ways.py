"""What `vitds bench head` measures: one batch, and the ways to its loss and gradients, ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitds.batch import Targets
from vitds.heads import DenseHead, ShardedHead
from vitds.models.precision import AUTOCAST

# The bare products' logits lie in memory at once up to this.
PRODUCT_BYTES = 1 << 30
FEW_FEATURES = 16  # fewer fill no tile of a GPU's matrix unit
TILE_ROWS = 256  # of the plain way with tiles; ours choose their own
OURS = "ours, dense"


class Case(NamedTuple):
    """What is measured; `bench_head` says what each is."""

    rows: int
    dim: int
    batch: int
    precision: Literal["fp32", "bf16"]
    bf16_rows: bool
    rounds: int
    keep_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows and their gradient."""
        return torch.bfloat16 if self.bf16_rows else torch.float32


@dataclass(frozen=True)
class Contender:
    """One way to the loss and its gradients.

    Attributes:
        name: in the table.
        step: forward and backward pass.
        logits: how many (M, N) matrices it holds at once.
        makes_gradient: whether each step makes the memory of the weight's gradient anew.
    """

    name: str
    step: Callable[[], None]
    logits: int = 0
    makes_gradient: bool = True


def make_batch(rows: int, dim: int, batch: int, device: torch.device) -> tuple[Tensor, Targets]:
    """Features (M, D), float32, and their rows as targets, unmixed, each weighing 1/M; always the same."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, dim, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, rows, (batch,), generator=generator).to(device)
    one = torch.ones(batch, device=device)
    return features, Targets(target, target, one, one / batch, torch.zeros_like(target))


def contenders(dense: DenseHead, features: Tensor, targets: Targets, precision: str) -> Iterator[Contender]:
    """All ways that are measured, in the order of the table.

    The first four are what the others are compared with.

    Args:
        dense: our head, whose weight all of them take.
        features: (M, D).
        targets: of the features.
        precision: of the products, fp32 or bf16.
    """
    dtype, weight, target = AUTOCAST.get(precision), dense.weight, targets.a
    rows, device = len(weight), features.device.type

    def backward_of(loss: Callable[[], Tensor]) -> Callable[[], None]:
        """A step: the loss under the case's autocast, and its gradients."""

        def step() -> None:
            """Forward and backward pass."""
            with torch.autocast(device, dtype, enabled=dtype is not None):
                value = loss()
            value.backward()

        return step

    products = _bare_products(features.detach(), weight.detach(), dtype or torch.float32)
    yield Contender("four bare products", partial(products, 4), makes_gradient=False)
    yield Contender("three bare products", partial(products, 3), makes_gradient=False)
    # Three matrices: logits, their log-softmax and its gradient. Those of bfloat16 have float32 copies, which
    # comes to the same.
    yield Contender(
        "torch's linear and cross_entropy",
        backward_of(lambda: _cross_entropy(nn.functional.linear(features, weight), target)),
        3,
    )
    yield Contender(
        f"tiles of {TILE_ROWS} rows under checkpoint",
        backward_of(lambda: _checkpointed(features, weight, target)),
    )
    liger = _peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel")
    if liger_chunk(len(features), rows, features.shape[1]) < FEW_FEATURES:
        liger = _refusal(f"its rule makes chunks of fewer than {FEW_FEATURES} features of these shapes")
    yield Contender("Liger", backward_of(lambda: liger(features, weight, target)))
    cce = _peer("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
    if device == "cuda":
        # Its own rule leaves out gradients below bfloat16's last bit. With shares of one in thousands that
        # is nearly all of them: less work, and another result.
        exact = backward_of(lambda: cce(features, weight, target, filter_eps=None))
        yield Contender("Cut Cross-Entropy", exact)
    else:
        compiled = backward_of(lambda: cce(features, weight, target, impl="torch_compile"))
        yield Contender("Cut Cross-Entropy's torch_compile", compiled, 3)
    yield Contender(OURS, backward_of(lambda: dense(features, targets).sum()))
    sharded = ShardedHead(
        rows, features.shape[1], bias=False, label_smoothing=0.0, seed=0, keep_bytes=dense.keep_bytes
    )
    sharded.weight = weight
    yield Contender(
        "ours, sharded",
        backward_of(lambda: sharded(features, targets).sum()),
        makes_gradient=False,
    )


def _bare_products(features: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[int], None]:
    """The floor of any head: its products alone, on memory that is there, with nothing between them.

    Returns: a function of their number. Three are features by rows, shares by rows and shares by features;
        four
    have the first one twice, as where logits are not kept.
    """
    x_MD, w_ND = features.to(dtype), weight.to(dtype)
    block = min(len(w_ND), max(1, PRODUCT_BYTES // (len(x_MD) * x_MD.element_size())))
    logits, g_x_MD, g_w_ND = x_MD.new_zeros(len(x_MD), block), torch.zeros_like(x_MD), torch.zeros_like(w_ND)

    def step(number: int) -> None:
        """So many products, the last two of them those of the backward pass."""
        for first in range(0, len(w_ND), block):
            rows = w_ND[first : first + block]
            part = logits.flatten()[: len(x_MD) * len(rows)].view(len(x_MD), len(rows))
            for _ in range(number - 2):
                torch.mm(x_MD, rows.T, out=part)
            torch.mm(part, rows, out=g_x_MD)
            torch.mm(part.T, x_MD, out=g_w_ND[first : first + block])

    return step


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), target)


def _checkpointed(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Tiles of rows, each one's logits made again in the backward pass."""

    def part(rows: Tensor) -> Tensor:
        """Log-sum-exp over a tile's rows."""
        return nn.functional.linear(features, rows).float().logsumexp(1)

    parts = [checkpoint(part, rows, use_reentrant=False) for rows in weight.split(TILE_ROWS)]
    own = (features * nn.functional.embedding(target, weight)).sum(1)
    return (torch.stack(parts).logsumexp(0) - own).mean()


def _peer(module: str, name: str, package: str) -> Callable[..., Tensor]:
    """A function of another package, or one that says that it is not there."""

    try:
        return getattr(import_module(module), name)
    except ImportError:
        return _refusal(f"not installed: pip install {package}")


def _refusal(reason: str) -> Callable[..., Tensor]:
    """In the place of a function that shall not be measured."""

    def refused(*_: Any, **__: Any) -> Tensor:
        """Takes what that function takes."""
        raise NotImplementedError(reason)

    return refused


def liger_chunk(features: int, rows: int, width: int) -> int:
    """The features that Liger's fused linear cross-entropy works on at once, by its rule for token heads.

    Its logits then take as much memory as the features: a power of two of M / (N / D). With N a thousand
    times D that is a single feature, and its products are no matrix products any more.
    """
    chunks = -(-rows // width)
    return 1 << (-(-features // chunks) - 1).bit_length()
