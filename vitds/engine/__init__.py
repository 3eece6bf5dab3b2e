"""One training loop: DeepSpeed, schedule, resume, live logging."""

import os
import warnings

import torch

# Before deepspeed is imported: it asks once. It has to take the device that torch takes, whatever is left in
# the environment, and where it finds no GPU by itself it warns in every process.
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
# Read once; without it engine.deterministic is refused by cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# DeepSpeed calls collectives by their old names.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
