"""What a rank's device could do at best, where it is known.

A share of a peak means something only if the peak does: the vendor's figure for dense BF16 products, without
sparsity. Runs in FP8 are held against it too, as the reports of others are, so that a number above one half
does not hide that FP8 products could be twice as fast. Of a CPU nobody publishes such a figure;
`metrics.peak_tflops` takes one that was measured.
"""

import re

import torch

_TERA = 1e12
# Words of the device's name, all of which it has -> 10^12 dense BF16 operations a second, from data sheets of
# NVIDIA. The first entry that fits counts.
_PEAKS = (
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H100",), 989.4),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.4),
    (("GH200",), 989.4),
    (("B200",), 2250.0),
    (("H800", "PCIe"), 756.0),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
)


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """Operations a second that one rank's device reaches at best; None if nobody knows.

    Args:
        given_tflops: `metrics.peak_tflops`, which goes before what is known.
    """
    if given_tflops is not None:
        return given_tflops * _TERA
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(name: str) -> float | None:
    """Of a GPU by its name, such as `NVIDIA H100 80GB HBM3`."""
    words = re.split("[ -]", name)
    for known, tflops in _PEAKS:
        if all(word in words for word in known):
            return tflops * _TERA
    return None
