"""Peaks are those of data sheets, by the name that the driver gives; memory is what the kernel says."""

import psutil
import pytest
import torch

from moe_runtime.metrics.memory import alloc_retries, peak_bytes
from moe_runtime.metrics.utilisation import known_peak, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, tflops: float) -> None:
    assert known_peak(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "AMD Instinct MI300X", "NVIDIA H1000", ""])
def test_nobody_makes_up_the_peak_of_another(name: str) -> None:
    assert known_peak(name) is None


def test_a_peak_that_is_given_goes_first_and_a_cpu_has_no_other() -> None:
    assert peak_flops(CPU, None) is None and peak_flops(CPU, 0.085) == pytest.approx(85e9)


def test_the_peak_of_resident_memory_is_never_below_what_is_resident() -> None:
    held = torch.ones(32 * 2**20, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    assert peak_bytes(CPU) >= 0.99 * resident  # the two are read one after the other
    assert held.numel() < peak_bytes(CPU) < psutil.virtual_memory().total and alloc_retries(CPU) == 0
