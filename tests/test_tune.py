"""Tiles measured on a GPU: chosen by the clock (a made-up one here), written, and read by the launchers."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bertfast.benchmarks import tune  # noqa: E402
from bertfast.kernels import attention, hardware, rows  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from bertfast import cli  # noqa: E402
from bertfast.files import UserError, create_folder, write_json  # noqa: E402

GPU = "NVIDIA Example 1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "tuned_tiles", lambda: hardware.read_tiles(GPU))
    monkeypatch.setattr(tune, "TOKENS", 512)
    monkeypatch.setattr(tune, "VOCABULARY", 64)
    return tmp_path / "bertfast" / "tiles-nvidia-example-1.json"


def clock(call):
    """Eight warps are fast, more stages slow, 64 x 64 x 4 x 1 does not fit; two kernels win but under dropout; 8
    elements a thread are fast, more slow; of the other choices the first is the fastest."""
    key, tile = list(hardware.tuned_tiles().items())[-1]
    if not key.startswith("attention"):
        return tile[0] if isinstance(tile, list) else float(tile)
    if tile is None:
        return 0.0 if "no dropout" in key else 9.0
    if tile == [64, 64, 4, 1]:
        raise OutOfResources(1, 0, "shared memory")
    return 3.0 - (tile[2] == 8) + tile[3] / 10 + tile[0] / 1000


def test_the_fastest_tiles_are_written_and_taken(cache):
    shipped = attention.configuration("fwd", 90, 128, 2, False, 0), rows.row_tile("gelu_layer_norm_fwd", 128, 16)
    tune.tune(GPU, [64], [64], clock, "cpu")
    found = json.loads(cache.read_text())
    assert found["gpu"] == GPU and len(found["tiles"]) == 4 * 2 * 3 + 7 + 1
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        assert attention.configuration(kernel, 90, 64, 2, True, 1) == [32, 64, 8, 1]
    assert attention.configuration("bwd_whole", 90, 64, 2, False, 0) is None
    assert attention.configuration("bwd_whole", 90, 64, 2, True, 0) == [128, 64, 8, 1]
    assert attention.configuration("fwd", 90, 64, 4, False, 0) == (32, 64, 4, 1)  # fp32 is not tuned
    assert rows.row_tile("gelu_layer_norm_fwd", 64, 16) == (4, 64, 1)
    assert found["tiles"]["projection H64"] == [64, 128, 64, 4, 2]
    assert shipped == (attention.configuration("fwd", 90, 128, 2, False, 0),  # other sizes: as shipped
                       rows.row_tile("gelu_layer_norm_fwd", 128, 16))  # fmt: skip


EVERY_CANDIDATE = """
from bertfast.benchmarks import aot, tune
from bertfast.kernels import hardware

compiled, seen = aot.compile_only(90), {}

def clock(call):
    key, tile = list(hardware.tuned_tiles().items())[-1]
    if "attention" not in key or "D64 dropout mask 0" in key:
        call()
        made = str([(name, {k: v for k, v in options.items() if isinstance(v, int)}) for name, options, _ in compiled])
        assert made not in seen.setdefault(key, {}), f"{key}: {tile} launches what {seen[key][made]} does"
        seen[key][made] = tile
        compiled.clear()
    return 0.0

tune.tune("Example", [64], [768], clock, "cpu")
assert len(seen) == 4 + 7 + 1
print(sum(map(len, seen.values())), "launches differ")
"""


@pytest.mark.full
def test_every_candidate_compiles_and_reaches_its_kernels(tmp_path):
    """The real calls, the driver replaced as in benchmarks/aot.py; of attention the case that training has."""
    done = subprocess.run([sys.executable, "-c", EVERY_CANDIDATE], capture_output=True, text=True,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_tiles_of_other_versions_are_not_used(cache):
    tune.tune(GPU, [64], [64], clock, "cpu")
    cache.write_text(cache.read_text().replace(hardware.made_with()["triton"], "0.1"))
    with pytest.warns(UserWarning, match="other versions"):
        assert hardware.read_tiles(GPU) == {}
    for content in ("{", "[]", json.dumps(hardware.made_with())):
        cache.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            hardware.read_tiles(GPU)


def test_every_gpu_has_its_own_tiles(cache, monkeypatch):
    create_folder(cache.parent)
    write_json(cache, {"gpu": GPU, **hardware.made_with(), "tiles": {"cross_entropy": [64, 8]}})
    monkeypatch.setattr(torch.cuda, "get_device_name", ["Another", GPU].__getitem__)
    hardware.tiles_of.cache_clear()
    assert [hardware.tiles_of(device) for device in (0, 1)] == [{}, {"cross_entropy": [64, 8]}]
    hardware.tiles_of.cache_clear()


def test_a_kernel_without_a_tile_is_an_error():
    def never(_):
        raise OutOfResources(1, 0, "registers")

    with pytest.raises(UserError, match="no tile of attention fwd D64"):
        tune.tune(GPU, [64], [64], never, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bertfast", "bench", "tune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "bertfast: no GPU was found here: tune times the kernels on one\n"
