"""Run every drill and write their counts for the report: python -m tests.brain_tumor.faults."""

from pathlib import Path
from tempfile import TemporaryDirectory

from examples.brain_tumor.files import write_json
from examples.brain_tumor.report.records import DRILLS

from .drills import run_drills

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        write_json(DRILLS, run_drills(Path(folder)))
