"""docs/training.md runs as shown and prints what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_blocks_run_as_one_program(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    program = [text for language, text in blocks if language == "python"]
    shown = [text for language, text in blocks if language == "text"]
    assert program
    assert shown
    script = tmp_path / "training.py"
    script.write_text("\n".join(program))
    # Its products are too small to share among threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(shown)
