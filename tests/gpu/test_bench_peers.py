"""What can be held of the peers' benchmark without a peer: layouts, comparisons, a line for each failure."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from bench.gpu import peers
from bench.gpu.peers import Peer
from runtime.weights.formats import TensorType
from runtime.weights.planar import from_gguf_bytes


def refuse(*_: object) -> None:
    raise RuntimeError("no kernel for this shape\nand a long story")


def sound(kind: str, n: int, k: int) -> peers.Product:
    weight = torch.eye(n, k)
    return (lambda x: x @ weight.t()), (lambda: weight[-peers.CHECKED :])


@pytest.mark.parametrize("kind", peers.BLOCKS)
def test_random_blocks_are_the_formats(kind: str) -> None:
    blocks = peers.random_blocks(kind, 24, 1024, "cpu")
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (24, 1024 // 256 * TensorType(kind).block_bytes)
    gguf = pytest.importorskip("gguf")  # not asked for on a machine with a GPU
    wanted = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert abs(wanted).max() < 1.5
    assert wanted.std() > 1e-3
    weight = from_gguf_bytes(blocks, kind, 24, 1024).dequantize()
    torch.testing.assert_close(weight, torch.from_numpy(wanted))


def test_int4_weights_are_codes_less_zeros_times_scales() -> None:
    codes, scales, zeros, dense = peers.int4(peers.CHECKED + 8, 256, torch.float16, "cpu")
    found = dense()
    assert codes.max() == 15 and found.shape == (peers.CHECKED, 256)
    for row, column in ((0, 0), (3, 127), (200, 128), (255, 255)):
        at = row + 8, column // 128
        wanted = (int(codes[row + 8, column]) - float(zeros[at])) * float(scales[at])
        assert float(found[row, column]) == pytest.approx(wanted)


def test_wrong_results_are_not_timed() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(300, 64)
    y, last = x @ weight.t(), weight[-peers.CHECKED :]
    peers.check(y, x, last)
    peers.check(y.bfloat16(), x, last)
    for wrong in (y.flip(0), y.roll(1, 1), y * 1.05, y * float("nan")):
        with pytest.raises(ValueError, match=r"wrong results for \(4, 64\) x 300"):
            peers.check(wrong, x, last)


def test_a_peer_that_is_absent_or_raises_says_so_in_one_line(capsys: pytest.CaptureFixture) -> None:
    absent = partial(importlib.import_module, "no_such_package")
    listed = [
        Peer("first", "no-such", ("int4",), absent, sound),
        Peer("second", "no-such", ("int4",), refuse, sound),
        Peer("third", "no-such", ("other",), refuse, sound),
        Peer("fourth", "no-such", ("int4", "other"), int, sound),
    ]
    assert peers.available(["int4"], listed) == [listed[3]]
    assert capsys.readouterr().err.splitlines() == [
        "first: not installed: No module named 'no_such_package'",
        "second: no kernel for this shape",
    ]


def test_a_figure_that_raises_leaves_its_column_out(capsys: pytest.CaptureFixture) -> None:
    assert peers.figure("quick_us", lambda: 0.0123) == {"quick_us": 12.3}
    assert peers.figure("slow_us", refuse) == {}
    assert capsys.readouterr().err == "slow: no kernel for this shape\n"


def test_columns_are_of_the_format_and_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "timed", lambda peer, *_: 0.001 * len(peer.name))
    found = partial(peers.beside, peers.PEERS, n=512, k=512, copies=1, repeats=1)
    assert set(found("int4 g128", tokens=1)) == {"tinygemm_us", "gemlite_us", "humming_us"}
    assert found("Q4_K", tokens=16) == {"gguf_vec_us": 8.0, "gguf_us": 4.0}
    assert set(found("Q6_K", tokens=17)) == {"gguf_us"}
    assert found("Q5_K", tokens=1) == {}


def test_the_best_peer_is_the_quickest_one() -> None:
    row = {"us": 20.0, "a_us": 30.0, "b_us": 25.0, "bf16_us": 10.0}
    assert peers.against("best", row, ["a_us", "b_us", "c_us"]) == {"best": 1.25}
    assert peers.against("best", row, ["c_us"]) == {}
    assert peers.against("best", row, peers.DISTRIBUTIONS) == {}


def test_versions_are_of_what_was_measured() -> None:
    rows = [{"us": 1.0, "a_us": 1.0}, {"b_us": 2.0}]
    named = {"a_us": "torch", "b_us": "no-such-distribution", "c_us": "numpy"}
    found = peers.versions(rows, named)
    assert found["no-such-distribution"] == "unknown"
    assert set(found) == {"torch", "no-such-distribution"} and found["torch"][0].isdigit()


def test_operators_are_looked_for_without_importing_the_plugin(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm_gguf_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="without compiled operators"):
        peers.gguf_operators()
    (package / "_C_gguf.abi3.so").write_bytes(b"no library")
    with pytest.raises(OSError):
        peers.gguf_operators()
