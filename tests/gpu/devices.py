"""The same test on the CPU, everywhere, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = [pytest.mark.gpu, NEEDS_CUDA]
DEVICES = ["cpu", pytest.param("cuda:0", marks=ON_GPU)]
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES, scope="module", ids=["cpu", "cuda"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
