"""Features -> loss: the instance head (dense or row-sharded) and the class head."""

from vitds.heads.dense import DenseHead
from vitds.heads.logsumexp import linear_logsumexp
from vitds.heads.sharded import ShardedHead

__all__ = ["DenseHead", "ShardedHead", "linear_logsumexp"]
