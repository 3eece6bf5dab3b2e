"""What a resolved engine.precision means to autocast."""

from __future__ import annotations

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32 is not in it: no autocast
