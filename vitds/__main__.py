"""`python -m vitds`, the same as `vitds`."""

import sys

from vitds.cli import main

sys.exit(main())
