"""Pictures of any kind: where one can be drawn, and what is said before anything is computed where it cannot."""

import re
import sys

import pytest

from hf_s3t.analysis.pictures import check_picture
from hf_s3t.errors import ConfigError


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("drawn as .png or .svg, got 'a.pdf'")):
        check_picture(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="no folder that is there"):
        check_picture(tmp_path / "nowhere" / "a.png")
    check_picture(tmp_path / "nowhere" / "deeper" / "a.png", make_folder=True)
    assert not (tmp_path / "nowhere").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=re.escape('pip install -e ".[figures]"')):
        check_picture(tmp_path / "a.png")
