# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Other people's loops with caches, run from their checkouts. Needs torch and numpy alone."""
