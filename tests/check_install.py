"""Whether pip resolves every extra on every supported Python and platform; nothing is installed.

pip's options choose the wheels of another Python or platform, but it evaluates the markers of
dependencies, such as ``python_version < "3.11"``, for the Python that runs it; here they are given
the values of the other. A machine's own settings of pip, such as indexes and wheels on its disk,
are left out.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent


def linux(machine):
    """Markers and wheel tags; glibc 2.28 is the oldest that torch runs on."""
    markers = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine}
    return markers, [
        *(f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)),
        f"manylinux2014_{machine}",
    ]


MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
PLATFORMS = {  # torch has no wheels for other Macs since 2.3
    "Linux x86-64": linux("x86_64"),
    "Linux arm64": linux("aarch64"),
    "macOS arm64": (MACOS, ["macosx_14_0_arm64"]),
}
FROM_SOURCE = ["antlr4-python3-runtime==4.9.*"]  # of hydra: pure Python, published without a wheel
PIP = """
import json, sys
from pip._vendor.packaging import markers
here, there = markers.default_environment, json.loads(sys.argv.pop(1))
markers.default_environment = lambda: {**here(), **there}
from pip._internal.cli.main import main
sys.exit(main())
"""


def complaint(python, wheel, extras, version, platform):
    """What pip says against these extras there; empty if it can install them."""
    markers, tags = PLATFORMS[platform]
    markers = {**markers, "python_version": version, "python_full_version": f"{version}.0"}
    command = [python, "-c", PIP, json.dumps(markers), "install", "--isolated", "--quiet"]
    command += ["--dry-run", "--target", wheel.parent / "nothing", "--only-binary=:all:"]
    # Where an index has no metadata of its own, the end of a wheel is read and not all of it.
    command += ["--use-feature=fast-deps", "--find-links", wheel.parent]
    command += ["--python-version", version]
    command += [f"--platform={tag}" for tag in tags]
    command += ["-c", ROOT / "constraints.txt", f"{wheel}[{','.join(extras)}]"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr.strip() or "pip failed" if result.returncode else ""


def main():
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        del os.environ[name]
    os.environ["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, upgrade_deps=True)
        python = Path(folder, "bin", "python")
        build = [python, "-m", "pip", "wheel", "--isolated", "--quiet", "--no-deps", "-w", folder]
        subprocess.run([*build, ROOT, *FROM_SOURCE], check=True)
        (wheel,) = Path(folder).glob("angular_losses*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            metadata = message_from_bytes(archive.read(name))
        extras = metadata.get_all("Provides-Extra")
        classifiers = (value.rpartition(" :: ") for value in metadata.get_all("Classifier"))
        versions = [
            last for first, _, last in classifiers if first.endswith("Python") and "." in last
        ]
        print(f"pip install of the extras {', '.join(extras)}", flush=True)
        failed = False
        with ThreadPoolExecutor(4) as pool:
            cells = list(product(versions, PLATFORMS))
            # What resolves for all extras together does for each.
            found = pool.map(lambda cell: complaint(python, wheel, extras, *cell), cells)
            for cell, text in zip(cells, found, strict=True):
                print("Python {}, {}: ".format(*cell) + ("fails" if text else "ok"), flush=True)
                if not text:
                    continue
                failed = True
                for extra in extras:
                    if text := complaint(python, wheel, [extra], *cell):
                        print(f"[{extra}] {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
