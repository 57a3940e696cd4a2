"""The sampler equals its plain twin, follows the distribution, and samples each row independently of the others."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import NO_CHOICE, NO_TOKEN, AdmittedRow
from engine.request import BOUNDS, SamplingParams
from engine.sampling import reference
from engine.sampling.choose import COLUMNS, inverse_cdf
from engine.sampling.sampler import Sampler
from engine.sampling.uniform import uniforms

VOCAB = 203  # not a multiple of the chunk of inverse_cdf
EOS = (5, 7)


def upload(arrays):
    return [torch.from_numpy(a) for a in arrays]


def sampler(max_rows=32, vocab=VOCAB):
    return Sampler(max_rows=max_rows, vocab_size=vocab, eos_token_ids=EOS, device=torch.device("cpu"), upload=upload)


def row(number, rng, params):
    tokens = rng.integers(0, VOCAB, rng.integers(1, 40)).tolist()
    num_prompt = int(rng.integers(1, len(tokens) + 1))
    if params.bad_words and rng.integers(2):
        tokens += params.bad_words[-1][:-1] or params.bad_words[min(1, len(params.bad_words) - 1)][:-1]
    return AdmittedRow(row=number, tokens=tokens, num_prompt=num_prompt, blocks=[], params=params, seed=int(rng.integers(2**63)))


def logits_for(n, rng):
    return torch.from_numpy(rng.normal(0, 3, (n, VOCAB)).astype(np.float32))


def run(fast, rows, logits):
    """Admit `rows` and sample each of them once."""
    for admitted in rows:
        fast.admit([admitted])
    numbers = np.array([r.row for r in rows], np.int64)
    return fast.sample(logits.clone(), numbers, np.array([len(r.tokens) for r in rows], np.int64))


def in_vocabulary(params):
    """Return `params` without the stop tokens outside the vocabulary, which the plain twin does not take."""
    stops = {name: tuple(t for t in getattr(params, name) if t < VOCAB) for name in ("stop_token_ids", "end_token_ids")}
    return msgspec.structs.replace(params, **stops)


NEW = {
    name: st.one_of(st.just(0.0), st.floats(*BOUNDS[name][:2]))
    for name in set(COLUMNS) - {"temperature", "top_k", "top_p", "min_p"}  # these have their own values below
}
params = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    temperature=st.sampled_from([0.0, 5e-324, 1e-46, 1e-30, 1e-6, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 10, VOCAB, 10**6]),
    top_p=st.sampled_from([0.0, 0.05, 0.4, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.sampled_from([None, {3: 5.0, 9: -100.0, VOCAB - 1: 2.0}]),
    bad_words=st.sampled_from([(), ((3,), (9, 11), (4, 4, 4)), ((VOCAB - 1,),)]),
    allowed_token_ids=st.sampled_from([None, (3, 4, 9, 11, 40), tuple(range(0, VOCAB, 2)), (5,)]),
    stop_token_ids=st.sampled_from([(), (2, 10**9)]),
    end_token_ids=st.sampled_from([(), (11, 10**9)]),
    min_tokens=st.sampled_from([0, 3, 60]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 1, 20]),
    **NEW,
)


@given(st.lists(params, min_size=1, max_size=32), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_the_plain_twin(many, seed):
    rng = np.random.default_rng(seed)
    rows = [row(i, rng, p) for i, p in enumerate(many)]
    logits = logits_for(len(rows), rng)
    got = run(sampler(), rows, logits)
    reported = iter(range(len(got.num_top)))
    for i, r in enumerate(rows):
        token, logprobs = reference.sample(logits[i].numpy(), r.tokens, r.num_prompt, in_vocabulary(r.params), r.seed, EOS)
        assert int(got.tokens[i]) == token, r
        if r.params.logprobs is None:
            continue
        n = next(reported)
        if logprobs is None:
            continue  # NO_CHOICE
        k = logprobs.top_ids
        assert int(got.logprob_rows[n]) == i
        assert got.num_top[n] == r.params.logprobs
        assert int(got.logprobs.tokens[n]) == token
        assert int(got.logprobs.ranks[n]) == logprobs.rank
        assert float(got.logprobs.logprobs[n]) == pytest.approx(logprobs.logprob, abs=1e-4)
        assert got.logprobs.top_ids[n][: len(k)].tolist() == k
        assert got.logprobs.top_logprobs[n][: len(k)].tolist() == pytest.approx(logprobs.top_logprobs, abs=1e-4)


BAD_LOGITS = {
    "one NaN": {40: math.nan},
    "one +inf": {VOCAB - 1: math.inf},
    "NaN and +inf": {3: math.nan, 9: math.inf},
    "all NaN": dict.fromkeys(range(VOCAB), math.nan),
    "all -inf": dict.fromkeys(range(VOCAB), -math.inf),
    "NaN at a stop token": {EOS[0]: math.nan},
    "+inf at a stop token": {EOS[1]: math.inf},
}


@pytest.mark.parametrize("bad", BAD_LOGITS)
@given(st.lists(params, min_size=2, max_size=6), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_row_whose_logits_are_not_finite_gets_no_token_and_leaves_the_others_alone(bad, many, seed):
    rng = np.random.default_rng(seed)
    rows = [row(i, rng, p) for i, p in enumerate(many)]
    logits = logits_for(len(rows), rng)
    expected = run(sampler(), rows, logits).tokens.tolist()
    failed = int(rng.integers(len(rows)))
    for token, value in BAD_LOGITS[bad].items():
        logits[failed, token] = value
    fast = sampler()
    got = run(fast, rows, logits)
    assert got.tokens.tolist() == [*expected[:failed], NO_TOKEN, *expected[failed + 1 :]]
    assert got.latest.tolist() == [max(0, token) for token in got.tokens.tolist()]
    r = rows[failed]
    plain = in_vocabulary(r.params)
    assert reference.sample(logits[failed].numpy(), r.tokens, r.num_prompt, plain, r.seed, EOS) == (NO_TOKEN, None)


def test_a_few_logits_of_minus_infinity_are_no_failure():
    rng = np.random.default_rng(0)
    rows = [row(i, rng, SamplingParams(temperature=t, top_p=p)) for i, (t, p) in enumerate([(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])]
    logits = logits_for(3, rng)
    logits[:, : VOCAB - 5] = -math.inf
    assert all(token >= VOCAB - 5 for token in run(sampler(), rows, logits).tokens.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_a_row_gets_the_same_token_alone_and_among_31_others(seed):
    rng = np.random.default_rng(seed)
    choices = {
        "temperature": [0.0, 0.7, 1.0],
        "top_k": [0, 5],
        "top_p": [0.8, 1.0],
        "min_p": [0.0, 0.1],
        "repetition_penalty": [1.0, 1.2],
        "logit_bias": [None, {1: 4.0}],
        "min_tokens": [0, 50],
        "logprobs": [None, 3],
    }
    rows = [
        row(i, rng, SamplingParams(max_tokens=99, **{k: v[rng.integers(len(v))] for k, v in choices.items()})) for i in range(32)
    ]
    logits = logits_for(32, rng)
    together = run(sampler(), rows, logits).tokens.tolist()
    alone = [int(run(sampler(), [r], logits[i : i + 1]).tokens[0]) for i, r in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "temperature": 1.5}],
    ids=str,
)
def test_samples_follow_the_distribution(options):
    """Chi-square test over 20,000 positions of one seed. The bound is the 99.99% quantile by Wilson and Hilferty."""
    vocab, samples = 12, 20_000
    p = SamplingParams(max_tokens=99, **options)
    fast = sampler(1, vocab)
    fast.admit([AdmittedRow(row=0, tokens=[0], num_prompt=1, blocks=[], params=p, seed=1234)])
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, vocab).astype(np.float32))
    rows, ends = np.zeros(samples, np.int64), np.arange(1, samples + 1)
    tokens = fast.sample(logits.repeat(samples, 1), rows, ends).tokens.numpy()
    expected = reference.probabilities(logits.numpy().astype(np.float64), p) * samples
    seen = np.bincount(tokens, minlength=vocab)
    assert not seen[expected == 0].any()
    live = expected > 0
    chi2 = ((seen - expected)[live] ** 2 / expected[live]).sum()
    free = max(int(live.sum()) - 1, 1)
    assert chi2 < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("temperature", [1e-20, 1e-30, 1e-38, 1e-45, 1e-46, 1e-200, 2.3e-308, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}, {"logit_bias": {9: -100.0}}], ids=str)
def test_a_temperature_near_zero_samples_among_the_largest_logits(temperature, options):
    p = SamplingParams(max_tokens=99, temperature=temperature, **options)
    fast = sampler(1)
    fast.admit([AdmittedRow(row=0, tokens=[0], num_prompt=1, blocks=[], params=p, seed=7)])
    logits = logits_for(1, np.random.default_rng(0))
    logits[0, [40, 120]] = logits.amax() + 2e-6
    rows, ends = np.zeros(200, np.int64), np.arange(1, 201)
    tokens = fast.sample(logits.repeat(200, 1), rows, ends).tokens.tolist()
    assert set(tokens) == {40, 120}
    wide = logits[0].numpy().astype(np.float64)
    assert tokens == [reference.inverse_cdf(reference.probabilities(wide, p), reference.uniform(7, end)) for end in ends.tolist()]


def test_penalties_count_the_tokens_sampled_since_admission():
    """A step's token counts in the next step, so greedy sampling with a large presence penalty goes down the ranking."""
    fast = sampler(2)
    p = SamplingParams(max_tokens=99, temperature=0.0, presence_penalty=2.0)
    fast.admit([AdmittedRow(row=1, tokens=[0], num_prompt=1, blocks=[], params=p, seed=0)])
    logits = -torch.arange(VOCAB, dtype=torch.float32)[None] * 0.5
    got = [int(fast.sample(logits.clone(), np.array([1]), np.array([1 + i])).tokens[0]) for i in range(4)]
    assert got == [0, 1, 2, 3]


def test_a_new_owner_of_a_row_has_none_of_the_previous_counts():
    fast = sampler(1)
    p = SamplingParams(max_tokens=99, temperature=0.0, repetition_penalty=2.0)
    logits = torch.ones(1, VOCAB)
    logits[0, 3] = 1.5
    for prompt, expected in [([3], 0), ([8], 3), ([3, 8], 0)]:
        fast.admit([AdmittedRow(row=0, tokens=prompt, num_prompt=len(prompt), blocks=[], params=p, seed=0)])
        assert int(fast.sample(logits.clone(), np.array([0]), np.array([len(prompt)])).tokens[0]) == expected


def test_only_rows_with_penalties_take_a_slot_of_counts_and_they_free_it():
    fast = sampler(4)
    for number in (0, 1, 2, 3, 0, 1):
        for options in ({"presence_penalty": 1.0}, {}):
            p = SamplingParams(**options)
            fast.admit([AdmittedRow(row=number, tokens=[1], num_prompt=1, blocks=[], params=p, seed=0)])
    assert fast._counts._in_prompt.shape[0] == 1
    plain = sampler(4)
    plain.admit([AdmittedRow(row=0, tokens=[1], num_prompt=1, blocks=[], params=SamplingParams(), seed=0)])
    assert plain._counts._in_prompt.shape[0] == 0


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
@settings(derandomize=True)
def test_uniform_equals_its_twin(seed, position):
    got = float(uniforms(np.array([seed], np.uint64), np.array([position]))[0])
    assert got == reference.uniform(seed, position)
    assert 0.0 <= got < 1.0


def test_inverse_cdf_never_chooses_a_token_of_weight_zero():
    weights = torch.zeros(4, 300)
    weights[0, 299] = weights[1, 0] = weights[2, 128] = weights[3, 127] = 1e-30
    for u in (0.0, 0.5, 1 - 2**-53):
        assert inverse_cdf(weights, torch.full((4,), u, dtype=torch.float64)).tolist() == [299, 0, 128, 127]


def decode(fast, p, logits, num, prompt=(0,)):
    """Admit a row with the parameters `p`, and return the `num` tokens that it samples one after the other."""
    fast.admit([AdmittedRow(row=1, tokens=list(prompt), num_prompt=len(prompt), blocks=[], params=p, seed=0)])
    ends = range(len(prompt), len(prompt) + num)
    return [int(fast.sample(logits.clone(), np.array([1]), np.array([end])).tokens[0]) for end in ends]


def descending():
    """Logits whose token 0 is the most probable, then token 1, and so on."""
    return -torch.arange(VOCAB, dtype=torch.float32)[None]


def test_a_bad_word_is_excluded_where_its_last_token_would_complete_it():
    p = SamplingParams(max_tokens=99, temperature=0.0, bad_words=((0, 0), (1, 0, 1)))
    assert decode(sampler(2), p, descending(), 6) == [0, 1, 0, 2, 0, 1]


def test_a_bad_word_that_the_prompt_begins_is_not_one():
    p = SamplingParams(max_tokens=99, temperature=0.0, bad_words=((5, 0),))
    assert decode(sampler(2), p, descending(), 2, prompt=(5,)) == [0, 0]


def test_a_resumed_row_knows_the_output_before_it():
    p = SamplingParams(max_tokens=99, temperature=0.0, bad_words=((3, 0, 1),), allowed_token_ids=(1, 2))
    fast = sampler(2)
    fast.admit([AdmittedRow(row=1, tokens=[9, 3, 0], num_prompt=1, blocks=[], params=p, seed=0)])
    assert int(fast.sample(descending(), np.array([1]), np.array([3])).tokens[0]) == 2


def test_only_rows_with_restrictions_take_their_slots_and_they_free_them():
    fast = sampler(4)
    for number in (0, 1, 2, 3, 0, 1):
        for options in ({"bad_words": ((1,),), "allowed_token_ids": (1, 2)}, {}):
            p = SamplingParams(**options)
            fast.admit([AdmittedRow(row=number, tokens=[1], num_prompt=1, blocks=[], params=p, seed=0)])
    assert fast._bad_words._latest.data.shape[0] == fast._allowed._allowed.data.shape[0] == 1


def test_a_new_owner_of_a_row_has_none_of_the_previous_restrictions():
    fast = sampler(2)
    first = SamplingParams(max_tokens=99, temperature=0.0, allowed_token_ids=(7,), bad_words=((0,),))
    assert decode(fast, first, descending(), 1) == [7]
    second = SamplingParams(max_tokens=99, temperature=0.0, allowed_token_ids=(0, 7), bad_words=((7,),))
    assert decode(fast, second, descending(), 1) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_restrictions_leave_no_token_gets_no_choice(temperature):
    p = SamplingParams(max_tokens=99, temperature=temperature, allowed_token_ids=(4,), bad_words=((4, 4),))
    assert decode(sampler(2), p, descending(), 3) == [4, NO_CHOICE, 4]
