"""The process in which one method is trained: `python -m foreword.compare.worker job.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: str) -> int:
    """Train the method that the job in `path` describes; its result is `trained.json` beside it."""
    from foreword.compare.training import INTERRUPTED, Job, load_for, train_method
    from foreword.train.loop import TrainingInterrupted

    job = Job.from_json(json.loads(Path(path).read_bytes()))
    try:
        train_method(load_for(job), job)
    except (KeyboardInterrupt, TrainingInterrupted):
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
