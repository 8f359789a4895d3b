# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What one request asks of the denoising: parsed and checked once, then frozen."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sparsed_vllm.families import Family

MAX_STEPS_PER_TOKEN = 4
"""Steps allowed per token to generate: one each already unmasks a single place a step."""

GROWTH = 32
"""Places by which a canvas of variable length grows where the request does not say: iLLaDA's."""


@dataclass(frozen=True)
class DenoisingParams:
    """One request's denoising.

    num_tokens: places to fill (vLLM's max_tokens)
    steps: T of the papers, over all blocks
    block_length: places denoised together; blocks follow each other left to right
    policy: which masked places a step fills (one of the family's policies)
    threshold: if set, a step fills every place at least this sure, and the surest one
    by_entropy: what `threshold` is compared with: a place's entropy, negated, in nats, or (False)
        the token's probability
    temperature, top_p, top_k: how a token is drawn (0: the most likely one)
    alg_temp: Dream's randomness in the choice of places (0: none)
    eps: Dream's last timestep
    early_stop: give out blocks as they finish, so that EOS ends the request
    variable_length: no place sees a block that has not begun: the canvas grows block by block
    min_tokens: places, from the first, that take none of `stop_tokens`
    logprobs: alternatives to report beside each token's log probability; None: report nothing
    """

    num_tokens: int
    steps: int
    block_length: int
    policy: str
    threshold: float | None = None
    by_entropy: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    alg_temp: float = 0.0
    eps: float = 1e-3
    early_stop: bool = True
    variable_length: bool = False
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None


_MOST_SHOWN = 500  # characters of a bad value that an error repeats


def shown(value: object) -> str:
    """`value` as an error may repeat it: not without end."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"{type(value).__name__} of many digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def shown_name(name: object) -> str:
    """The same for the name of a parameter, which needs no quotes."""
    text = str(name)[:_MOST_SHOWN]
    return text.encode(errors="backslashreplace").decode()  # JSON may hold half a surrogate pair


class BadRequest(ValueError):
    """A request parameter that cannot be served; the message says what would be."""

    def __init__(self, field: str, value: object, allowed: str, remedy: str) -> None:
        super().__init__(f"{field} must be {allowed}, got {shown(value)}. {remedy}")
        self.field = field
        self.value = value


@dataclass(frozen=True)
class Field:
    """One request parameter in `extra_args` (offline) or `vllm_xargs` (HTTP).

    kind: turns what JSON or Python holds into our type, or raises ValueError
    accepts: whether a value of that type is in range
    allowed: the range in words
    remedy: what to do about a value outside it
    """

    kind: Callable[[Any], Any]
    accepts: Callable[[Any], bool]
    allowed: str
    remedy: str

    def parse(self, name: str, value: Any) -> Any:
        """`value` as our type. Raises BadRequest if it is another type or out of range."""
        try:
            parsed = self.kind(value)
        except ValueError:
            parsed = None
        if parsed is None or not self.accepts(parsed):
            raise BadRequest(name, value, self.allowed, self.remedy)
        return parsed


def integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def flag(value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def check_periods(given: Mapping[str, Any], names: Collection[str], num_steps: int) -> None:
    """What happens every so many steps fits into a request's. Raises BadRequest."""
    for name in names:
        if given.get(name, 1) > num_steps:
            allowed = f"an integer in [1, {num_steps}] (the request's steps)"
            raise BadRequest(name, given[name], allowed, "Lower it or leave it out.")


def request_fields(
    family: Family, num_tokens: int, max_steps: int | None = None
) -> dict[str, Field]:
    """The parameters a request to `family` may hold when it generates `num_tokens`.

    max_steps: the operator's limit, if there is one
    """
    most_steps, reason = MAX_STEPS_PER_TOKEN * num_tokens, f"{MAX_STEPS_PER_TOKEN} * max_tokens"
    if max_steps is not None and max_steps < most_steps:
        most_steps, reason = max_steps, "this server's limit"
    fields = {
        "steps": Field(
            integer,
            lambda n: 1 <= n <= most_steps,
            f"an integer in [1, {most_steps}] ({reason})",
            "Leave it out for one step a token, if that many are allowed.",
        ),
        "block_length": Field(
            integer,
            lambda n: 1 <= n <= num_tokens,
            f"an integer in [1, {num_tokens}] (max_tokens)",
            "Leave it out to denoise all places together.",
        ),
        family.policy_field: Field(
            word,
            lambda name: name in family.policies,
            f"one of {', '.join(family.policies)}",
            f"Leave it out for {family.policies[0]}.",
        ),
        "threshold": Field(
            number,
            lambda p: 0 < p <= 1,
            "a number in (0, 1]",
            "Leave it out to let steps set the pace.",
        ),
        "entropy_threshold": Field(
            number,
            lambda nats: 0 <= nats <= 100,
            "a number in [0, 100]",
            "Leave it out to let steps set the pace.",
        ),
        "early_stop": Field(
            flag,
            lambda _: True,
            "0 or 1",
            "Use 0 to run every step and answer once, at the end.",
        ),
        "variable_length": Field(
            flag, lambda _: True, "0 or 1", "Use 1 to let the canvas grow block by block."
        ),
        "cfg_scale": Field(
            number,
            lambda scale: scale == 0,
            "0 (classifier-free guidance is not supported)",
            "Leave it out; docs/requests.md says what to do instead.",
        ),
        "alg_temp": Field(
            number,
            lambda t: 0 <= t <= 100,
            "a number in [0, 100]",
            "Leave it out to fill the surest places.",
        ),
        "eps": Field(
            number,
            lambda eps: 0 < eps < 1,
            "a number in (0, 1)",
            "Leave it out for the authors' 0.001.",
        ),
    }
    foreign = {"alg_temp", "eps"} - family.own_fields
    return {name: field for name, field in fields.items() if name not in foreign}


def parse_params(
    family: Family,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    ignore_eos: bool,
    extra_args: Mapping[str, Any],
    also_known: Collection[str] = (),
    min_tokens: int = 0,
    stop_tokens: Collection[int] = (),
    logprobs: int | None = None,
    max_steps: int | None = None,
) -> DenoisingParams:
    """The denoising that a request asks for.

    temperature, top_p, top_k, ignore_eos, min_tokens, logprobs: vLLM's sampling parameters
    stop_tokens: EOS and the request's own, whether or not EOS is ignored
    max_steps: the most steps that the operator allows, if there is a limit
    extra_args: the parameters of `request_fields`, as the client sent them
    also_known: parameters in `extra_args` that are not for us
    Raises BadRequest naming the first field that cannot be served.
    """
    fields = request_fields(family, max_tokens, max_steps)
    given = _parse_fields(family, fields, extra_args, also_known)
    if min_tokens > max_tokens:
        raise BadRequest(
            "min_tokens", min_tokens, f"at most {max_tokens} (max_tokens)", "Lower it."
        )
    if logprobs is not None and logprobs < 0:
        allowed = "a number of alternatives, 0 or more"
        raise BadRequest("logprobs", logprobs, allowed, "Ask for the likeliest ones only.")
    _check_sampling(family, temperature, top_p, top_k)
    variable_length = given.get("variable_length", False)
    whole = min(GROWTH, max_tokens) if variable_length else max_tokens
    block_length = given.get("block_length", whole)
    steps = given.get("steps", min(max_tokens, max_steps or max_tokens))
    num_blocks = math.ceil(max_tokens / block_length)
    if steps < num_blocks:
        raise BadRequest(
            "steps",
            steps,
            f"at least {num_blocks}, one for each block of {block_length} places",
            "Raise steps or block_length.",
        )
    threshold, by_entropy = _threshold(given)
    if variable_length and threshold is not None:
        allowed = "0 or absent when a threshold is set"
        why = "When a threshold ends a block, only the device knows; set steps in its place."
        raise BadRequest("variable_length", 1, allowed, why)
    if ignore_eos and given.get("early_stop"):
        raise BadRequest(
            "early_stop", 1, "0 or absent when ignore_eos is set", "Drop one of the two."
        )
    return DenoisingParams(
        num_tokens=max_tokens,
        steps=steps,
        block_length=block_length,
        policy=_policy(family, given),
        threshold=threshold,
        by_entropy=by_entropy,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        alg_temp=given.get("alg_temp", 0.0),
        eps=given.get("eps", 1e-3),
        early_stop=given.get("early_stop", True),
        variable_length=variable_length,
        min_tokens=min_tokens,
        stop_tokens=tuple(sorted(stop_tokens)) if min_tokens else (),
        logprobs=logprobs,
    )


def _parse_fields(
    family: Family,
    fields: Mapping[str, Field],
    extra_args: Mapping[str, Any],
    also_known: Collection[str],
) -> dict[str, Any]:
    for name in extra_args:
        if name not in fields and name not in also_known:
            known = ", ".join(sorted({*fields, *also_known}))
            allowed = f"absent for a {family.name} model, which knows {known}"
            raise BadRequest(shown_name(name), extra_args[name], allowed, "Leave it out.")
    return {
        name: fields[name].parse(name, extra_args[name]) for name in fields if name in extra_args
    }


def _check_sampling(family: Family, temperature: float, top_p: float, top_k: int) -> None:
    if not 0 <= temperature <= 100:
        raise BadRequest(
            "temperature", temperature, "a number in [0, 100]", "Use 0 for the likeliest tokens."
        )
    if not 0 < top_p <= 1:
        raise BadRequest("top_p", top_p, "a number in (0, 1]", "Use 1 to keep all tokens.")
    if family.truncates:
        return
    why = f"{family.name}'s sampler draws from all tokens; leave it out."
    if top_p != 1:
        raise BadRequest("top_p", top_p, f"1 for a {family.name} model", why)
    if top_k > 0:
        raise BadRequest("top_k", top_k, f"0 or -1 for a {family.name} model", why)


def _threshold(given: Mapping[str, Any]) -> tuple[float | None, bool]:
    """The sureness from which places are filled, and whether it is a negated entropy."""
    if "entropy_threshold" not in given:
        return given.get("threshold"), False
    if "threshold" in given:
        allowed = "absent when entropy_threshold is set"
        raise BadRequest("threshold", given["threshold"], allowed, "Drop one of the two.")
    return -given["entropy_threshold"], True


def _policy(family: Family, given: Mapping[str, Any]) -> str:
    names = {"threshold": family.threshold_policy, "entropy_threshold": family.entropy_policy}
    measures = {"threshold": "the probability of the chosen token", "entropy_threshold": "entropy"}
    field = next((field for field in names if field in given), None)
    if field is None:
        policy: str = given.get(family.policy_field, family.policies[0])
        return policy
    policy = given.get(family.policy_field, names[field])
    if policy != names[field]:
        raise BadRequest(
            family.policy_field,
            policy,
            f"{names[field]} or absent when {field} is set",
            f"{field} compares {measures[field]}.",
        )
    if given.get("alg_temp"):
        raise BadRequest(
            "alg_temp",
            given["alg_temp"],
            f"0 or absent when {field} is set",
            f"{field} leaves nothing to draw.",
        )
    return policy
