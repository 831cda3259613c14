"""Fetches the browser libraries that the report page and the documentation bundle, from the npm registry.

To update one, change its version in the vendor.json beside it and run this. ``--check`` writes nothing and
fails where what is committed differs from the registry.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import ROOT

FOLDERS = (ROOT / "fxopt" / "report_html" / "vendor", ROOT / "docs" / "vendor")


def fetch(library: dict[str, Any]) -> dict[str, bytes]:
    """The files of one entry of vendor.json by the name that they have here.

    Raises:
        subprocess.CalledProcessError: npm cannot get the package. KeyError: it has no such file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted = f"{library['package']}@{library['version']}"
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", scratch, wanted], check=True)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as package:
            found = {}
            for inside, name in library["files"].items():
                member = package.extractfile(f"package/{inside}")
                assert member is not None, f"{wanted} has no file {inside}"
                found[name] = re.sub(rb"\n?//# sourceMappingURL=\S+\s*$", b"\n", member.read())
            return found


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, or compares them; the exit status is 1 where they differ."""
    parser = argparse.ArgumentParser(prog="tools/vendor", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(argv)
    differ = False
    libraries = [(folder, one) for folder in FOLDERS for one in json.loads((folder / "vendor.json").read_text())]
    for folder, library in libraries:
        for name, content in fetch(library).items():
            path = folder / name
            same = path.exists() and path.read_bytes() == content
            differ |= not same
            print(f"{library['package']} {library['version']}: {name}{'' if same else ' differs'}")
            if not options.check:
                path.write_bytes(content)
    return int(options.check and differ)


if __name__ == "__main__":
    sys.exit(main())
