# SPDX-License-Identifier: Apache-2.0
"""Runs the Python program of a documentation page in a folder, and writes the page's C++ project there.

A C++ block is a file if its first line is a comment with a name; the first CMake block is the project's.

Usage: python save_page.py PAGE FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)

    def blocks(language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)

    (folder / "CMakeLists.txt").write_text(blocks("cmake")[0])
    for block in blocks("cpp"):
        named = re.match(r"// (\w+\.cpp)\n", block)
        if named:
            (folder / named[1]).write_text(block)
    (folder / "page.py").write_text("\n".join(blocks("python")))
    subprocess.run([sys.executable, "page.py"], check=True, cwd=folder)


if __name__ == "__main__":
    main()
