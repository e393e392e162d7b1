"""Where the tests of GPU kernels run: on a GPU if torch sees one, else on CPU tensors, interpreted."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
