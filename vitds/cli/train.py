"""`vitds pretrain` and `vitds finetune`: one run."""

from __future__ import annotations

from vitds.config.flags import TrainFlags
from vitds.words import takes


@takes(TrainFlags)
def pretrain(flags: TrainFlags) -> None:
    """Pretrain a backbone on images without labels.

    The recipe says by which method; without one it is parametric instance discrimination, where each image is
    its own class.

    Without flags: the embedded digits and their recipe, a few minutes on a CPU. The same command with --run
    goes on from the newest sound checkpoint. On several GPUs: deepspeed launch/pretrain.py with the same
    flags. With --test, and labels in both files, nearest neighbours are counted at the end.
    """
    from vitds.jobs.train import train

    train("pretrain", flags)


@takes(TrainFlags)
def finetune(flags: TrainFlags) -> None:
    """Train a backbone on labelled images, from a pretrained run or from scratch.

    The same command with --run goes on from the newest sound checkpoint. On several GPUs: deepspeed
    launch/finetune.py with the same flags. Top-1 and top-5 on --test are measured at the end.
    """
    from vitds.jobs.train import train

    train("finetune", flags)
