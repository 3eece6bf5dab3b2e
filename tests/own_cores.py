"""Each process of the suite takes its share of the cores, for itself and all that it starts, before torch
counts them.

With all cores for each, threads wait in loops for such as the other process has put off, and trainings take
several times as long.
"""

import os

worker, workers = (os.environ.get(f"PYTEST_XDIST_{name}") for name in ("WORKER", "WORKER_COUNT"))
cores = sorted(os.sched_getaffinity(0))
if worker and int(workers) <= len(cores):
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: int(workers)])
