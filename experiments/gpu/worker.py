"""One job in a process of its own: python -m experiments.gpu.worker SETTINGS JOB END FILE, as the queue starts it."""

import json
import logging
import sys
import time
import warnings

from continuum.files import write_json
from experiments.gpu.jobs import Settings
from experiments.gpu.parts import all_parts


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    text, name, end, path = sys.argv[1:]
    parts = all_parts(Settings(**json.loads(text)))
    (job,) = (job for part in parts for job in part.jobs if job.name == name)
    write_json(job.measure(float(end) - time.time()), path)


if __name__ == "__main__":
    main()
