"""Tiles measured on a GPU: chosen by the clock (a made-up one here), written, and read by the launchers."""

import json

import pytest
import torch

pytest.importorskip("triton")

from bertfast.benchmarks import tune  # noqa: E402
from bertfast.kernels import attention, hardware  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from bertfast import cli  # noqa: E402
from bertfast.files import UserError  # noqa: E402

GPU = "NVIDIA Example 1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attention, "tuned_tiles", lambda: hardware.read_tiles(GPU))
    return tmp_path / "bertfast" / "tiles-nvidia-example-1.json"


def clock(kernel, tiles, head_size, dropout, mask_mode):
    """Eight warps are fast, more stages slow, 64 x 64 x 4 x 1 does not fit; two kernels win but under dropout."""
    tile = tiles[hardware.tile_key(kernel, head_size, dropout, mask_mode)]
    if kernel == "bwd_whole" and tile is None:
        return 9.0 if dropout else 0.0
    assert kernel == "bwd_whole" or tiles[hardware.tile_key("bwd_whole", head_size, dropout, mask_mode)] is None
    if tile == [64, 64, 4, 1]:
        raise OutOfResources(1, 0, "shared memory")
    return 3.0 - (tile[2] == 8) + tile[3] / 10 + tile[0] / 1000


def test_the_fastest_tiles_are_written_and_taken(cache):
    shipped = attention.configuration("fwd", 90, 128, 2, False, 0)
    tune.tune(GPU, [64], clock)
    found = json.loads(cache.read_text())
    assert found["gpu"] == GPU and len(found["tiles"]) == 4 * 2 * 3
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        assert attention.configuration(kernel, 90, 64, 2, True, 1) == [32, 64, 8, 1]
    assert attention.configuration("bwd_whole", 90, 64, 2, False, 0) is None
    assert attention.configuration("bwd_whole", 90, 64, 2, True, 0) == [128, 64, 8, 1]
    assert attention.configuration("fwd", 90, 128, 2, False, 0) == shipped  # another head size: the table
    assert attention.configuration("fwd", 90, 64, 4, False, 0) == (32, 64, 4, 1)  # fp32 is not tuned


def test_tiles_of_other_versions_are_not_used(cache):
    tune.tune(GPU, [64], clock)
    cache.write_text(cache.read_text().replace(hardware.made_with()["triton"], "0.1"))
    with pytest.warns(UserWarning, match="other versions"):
        assert hardware.read_tiles(GPU) == {}
    cache.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        hardware.read_tiles(GPU)


def test_a_kernel_without_a_tile_is_an_error():
    def never(*_, **__):
        raise OutOfResources(1, 0, "registers")

    with pytest.raises(UserError, match="no tile of fwd D64"):
        tune.tune(GPU, [64], never)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bertfast", "bench", "tune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "bertfast: no GPU was found here: tune times the kernels on one\n"
