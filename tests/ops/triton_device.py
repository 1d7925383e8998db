"""Where the Triton kernels are tested: on a GPU if there is one, else by Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


# Before 3.7 the interpreter takes the bounds of a loop as NumPy 2.4 no longer gives them.
_CAN_INTERPRET = _version(triton.__version__) >= (3, 7) or _version(np.__version__) < (2, 4)

# Among the tests that need a GPU where there is one, like any other on a CPU.
MARKS = (
    [pytest.mark.gpu]
    if HAS_GPU
    else [
        pytest.mark.skipif(
            not _CAN_INTERPRET,
            reason=f"Triton {triton.__version__} cannot interpret with NumPy {np.__version__}",
        )
    ]
)
