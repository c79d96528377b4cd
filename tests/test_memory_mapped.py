"""The example that fits a file runs, and says what it took."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "memory_mapped.py"


def test_memory_mapped():
    command = [sys.executable, str(EXAMPLE), "--rows", "8000", "--epochs", "1"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert "2 MB of data" in done.stdout
    assert re.search(r"\d+ MB of memory at most, \d+ for the fit", done.stdout)
