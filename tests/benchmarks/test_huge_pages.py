import re

import pytest

from benchmarks import huge_pages

TINY = {"d_model": 4, "n_layers": 1}


@pytest.mark.parametrize("network", ["isotropic_s4nd", "isotropic_conv2d"])
def test_a_process_prints_its_seconds(network, monkeypatch, capsys):
    monkeypatch.setitem(huge_pages.NETWORKS, "tiny", (network, 8, TINY))
    monkeypatch.setattr(huge_pages, "BATCH", 2)
    huge_pages.measure_one("tiny")
    (seconds,) = re.findall(r"^seconds=(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert 0 < float(seconds) < 60
