"""Train Vision Transformers from scratch on the images you have.

`vitds.fit(...)` makes a model of a folder of images. `vitds.pretrain(...)`, `vitds.finetune(...)`,
`vitds.evaluate(...)` and `vitds.report(...)` are the functions that the command line calls.
`vitds.open_model(...)` opens a trained run to classify images. Each is imported when it is first used, so
that `import vitds` loads neither torch nor DeepSpeed.
"""

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing

if _typing.TYPE_CHECKING:
    from vitds.jobs.evaluate import evaluate
    from vitds.jobs.fit import fit
    from vitds.jobs.report import report
    from vitds.jobs.train import finetune, pretrain
    from vitds.use.model import open_model

__version__ = "0.1.0"
__all__ = ["evaluate", "finetune", "fit", "open_model", "pretrain", "report"]
_MODULES = {
    "evaluate": "vitds.jobs.evaluate",
    "finetune": "vitds.jobs.train",
    "fit": "vitds.jobs.fit",
    "open_model": "vitds.use.model",
    "pretrain": "vitds.jobs.train",
    "report": "vitds.jobs.report",
}


def __getattr__(name: str) -> _typing.Any:
    if name in _MODULES:
        return getattr(_importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'vitds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Front(_types.ModuleType):
    """Importing a package sets it on its parent: `vitds.evaluate` must not take the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__:
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Front
