"""The one door to FFCV: import its names from here.

`import ffcv` has side effects on the whole process, which are undone here, once.

- It sets torch to one thread, and its loader does so again at each epoch, from a thread. Training on a CPU
  would crawl, and torch's thread number decides the last bits of sums. `Compiler.set_num_threads` is replaced
  by one that leaves torch alone.
- It keeps two constants in a numba dictionary, which takes 2.6 s to compile at every start. A plain one
  serves them as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import cpu_count
from unittest.mock import patch

import numba
import torch

_threads = torch.get_num_threads()
with patch("numba.typed.Dict", dict):
    import ffcv
    import ffcv.fields
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
torch.set_num_threads(_threads)

__all__ = [
    "IS_CUDA",
    "AllocationQuery",
    "Compiler",
    "EpochIterator",
    "Graph",
    "OSCacheContext",
    "Operation",
    "PipelineSpec",
    "RandomResizedCropRGBImageDecoder",
    "Reader",
    "State",
    "ffcv",
    "imdecode",
    "uncompiled",
]


def _set_num_threads(compiler: type[Compiler], threads: int) -> None:
    """FFCV's own, without its torch.set_num_threads, and for as many threads as one likes: numba takes no
    more than there are cores.
    """
    compiler.num_threads = threads if threads > 0 else cpu_count()
    numba.set_num_threads(min(compiler.num_threads, numba.config.NUMBA_NUM_THREADS))


Compiler.set_num_threads = classmethod(_set_num_threads)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Pipelines generated inside run as the Python they are written in: FFCV's own switch."""
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(True)
