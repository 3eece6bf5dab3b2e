"""`deepspeed launch/finetune.py ...` or `python launch/finetune.py ...`: the same as `vitds finetune ...`."""

import sys

from vitds.cli import main

# DeepSpeed's launcher adds --local_rank=R, which it also puts into the environment.
sys.exit(main(["finetune", *(word for word in sys.argv[1:] if not word.startswith("--local_rank="))]))
