"""The examples run, with a few steps, and leave what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import xarray

import pyro_lvm as lvm

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = (
    "aggregate_posterior",
    "comparison",
    "mixture_means",
    "reconstructions",
    "samples",
    "training",
)


def test_digits(tmp_path):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--short", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "What the ELBO hides" in done.stdout
    assert done.stderr.strip() == ""  # nothing to worry a reader with
    assert "1297 training, 250 validation and 250 test images" in done.stdout
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert len(list(tmp_path.glob("*.nc"))) == 5
    assert not list(tmp_path.glob("*.part"))
    test = lvm.datasets.digits().test.numpy()  # what is scored is what was held out
    for path in tmp_path.glob("*.nc"):
        with xarray.open_datatree(path) as groups:
            np.testing.assert_array_equal(groups["observed_data"]["x"], test)
