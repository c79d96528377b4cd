"""The code in the README runs as it is written, with fewer steps."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_readme(code, capsys):
    short = re.sub(r"epochs=\d+", "epochs=2", code)
    short = re.sub(r"num_samples=\d+", "num_samples=20", short)
    short = re.sub(r"temperatures=\d+", "temperatures=5", short)
    exec(compile(short, str(README), "exec"), {"__name__": "readme"})
    assert "nats per datum" in capsys.readouterr().out
