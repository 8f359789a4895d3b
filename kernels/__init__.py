# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Attention kernels; installed as `sparsed_vllm.kernels`."""
