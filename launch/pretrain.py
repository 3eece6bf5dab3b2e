"""`deepspeed launch/pretrain.py ...` or `python launch/pretrain.py ...`: the same as `vitds pretrain ...`."""

import sys

from vitds.cli import main

# DeepSpeed's launcher adds --local_rank=R, which it also puts into the environment.
sys.exit(main(["pretrain", *(word for word in sys.argv[1:] if not word.startswith("--local_rank="))]))
