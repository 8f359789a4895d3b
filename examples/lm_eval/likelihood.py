# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""lm-eval with a model that scores given answers: multiple choice such as MMLU and ARC.

    python examples/lm_eval/likelihood.py run --model sparsed \\
      --model_args pretrained=GSAI-ML/LLaDA-8B-Base,mc_num=1 --tasks mmlu --num_fewshot 5

All else is lm-eval's command line. Needs vLLM and lm_eval in one environment.
"""

import os
import sys
from pathlib import Path
from typing import Any

# The engine runs in this process, so that functions reach its workers unpickled.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.append(str(Path(__file__).parent))

import estimates
from estimates import Estimate, Text
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from passes import PassScorer
from tqdm import tqdm
from vllm import LLM

QUESTIONS_AT_ONCE = 64  # whose passes share batches

Question = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: prompt and answer as text, and the ids of each."""


@register_model("sparsed")
class Likelihoods(TemplateLM):
    """Answers what lm-eval calls loglikelihood, by LLaDA's estimate or iLLaDA's score."""

    def __init__(
        self,
        pretrained: str,
        *,
        llh: str = "mc",
        mc_num: int = 128,
        cfg: float = 0.0,
        is_check_greedy: bool = False,
        add_bos_token: bool = False,
        padd_eos: bool = False,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **engine: Any,
    ) -> None:
        """The authors' names, and for all others vLLM's.

        llh: `mc` or `confidence`;  mc_num, seed: samples of `mc`, and what they are drawn with
        is_check_greedy: also say whether greedy decoding gives the answer, which no multiple
            choice asks
        add_bos_token, padd_eos: show BOS before the prompt, EOS behind the answer
        batch_size, max_batch_size: lm-eval's, to be left alone
        device: lm-eval's, which names one unasked: vLLM finds its own
        Raises ValueError for what cannot be used.
        """
        super().__init__()
        _check(llh, mc_num, cfg)
        if str(batch_size) != "1" or max_batch_size is not None:
            raise ValueError(
                f"--batch_size must be 1 and --max_batch_size absent, got {batch_size} and "
                f"{max_batch_size}: batches are filled to max_num_batched_tokens, in --model_args."
            )
        self.llh, self.mc_num, self.seed = llh, mc_num, seed
        self.is_check_greedy, self.add_bos_token = is_check_greedy, add_bos_token
        llm = LLM(pretrained, **{"enforce_eager": True, **engine})
        self.max_length: int = llm.llm_engine.vllm_config.model_config.max_model_len
        self.tokenizer = llm.get_tokenizer()
        self.suffix = (self.tokenizer.eos_token_id,) if padd_eos else ()
        self.score = PassScorer(llm, cfg)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The prompt where a task gives none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's caches of prompts apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        special = add_special_tokens is None or add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if special and self.add_bos_token and ids[:1] != [bos] else ids

    def _loglikelihood_tokens(
        self, requests: list[Question], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._text(*ids) for _, *ids in requests]
        done: list[tuple[float, bool]] = []
        with tqdm(total=len(texts), desc="Likelihoods", disable=disable_tqdm) as progress:
            for start in range(0, len(texts), QUESTIONS_AT_ONCE):
                part = texts[start : start + QUESTIONS_AT_ONCE]
                for result in self._results(part):
                    # What --use_cache keeps, so that the same command goes on.
                    request = requests[len(done)][0]
                    self.cache_hook.add_partial("loglikelihood", request, result)
                    done.append(result)
                progress.update(len(part))
        return done

    def _text(self, prompt: list[int], answer: list[int]) -> Text:
        text = Text(tuple(prompt), tuple(answer), self.suffix)
        length = sum(map(len, text))
        if not answer or length > self.max_length:
            raise ValueError(
                f"A prompt and its answer must have 1 to {self.max_length} tokens, the answer at "
                f"least one; got {length} and {len(answer)}. Use fewer --num_fewshot, or a larger "
                "max_model_len in --model_args."
            )
        return text

    def _results(self, texts: list[Text]) -> list[tuple[float, bool]]:
        scores = estimates.run([self._estimate(text) for text in texts], self.score)
        greedy = [False] * len(texts)
        if self.is_check_greedy:
            mask = self.score.mask_token_id
            greedy = estimates.run([estimates.is_greedy(t, mask) for t in texts], self.score)
        return list(zip(scores, greedy, strict=True))

    def _estimate(self, text: Text) -> Estimate[float]:
        mask_token_id = self.score.mask_token_id
        if self.llh == "confidence":
            return estimates.confidence(text, mask_token_id)
        return estimates.monte_carlo(text, mask_token_id, self.mc_num, self.seed)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("Whole texts are not scored: the authors define no such score.")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("Answers are only scored here; `vllm serve` writes them.")


def _check(llh: str, mc_num: int, cfg: float) -> None:
    if llh not in ("mc", "confidence"):
        raise ValueError(f"llh must be mc or confidence, got {llh!r}.")
    if not isinstance(mc_num, int) or mc_num < 1:
        raise ValueError(f"mc_num must be a whole number of at least 1, got {mc_num!r}.")
    if not isinstance(cfg, (int, float)) or cfg < 0:
        raise ValueError(f"cfg must be a number of at least 0, got {cfg!r}; 0 is no guidance.")


if __name__ == "__main__":
    cli_evaluate()
