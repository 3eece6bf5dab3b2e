"""The main job on embedded data; see vitds/jobs/quickstart.py."""

import sys

from vitds.console import run_command
from vitds.jobs.quickstart import quickstart

sys.exit(run_command({"quickstart": quickstart}, ["quickstart", *sys.argv[1:]]))
