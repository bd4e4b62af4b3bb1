"""Check the built site in a real browser: `make docs-test`.

    python -m tests.docs.site [--screenshots FOLDER] [PAGE ...]

Needs Chromium (or CHROMIUM, its path) and Node.js with npm, which installs playwright-core and
axe-core beside this file once. The site is served on loopback; nothing else may be asked for.
"""

import argparse
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from tests.docs.site.explorer import expected

HERE = Path(__file__).parent
SITE = HERE.parents[2] / "docs" / "_build" / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.docs.site")
    parser.add_argument("--screenshots", type=Path, help="where to put a picture of each page type")
    parser.add_argument("pages", nargs="*", help="such as reference/losses.html; all by default")
    arguments = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    for name, found in (("Chromium", chromium), ("Node.js", shutil.which("node"))):
        if not found:
            sys.exit(f"{name} is not installed; the site was not checked")
    if not (SITE / "index.html").exists():
        sys.exit("the site is not built: run `make docs` first")
    if not (HERE / "node_modules" / "axe-core").exists():
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(install, cwd=HERE, check=True)
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (HERE / "expected.json").write_text(json.dumps(expected()))
    address = f"http://127.0.0.1:{server.server_port}/"
    command = ["node", str(HERE / "check.mjs"), chromium, address, str(SITE), *arguments.pages]
    environment = dict(os.environ)
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
        environment["SCREENSHOTS"] = str(arguments.screenshots.resolve())
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
