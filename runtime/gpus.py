"""What `tramontane plan` knows of GPUs: a few constants each, and where every one of them is from.

Datasheet: NVIDIA's, per GPU, dense rates (without sparsity), bytes and bits in powers of ten. Measured: by
this project, on one machine, as a copy in memory and as a large bf16 product. Memory is the datasheet's,
which is a little less than what a driver reports.
"""

from __future__ import annotations

from dataclasses import dataclass

DATASHEET = "datasheet"
MEASURED = "measured"
ASSUMED = "assumed"


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that a prediction stands on. `source` begins with DATASHEET, MEASURED or ASSUMED."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: Constant
    bandwidth: Constant
    flops: Constant  # fp16 or bf16 inputs, fp32 sums
    link: Constant  # to the other GPUs of its node, each direction
    exchange: Constant  # what one exchange between ranks takes, however small


def _memory(gigabytes: float) -> Constant:
    return Constant(gigabytes * 1e9, "B", DATASHEET)


def _bandwidth(terabytes: float, source: str = DATASHEET) -> Constant:
    return Constant(terabytes * 1e12, "B/s", source)


def _flops(tera: float, source: str = DATASHEET) -> Constant:
    return Constant(tera * 1e12, "FLOP/s", source)


def _nvlink(gigabytes: float) -> Constant:
    return Constant(gigabytes * 1e9, "B/s", f"{DATASHEET}, NVLink")


NETWORK_LATENCY = Constant(
    100e-6, "s", f"{ASSUMED}: off a GPU, through sockets of TCP in one data centre, onto a GPU"
)
_ON_NVLINK = Constant(20e-6, "s", f"{ASSUMED}: NCCL over NVLink is published at 17-24 us, one-shot at 7-10")
_ON_PCIE = Constant(40e-6, "s", f"{ASSUMED}: no NVLink, through PCIe")

_TABLE = (
    Gpu("A100-40", _memory(40), _bandwidth(1.555), _flops(312), _nvlink(300), _ON_NVLINK),
    Gpu("A100-80", _memory(80), _bandwidth(2.039), _flops(312), _nvlink(300), _ON_NVLINK),
    Gpu(
        "L40S",
        _memory(48),
        _bandwidth(0.864),
        _flops(362),
        Constant(32e9, "B/s", f"{DATASHEET}, PCIe 4.0 x16"),
        _ON_PCIE,
    ),
    Gpu(
        "H100",
        _memory(80),
        _bandwidth(3.0, f"{MEASURED} (copy, one machine; datasheet 3.35e12)"),
        _flops(989),
        _nvlink(450),
        _ON_NVLINK,
    ),
    Gpu(
        "H200",
        _memory(141),
        _bandwidth(4.3, f"{MEASURED} (copy; datasheet 4.8e12)"),
        _flops(790, f"{MEASURED} (bf16; datasheet 989e12)"),
        _nvlink(450),
        _ON_NVLINK,
    ),
    Gpu("B200", _memory(180), _bandwidth(8.0), _flops(2250), _nvlink(900), _ON_NVLINK),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}
OTHER_NAMES = {"H100-80": "H100", "H100-80GB": "H100", "A100-40GB": "A100-40", "A100-80GB": "A100-80"}
