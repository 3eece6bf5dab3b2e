"""The main job on embedded data; see vitds/jobs/quickstart.py."""

import fire

from vitds.jobs.quickstart import quickstart

if __name__ == "__main__":
    fire.Fire(quickstart, serialize=lambda numbers: "")
