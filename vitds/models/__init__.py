"""Backbones: timm's, asked what they are, built whole from the seed, their drop path and patch drop keyed.

T2T-ViT, which timm lacks, is registered there with the import of this package.
"""

import vitds.models.t2t  # noqa: F401  (for its registering)
