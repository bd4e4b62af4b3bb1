"""The phase "works": tests/device on the device, each outcome written as soon as it is known."""

import sys

import pytest

from benchmarks.gpu.results import Results, options_of_phase


class Recorder:
    def __init__(self, results):
        self.results = results

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            counts = self.results.found["counts"]
            counts[report.outcome] = counts.get(report.outcome, 0) + 1
        if report.outcome == "failed":
            self.results.found["failed"][report.nodeid] = report.longreprtext[-4000:]
        if report.outcome == "skipped":
            self.results.found["skipped"][report.nodeid] = str(report.longrepr[-1])
        self.results.found["seconds"] += report.duration
        self.results.save()


def main():
    options = options_of_phase()
    found = {"counts": {}, "failed": {}, "skipped": {}, "seconds": 0.0}
    arguments = ["tests/device", f"--device={options.device}", "-q", "--tb=short", "-p"]
    # A warning that only a GPU gives is no failure here; it is printed. The project's own options
    # ask for plugins that the machine may lack.
    arguments += ["no:cacheprovider", "-W", "default", "-o", "addopts=--import-mode=importlib"]
    sys.exit(pytest.main(arguments, plugins=[Recorder(Results(options.out, found))]))


if __name__ == "__main__":
    main()
