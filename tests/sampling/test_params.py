"""Which parameters are served, and that each refusal names its field."""

import math
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidArgument
from runtime.sampling.params import validate
from runtime.types import SamplingParams


def check(prompt_length: int = 10, **params) -> SamplingParams:
    return validate(
        SamplingParams(**params), vocab_size=1000, context_length=100, prompt_length=prompt_length
    )


def test_the_defaults_pass_and_max_tokens_is_what_the_context_leaves():
    assert check() == SamplingParams(max_tokens=90)
    assert check(prompt_length=99).max_tokens == 1
    assert check(max_tokens=90).max_tokens == 90


def test_what_is_given_is_kept_in_its_own_type():
    given = dict(
        max_tokens=20,
        min_tokens=20,
        temperature=0,
        top_k=2**31 - 1,
        top_p=1,
        min_p=1,
        repetition_penalty=2,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=((0, -1000), (999, 1000.0)),
        seed=2**64 - 1,
        stop=("x" * 512,) * 16,
        stop_token_ids=(0, 999),
        ignore_eos=True,
        logprobs=100,
    )
    out = check(**given)
    assert out == SamplingParams(**given)
    for field in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"):
        assert type(getattr(out, field)) is float
    assert all(type(bias) is float for _, bias in out.logit_bias)
    assert check(seed=0).seed == 0 and check(seed=None).seed is None
    assert check(logprobs=0).logprobs == 0 and check(logprobs=None).logprobs is None


NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
BAD = [
    *((field, value) for field in NUMBERS for value in (math.nan, math.inf, -math.inf, 1e300, -1e300)),
    *((field, value) for field in NUMBERS for value in ("1", None, True, 10**400)),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 101.0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("top_k", -1),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 91),
    ("max_tokens", 10**9),
    ("max_tokens", 10**6000),
    ("max_tokens", 5.0),
    ("min_tokens", -1),
    ("min_tokens", 91),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.0),
    ("logprobs", -1),
    ("logprobs", 101),
    ("stop", ("",)),
    ("stop", ("x" * 513,)),
    ("stop", ("x",) * 17),
    ("stop", (7,)),
    ("stop", "text"),
    ("stop_token_ids", (1000,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (1.0,)),
    ("stop_token_ids", (1,) * 1025),
    ("logit_bias", ((1000, 1.0),)),
    ("logit_bias", ((-1, 1.0),)),
    ("logit_bias", ((1, math.nan),)),
    ("logit_bias", ((1, 1000.5),)),
    ("logit_bias", ((1, -math.inf),)),
    ("logit_bias", ((1, 1.0), (1, 2.0))),
    ("logit_bias", tuple((i % 1000, 1.0) for i in range(1025))),
    ("logit_bias", ((1,),)),
    ("logit_bias", (7,)),
    ("logit_bias", None),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{f}-{i}" for i, (f, _) in enumerate(BAD)])
def test_a_refusal_names_the_field_on_one_short_line(field, value):
    with pytest.raises(InvalidArgument) as refusal:
        check(**{field: value})
    assert refusal.value.field == field
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


def test_contradictions_are_refused():
    with pytest.raises(InvalidArgument, match=r"min_tokens: 6 is more than max_tokens, 5"):
        check(max_tokens=5, min_tokens=6)
    with pytest.raises(InvalidArgument, match=r"min_tokens: 11 is more than max_tokens, 10"):
        check(prompt_length=90, min_tokens=11)
    with pytest.raises(InvalidArgument, match="min_tokens"):
        check(min_tokens=1, stop_token_ids=tuple(range(1000)))
    with pytest.raises(InvalidArgument, match=r"max_tokens: 50 is too many; .* room for 40"):
        check(prompt_length=60, max_tokens=50)


@pytest.mark.parametrize("prompt_length", [0, 100, 101, 10**9])
def test_a_prompt_without_tokens_or_room_is_refused(prompt_length):
    with pytest.raises(InvalidArgument) as refusal:
        check(prompt_length=prompt_length)
    assert refusal.value.field == "prompt"


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text("ab", max_size=3),
    st.tuples(),
    st.binary(max_size=2),
)
fields = list(SamplingParams.__dataclass_fields__)


@given(st.dictionaries(st.sampled_from(fields), anything))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_comes_is_served_or_refused_and_what_is_served_stays_served(values):
    try:
        out = check(**values)
    except InvalidArgument as refusal:
        assert refusal.field in values
        return
    for name in ("logit_bias", "stop", "stop_token_ids"):
        assert type(getattr(out, name)) is tuple
    assert validate(out, vocab_size=1000, context_length=100, prompt_length=10) == out


def test_the_check_needs_neither_torch_nor_numpy():
    code = "import sys, runtime.sampling.params; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
