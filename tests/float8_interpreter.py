"""Makes Triton's interpreter round to float8 as GPUs do.

It adds the first bit that is cut off to the mantissa alone: a number that rounds up to the next
power of two becomes the one below, and a tie always rounds up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_float8(patch: pytest.MonkeyPatch) -> None:
    """Convert float32 to e4m3 by PyTorch, saturating, until the patch is undone."""
    convert = interpreter._convert_float

    def exactly(x: Any, before: Any, after: Any, rounding: Any) -> Any:
        if before != tl.float32 or after != tl.float8e4nv:
            return convert(x, before, after, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32)).clamp(-448.0, 448.0)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(x.shape)

    patch.setattr(interpreter, "_convert_float", exactly)
