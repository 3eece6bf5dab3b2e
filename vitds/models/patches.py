"""The patch projection as one product of matrices; a card would run a convolution of three channels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class PatchProduct(nn.Conv2d):
    """A convolution whose windows do not overlap: each patch, as a vector, times the weight.

    Parameters, their names and the result are those of the convolution; sums are made in another order.
    """

    def forward(self, x: Float[Tensor, "M C S S"]) -> Float[Tensor, "M D H W"]:
        """S / patch rows and columns of features, what does not divide left out as a convolution does."""
        high, wide = self.kernel_size
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        x = x[:, :, : rows * high, : columns * wide]
        # (M, C, rows, high, columns, wide) -> (M, rows, columns, C, high, wide), the order of the weight.
        patches = x.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        return nn.functional.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def multiply_patches(backbone: nn.Module) -> None:
    """Make a backbone's patch projection a PatchProduct, in place, where it is such a convolution."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if type(projection) is nn.Conv2d and _windows_are_apart(projection):
        # The class alone: parameters stay the ones that an optimizer, a checkpoint or a hook knows.
        projection.__class__ = PatchProduct


def _windows_are_apart(convolution: nn.Conv2d) -> bool:
    plain = (convolution.padding, convolution.dilation, convolution.groups) == ((0, 0), (1, 1), 1)
    return plain and convolution.stride == convolution.kernel_size
