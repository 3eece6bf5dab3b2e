"""The error tree: one clear message, and the exit code that ends the process.

VitdsError                  1
├── UsageError              2   a word on the command line: unknown flag, command, missing value
├── SettingsError           2   a recipe, a setting, a DeepSpeed JSON: unknown key, bad value, contradiction
├── DataError               3   an image, a folder, a .beton file
├── ShapeError              4   tensors, weights or backbones that do not fit together
├── RunError                5   a run directory, a checkpoint, a resume
│   └── RunLockedError      5   the run directory has another writer
├── ResourceError           6   disk, memory, port, library or device missing
├── NumericsError           7   a loss or gradient that is not finite
└── Stopped               75   ended on a signal with everything saved; start the same command again (75 is
sysexits' EX_TEMPFAIL)

A message says what is wrong, where (file, key, line, value), and what to do. `cli` prints it as one line;
`--debug` shows the traceback.
"""


class VitdsError(Exception):
    """Base of all errors that are shown to a person as a message without a traceback."""

    exit_code = 1
    is_reported_by_main = False  # True on ranks that end for what went wrong on rank 0, which tells it


class UsageError(VitdsError):
    """A command line that names something that does not exist, or leaves out something needed."""

    exit_code = 2


class SettingsError(VitdsError):
    """A setting, recipe or DeepSpeed configuration that is unknown, out of range or contradictory."""

    exit_code = 2


class DataError(VitdsError):
    """An image, folder, archive or .beton file that cannot be used."""

    exit_code = 3


class ShapeError(VitdsError):
    """Tensors, weights or models whose sizes do not fit together."""

    exit_code = 4


class RunError(VitdsError):
    """A run directory, checkpoint or resume that cannot be used."""

    exit_code = 5


class RunLockedError(RunError):
    """A run directory that another process writes to."""


class ResourceError(VitdsError):
    """Something the machine lacks: disk, memory, a free port, a library, a device."""

    exit_code = 6


class NumericsError(VitdsError):
    """A loss or gradient that is not finite."""

    exit_code = 7


class Stopped(VitdsError):
    """Training ended on request (a signal) after saving; the same command goes on from there."""

    exit_code = 75
