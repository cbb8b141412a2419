"""The GPUs of this machine, measured for a moment."""

from __future__ import annotations

import pytest
import torch

from autopar.runtime.profiler import device_type, profile
from cost_models import Collective, Profiled, Work
from cost_models.profiled import COLLECTIVE_KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_all_gpus_are_measured_together() -> None:
    devices = torch.cuda.device_count()
    assert device_type(devices) == "cuda"
    measured = profile(devices, seconds=3.0)
    costs = Profiled(measured)
    assert measured.device == torch.cuda.get_device_name()
    assert costs.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    n = 8192
    product = Work("matmul", "bfloat16", 2.0 * n**3, 6.0 * n**2, (1, n, n, n))
    assert 1e12 < product.flops / costs.compute_time_s(product) < 1e16
    for kind in COLLECTIVE_KINDS if devices > 1 else ():
        assert costs.collective_time_s(Collective(kind, 2**24, devices, 1)) > 1e-6
