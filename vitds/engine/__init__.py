"""One training loop: DeepSpeed, schedule, resume, live logging."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # before deepspeed is imported: it asks once, and warns in every process
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read once; without it engine.deterministic is refused by cuBLAS
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # DeepSpeed calls collectives by their old names
