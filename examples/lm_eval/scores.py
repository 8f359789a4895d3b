# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The scoring functions of lm-eval's RULER and LongBench, under names that a task file can give."""

from lm_eval.tasks.longbench.metrics import get_qa_f1_with_score
from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results

__all__ = ["aggregate_metrics", "get_qa_f1_with_score", "process_results"]
