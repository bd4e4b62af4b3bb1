"""What the phases share: a JSON file that is whole at any time, and the machine it is of."""

import argparse
import datetime
import gc
import importlib
import json
import platform
import subprocess
import time
from pathlib import Path

import torch


class Results:
    """A dictionary, ``found``, and its file; an interruption leaves the one before or after."""

    def __init__(self, path, found):
        self.path, self.found = path, found
        self.save()

    def save(self):
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.found, indent=1, default=str) + "\n")
        partial.replace(self.path)


def options_of_phase():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.seconds
    return options


def attempt(function, *arguments):
    """What the function returns, or {"error": why it does not}, with its memory given back."""
    try:
        return function(*arguments)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": "out of memory" if "out of memory" in message else message[:2000]}


def version(name):
    """A module's version, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(name), "__version__", "unknown")
    except ImportError:
        return None


def machine():
    gpu = {}
    if torch.cuda.is_available():
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        gpu = {
            "card": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "memory": torch.cuda.get_device_properties(0).total_memory,
            "driver": subprocess.getoutput(query),
        }
    return {
        **gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "PML": version("pytorch_metric_learning"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
