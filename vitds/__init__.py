"""Train Vision Transformers from scratch on the images you have.

`vitds.pretrain(...)`, `vitds.finetune(...)` and `vitds.evaluate(...)` are the functions that the command line calls; each is imported
when it is first used, so that `import vitds` loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitds.jobs.evaluate import evaluate
    from vitds.jobs.train import finetune, pretrain

__version__ = "0.1.0"
__all__ = ["evaluate", "finetune", "pretrain"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"vitds.jobs.{name}"), name)
    raise AttributeError(f"module 'vitds' has no attribute {name!r}")


class _Front(ModuleType):
    """The package `vitds.evaluate` must not take the place of the function: importing a package sets it on its parent."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
