# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""NaN to 0 in place, in rows that lie among others."""

import math

import pytest
import torch
from kernel_cases import DEVICE

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.drop_nans import drop_nans


@pytest.mark.parametrize("drop", [drop_nans, api.drop_nans])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_nan_becomes_0_and_nothing_else_changes(drop, num_rows, dtype):
    whole = torch.randn(num_rows, 5, 32, dtype=dtype)
    whole[num_rows // 2 :, 1, 3] = math.nan
    whole[: num_rows // 2, 2] = math.inf
    whole[:1, 0] = whole[:1, 4] = math.nan  # beside the rows that are given
    expected = whole.clone()
    reference.drop_nans(expected[:, 1:4])
    given = whole.to(DEVICE)
    drop(given[:, 1:4])
    assert not expected[:, 1:4].isnan().any()
    assert torch.equal(given.cpu().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
