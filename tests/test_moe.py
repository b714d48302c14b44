"""Gate, mapping, permute and unpermute against naive loops over Python numbers."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_ops import moe_gate, moe_mapping, moe_permute, moe_unpermute, per_token_cast_to_fp8
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import assert_rounded_once, assert_same

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# ------------------------------------------------------------------------------------------------------ gate

V3 = {"num_topk": 8, "num_groups": 8, "num_topk_groups": 4, "routed_scaling_factor": 2.5}
V2 = {
    "num_topk": 6,
    "num_groups": 8,
    "num_topk_groups": 3,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
}
V2_LITE = {"num_topk": 6, "scoring_func": "softmax", "norm_topk_prob": False}


def naive_gate(
    logits,
    bias,
    num_topk,
    num_groups=1,
    num_topk_groups=1,
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
):
    """One token, in float64. Also returns the smallest distance between two values that were compared."""
    num_experts = len(logits)
    if scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = math.fsum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = num_experts // num_groups
    group_scores = []
    for g in range(num_groups):
        best = sorted(choice[g * size : (g + 1) * size], reverse=True)
        group_scores.append(sum(best[:2]) if scoring_func == "sigmoid" else best[0])
    by_score = sorted(range(num_groups), key=lambda g: -group_scores[g])
    kept = [e for e in range(num_experts) if e // size in by_score[:num_topk_groups]]
    chosen = sorted(kept, key=lambda e: -choice[e])
    values = [choice[e] for e in chosen]
    gaps = [a - b for a, b in pairwise(values)][:num_topk]
    if num_topk_groups < num_groups:
        gaps.append(group_scores[by_score[num_topk_groups - 1]] - group_scores[by_score[num_topk_groups]])
    chosen = chosen[:num_topk]
    weights = [scores[e] for e in chosen]
    if norm_topk_prob:
        weights = [w / math.fsum(weights) for w in weights]
    return [w * routed_scaling_factor for w in weights], chosen, min(gaps, default=1.0)


@pytest.mark.parametrize(
    ("num_experts", "bias_scale", "bias_mean", "config"),
    [
        (256, 0.1, 0.0, V3),
        (256, 0.1, -2.0, V3),
        (160, 0.0, 0.0, V2),
        (64, 0.0, 0.0, V2_LITE),
        (64, 0.3, 0.0, V2_LITE),
        (160, 0.01, -1.0, V2 | {"norm_topk_prob": True}),
        (8, 0.3, 0.0, {"num_topk": 3, "num_groups": 8, "num_topk_groups": 5}),
        (12, 0.3, 0.0, {"num_topk": 6, "num_groups": 4, "num_topk_groups": 2}),
        (12, 0.3, 0.0, {"num_topk": 12, "num_groups": 4, "num_topk_groups": 4, "norm_topk_prob": False}),
        (1, 0.3, 0.0, {"num_topk": 1}),
        (300, 0.1, 0.0, {"num_topk": 10, "num_groups": 3, "num_topk_groups": 1}),
    ],
)
def test_gate_agrees_with_a_naive_loop(num_experts, bias_scale, bias_mean, config, device):
    logits = 1.5 * torch.randn(40, num_experts)
    bias = bias_scale * torch.randn(num_experts) + bias_mean
    optional = bias.to(device) if bias.any() else None
    topk_weights, topk_idx = moe_gate(logits.to(device), optional, **config)
    assert (topk_weights.dtype, topk_idx.dtype) == (torch.float32, torch.int32)
    assert topk_weights.shape == topk_idx.shape == (40, config["num_topk"])
    num_compared = 0
    for token in range(40):
        weights, idx, gap = naive_gate(logits[token].tolist(), bias.tolist(), **config)
        if gap > 1e-6:  # else float32 may order two experts the other way round
            num_compared += 1
            assert topk_idx[token].tolist() == idx, f"token {token}"
            assert topk_weights[token].tolist() == pytest.approx(weights, rel=3e-6), f"token {token}"
    assert num_compared >= 35


def logit(p):
    return math.log(p / (1 - p))


def test_group_score_is_the_sum_of_the_two_best_with_sigmoid_and_the_best_with_softmax(device):
    logits = torch.tensor([[logit(0.9), logit(0.1), logit(0.6), logit(0.55)]], device=device)
    groups = {"num_topk": 2, "num_groups": 2, "num_topk_groups": 1}
    assert moe_gate(logits, None, **groups)[1].tolist() == [[2, 3]]
    assert moe_gate(logits, None, **groups, scoring_func="softmax")[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_experts_of_other_groups_lose_to_negative_choices(scoring_func, device):
    """Marking the other groups with 0 rather than -inf would let them in."""
    logits = torch.tensor([[2.0, -3.0, 1.0, 1.0]], device=device)
    bias = torch.tensor([-1.0, -9.0, -8.0, -8.0], device=device)
    _, topk_idx = moe_gate(logits, bias, num_topk=2, num_groups=2, num_topk_groups=1, scoring_func=scoring_func)
    assert topk_idx.tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_equal_choices_go_to_the_lowest_index(scoring_func, device):
    logits = torch.zeros(3, 32, device=device)
    logits[1, 20:] = 1.0
    logits[2, 5::8] = 1.0
    config = {"num_topk": 6, "num_groups": 4, "num_topk_groups": 2, "scoring_func": scoring_func}
    weights, topk_idx = moe_gate(logits, None, **config)
    assert topk_idx[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert topk_idx[1].tolist() == [20, 21, 22, 23, 24, 25]
    assert topk_idx[2].tolist() == [5, 13, 0, 1, 2, 3]
    assert (weights[0] == weights[0, 0]).all()


def test_bias_changes_the_choice_but_no_weight(device):
    logits, bias = torch.randn(20, 64, device=device), torch.randn(64, device=device)
    weights, topk_idx = moe_gate(logits, bias, num_topk=6, norm_topk_prob=False)
    assert not torch.equal(topk_idx, moe_gate(logits, None, num_topk=6)[1])
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, topk_idx.long()), rtol=1e-6, atol=0)


def test_weights_sum_to_the_scaling_factor_or_are_left_alone(device):
    logits = torch.randn(9, 64, device=device) - 30  # sums near 1e-12: 1e-20 must not weigh
    weights, _ = moe_gate(logits, None, num_topk=6, routed_scaling_factor=2.5)
    torch.testing.assert_close(weights.sum(-1), torch.full((9,), 2.5, device=device), rtol=1e-6, atol=0)
    nothing, topk_idx = moe_gate(torch.full((1, 8), -200.0, device=device), None, num_topk=2)
    assert nothing.tolist() == [[0.0, 0.0]]
    assert topk_idx.tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gate_gives_valid_experts_whatever_the_logits(value, scoring_func, device):
    config = {"num_topk": 6, "num_groups": 8, "num_topk_groups": 4, "scoring_func": scoring_func}
    logits = torch.randn(4, 32, device=device)
    clean_weights, clean_idx = moe_gate(logits, None, **config)
    logits[1, 3] = value
    logits[2] = value
    weights, topk_idx = moe_gate(logits, None, **config)
    for row in topk_idx.tolist():
        assert len(set(row)) == 6
        assert all(0 <= e < 32 for e in row)
    assert torch.equal(topk_idx[[0, 3]], clean_idx[[0, 3]])
    assert torch.equal(weights[[0, 3]], clean_weights[[0, 3]])


@pytest.mark.parametrize(("num_experts", "config"), [(256, V3), (160, V2), (64, V2_LITE)])
def test_a_token_is_gated_alike_however_many_there_are(num_experts, config, device):
    """Of so many that a kernel may put several into a CTA, the last fewer than the others."""
    logits, bias = torch.randn(2001, num_experts, device=device), torch.randn(num_experts, device=device) / 8
    weights, idx = moe_gate(logits, bias, **config)
    parts = [moe_gate(some, bias, **config) for some in logits.split(100)]
    assert_same(weights, torch.cat([part[0] for part in parts]))
    assert_same(idx, torch.cat([part[1] for part in parts]))


def test_gate_takes_no_tokens_and_strided_logits(device):
    weights, topk_idx = moe_gate(torch.empty(0, 32, device=device), None, num_topk=4, num_groups=4, num_topk_groups=2)
    assert weights.shape == topk_idx.shape == (0, 4)
    wide = torch.randn(10, 50, device=device)
    for logits in (wide[:, 3:35], wide[::2, :32], wide[:1, :32].expand(5, 32)):
        for got, want in zip(
            moe_gate(logits, None, num_topk=4), moe_gate(logits.contiguous(), None, num_topk=4), strict=True
        ):
            assert_same(got, want)


# --------------------------------------------------------------------------------------------------- mapping


def naive_mapping(topk_idx, num_experts, alignment):
    """The live part of `token_idx` and `m_indices`, and all of `row_idx` and `offsets`, as lists."""
    tokens, experts, offsets = [], [], [0]
    row_idx = [[-1] * len(choices) for choices in topk_idx]
    for e in range(num_experts):
        for t, choices in enumerate(topk_idx):
            for j, choice in enumerate(choices):
                if choice == e:
                    row_idx[t][j] = len(tokens)
                    tokens.append(t)
                    experts.append(e)
        while len(tokens) % alignment:
            tokens.append(-1)
            experts.append(-1)
        offsets.append(len(tokens))
    return tokens, experts, row_idx, offsets


def assert_mapping_is_right(topk_idx, num_experts, alignment):
    token_idx, row_idx, offsets, m_indices = moe_mapping(topk_idx, num_experts, alignment=alignment)
    assert {x.dtype for x in (token_idx, row_idx, offsets, m_indices)} == {torch.int32}
    tokens, experts, rows_of, starts = naive_mapping(topk_idx.tolist(), num_experts, alignment)
    assert offsets.tolist() == starts
    assert row_idx.tolist() == rows_of
    padding = [-1] * (len(token_idx) - len(tokens))
    assert len(token_idx) == len(m_indices) >= len(tokens)
    assert token_idx.tolist() == tokens + padding
    assert m_indices.tolist() == experts + padding
    n = topk_idx.numel()
    assert len(token_idx) % alignment == 0
    assert len(token_idx) <= n + min(num_experts, n) * (alignment - 1)


@st.composite
def routings(draw):
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7, 31, 129, 257, 300]))
    t, k = draw(st.integers(0, 24)), draw(st.integers(0, 8))
    expert = st.one_of(st.integers(-2, num_experts + 2), st.sampled_from([0, num_experts - 1, INT_MIN, INT_MAX]))
    flat = draw(st.lists(expert, min_size=t * k, max_size=t * k))
    return torch.tensor(flat, dtype=torch.int32).view(t, k), num_experts, draw(st.sampled_from([1, 2, 3, 8, 64, 128]))


@settings(max_examples=200, deadline=None)
@given(routings())
def test_mapping_agrees_with_a_naive_loop(routing):
    assert_mapping_is_right(*routing)


@pytest.mark.parametrize("alignment", [1, 64, 128])
@pytest.mark.parametrize("num_experts", [1, 3, 8, 256, 300])
def test_mapping_at_the_edges(num_experts, alignment, device):
    last = num_experts - 1
    uneven = torch.randint(0, num_experts, (50, 6)).clamp(max=max(0, last // 3))  # most experts empty
    for topk_idx in (
        torch.zeros(0, 8),
        torch.zeros(5, 0),
        torch.zeros(1, 1),
        torch.full((70, 4), last),
        torch.full((70, 1), last // 2),
        torch.full((9, 3), num_experts),
        torch.full((9, 3), -1),
        torch.tensor([[INT_MIN, INT_MAX, num_experts + 7, -2]]),
        torch.arange(2 * num_experts).view(-1, 2).flip(0) % num_experts,
        uneven,
    ):
        assert_mapping_is_right(topk_idx.to(device, torch.int32), num_experts, alignment)


@pytest.mark.parametrize("alignment", [1, 2, 7, 128])
@pytest.mark.parametrize(
    ("num_experts", "n"), [(1, 1), (4, 1), (4, 3), (4, 4), (4, 5), (4, 300), (300, 299), (3, 1000)]
)
def test_number_of_rows_is_the_most_that_can_be_needed(num_experts, n, alignment, device):
    """One pair to each expert and all others to expert 0 but for what does not fill a block: that goes to the last."""
    j = min(num_experts, n)
    rest = (n - j) % alignment
    to_last = rest if j > 1 else 0
    flat = [*range(j), *[0] * (n - j - to_last), *[j - 1] * to_last]
    topk_idx = torch.tensor(flat, dtype=torch.int32, device=device).view(n, 1)
    token_idx, _, offsets, _ = moe_mapping(topk_idx, num_experts, alignment=alignment)
    assert offsets[-1] == len(token_idx)
    assert alignment > 1 or len(token_idx) == n


def test_without_alignment_offsets_count_and_rows_of_other_ranks_come_last(device):
    topk_idx = torch.tensor([[3, 0], [7, 3], [-1, 3]], dtype=torch.int32, device=device)
    token_idx, row_idx, offsets, m_indices = moe_mapping(topk_idx, 4)
    assert offsets.diff().tolist() == [1, 0, 0, 3]
    assert token_idx.tolist() == [0, 0, 1, 2, -1, -1]
    assert m_indices.tolist() == [0, 3, 3, 3, -1, -1]
    assert row_idx.tolist() == [[1, 0], [-1, 2], [-1, 3]]


def test_many_tokens_to_one_expert(device):
    """65536 tokens, one expert of 256: every row in order, none lost."""
    for expert in (0, 128, 255):
        topk_idx = torch.full((65536, 1), expert, dtype=torch.int32, device=device)
        token_idx, row_idx, offsets, _ = moe_mapping(topk_idx, 256, alignment=128)
        want = torch.arange(65536, dtype=torch.int32, device=device)
        assert torch.equal(token_idx[:65536], want)
        assert (token_idx[65536:] == -1).all()
        assert torch.equal(row_idx[:, 0], want)
        assert offsets.tolist() == [0] * (expert + 1) + [65536] * (256 - expert)


@pytest.mark.parametrize("num_experts", [2, 64, 256, 300])
def test_many_tokens_to_all_experts(num_experts, device):
    """Against a stable sort, and the same bits every time."""
    t, num_topk = 20011, 8
    topk_idx = torch.randint(0, num_experts, (t, num_topk), dtype=torch.int32)
    by_expert, pair = topk_idx.flatten().sort(stable=True)
    first = moe_mapping(topk_idx.to(device), num_experts)
    token_idx, row_idx, offsets, m_indices = (x.cpu() for x in first)
    assert torch.equal(token_idx.long(), pair // num_topk)
    assert torch.equal(m_indices, by_expert)
    assert torch.equal(row_idx.flatten()[pair].long(), torch.arange(t * num_topk))
    assert torch.equal(offsets.diff(), torch.bincount(by_expert, minlength=num_experts))
    for _ in range(3):
        again = moe_mapping(topk_idx.to(device), num_experts)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


# --------------------------------------------------------------------------------------- permute and unpermute


ANY_DTYPE = [
    *DTYPES,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int32,
    torch.bool,
]


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
def test_permute_copies_bits_and_pads_with_zero_bits(dtype, device):
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (5, 24), dtype=torch.uint8, device=device)
    x = raw.view(dtype)
    token_idx = torch.tensor([4, -1, 0, 0, 5, 3, INT_MAX, INT_MIN, -2, 1], dtype=torch.int32, device=device)
    got = moe_permute(x, token_idx)
    assert (got.dtype, got.shape) == (dtype, (10, x.shape[1]))
    for r, token in enumerate(token_idx.tolist()):
        want = raw[token] if 0 <= token < 5 else torch.zeros_like(raw[0])
        assert torch.equal(got[r].view(torch.uint8), want), f"row {r}"


@pytest.mark.parametrize("t", [0, 1, 5])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("d", [0, 1, 24])
def test_permute_and_unpermute_take_nothing(t, rows, d, device):
    token_idx = torch.full((rows,), t - 1, dtype=torch.int32, device=device)
    out = moe_permute(torch.ones(t, d, device=device), token_idx)
    assert torch.equal(out, torch.full((rows, d), float(t > 0), device=device))
    for k in (0, 3):
        row_idx = torch.full((t, k), rows - 1, dtype=torch.int32, device=device)
        y = moe_unpermute(torch.ones(rows, d, device=device), row_idx, torch.ones(t, k, device=device))
        assert torch.equal(y, torch.full((t, d), float(k if rows else 0), device=device))


def test_permute_takes_any_layout(device):
    token_idx = torch.tensor([2, 0, -1, 4], dtype=torch.int32, device=device)
    wide = torch.randn(5, 40, device=device).bfloat16()
    _, sf = per_token_cast_to_fp8(torch.randn(5, 500, device=device), mn_major=True)
    for x in (wide[:, 3:20], wide[:, ::2], wide.T.contiguous().T, wide[:1].expand(5, 40), sf):
        assert_same(moe_permute(x, token_idx), moe_permute(x.contiguous(), token_idx))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 6, 8])
def test_unpermute_is_the_weighted_sum_rounded_once(k, dtype, device):
    t, rows, d = 9, 50, 72
    y, weights = torch.randn(rows, d, device=device).to(dtype), torch.randn(t, k, device=device)
    row_idx = torch.randint(-3, rows + 3, (t, k), dtype=torch.int32, device=device)
    want, magnitude = torch.zeros(2, t, d, dtype=torch.float64)
    for i, choices in enumerate(row_idx.tolist()):
        for j, row in enumerate(choices):
            if 0 <= row < rows:
                term = weights[i, j].double().item() * y[row].double().cpu()
                want[i] += term
                magnitude[i] += term.abs()
    got = moe_unpermute(y, row_idx, weights)
    assert got.dtype == dtype
    assert_rounded_once(got, want.to(device), magnitude.to(device))


def test_unpermute_adds_in_ascending_order_of_the_choices(device):
    y = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]], dtype=torch.int32, device=device)
    assert moe_unpermute(y, orders, torch.ones(3, 3, device=device)).flatten().tolist() == [0.0, 1.0, 0.0]


def test_unpermute_keeps_the_sum_in_float32(device):
    """In bfloat16 each 2^-9 beside 1 would be lost; four of them are one step of it."""
    y = torch.tensor([[1.0], [2**-9]], device=device).bfloat16()
    row_idx = torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.int32, device=device)
    assert moe_unpermute(y, row_idx, torch.ones(1, 5, device=device)).item() == 1 + 2**-7


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_pairs_without_a_row_add_nothing(poison, device):
    y = torch.full((6, 40), poison, device=device).bfloat16()
    y[2], y[4] = 1.0, 3.0
    row_idx = torch.tensor([[2, 6, 4], [-1, INT_MAX, INT_MIN], [4, -2, -1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, poison, 2.0], [poison] * 3, [1.0, 0.0, poison]], device=device)
    assert moe_unpermute(y, row_idx, weights)[:, 0].tolist() == [6.5, 0.0, 3.0]
    y[4, 1] = poison  # a row that is owned does count
    assert not moe_unpermute(y, row_idx, weights)[0, 1].isfinite()


def test_unpermute_takes_strided_rows(device):
    wide = torch.randn(20, 100, device=device).bfloat16()
    row_idx = torch.randint(-1, 10, (4, 3), dtype=torch.int32, device=device)
    weights = torch.rand(4, 3, device=device)
    for y in (wide[:10, 5:77], wide[::2, :72], wide[:1, :72].expand(10, 72)):
        assert_same(moe_unpermute(y, row_idx, weights), moe_unpermute(y.contiguous(), row_idx, weights))


# -------------------------------------------------------------------------------------------------- together


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 40),
    k=st.sampled_from([1, 2, 4, 8]),
    num_experts=st.integers(1, 300),
    alignment=st.sampled_from([1, 5, 64, 128]),
    seed=st.integers(0, 1000),
)
def test_experts_that_change_nothing_give_the_tokens_back(t, k, num_experts, alignment, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 24, generator=generator).bfloat16()
    topk_idx = torch.randint(0, num_experts, (t, k), generator=generator, dtype=torch.int32)
    token_idx, row_idx, _, m_indices = moe_mapping(topk_idx, num_experts, alignment=alignment)
    y = moe_permute(x, token_idx)
    assert not y[m_indices < 0].any()
    y[m_indices < 0] = math.nan
    assert_same(moe_unpermute(y, row_idx, torch.full((t, k), 1 / k)), x)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("alignment", [1, 16])
def test_a_layer_split_over_ranks_agrees_with_a_naive_loop(alignment, num_ranks, device):
    t, d, num_experts, k = 30, 20, 16, 4
    x, w = torch.randn(t, d, device=device), torch.randn(num_experts, d, d, device=device)
    weights, topk_idx = moe_gate(torch.randn(t, num_experts, device=device), None, num_topk=k)
    want = torch.zeros(t, d, dtype=torch.float64, device=device)
    for i in range(t):
        for weight, e in zip(weights[i].tolist(), topk_idx[i].tolist(), strict=True):
            want[i] += weight * (w[e].double() @ x[i].double())

    got = torch.zeros(t, d, dtype=torch.float64, device=device)
    num_local = num_experts // num_ranks
    for rank in range(num_ranks):
        local = w[rank * num_local : (rank + 1) * num_local]
        token_idx, row_idx, offsets, m_indices = moe_mapping(
            topk_idx - rank * num_local, num_local, alignment=alignment
        )
        rows = moe_permute(x, token_idx)
        y = torch.full_like(rows, math.nan)
        for e, (first, end) in enumerate(pairwise(offsets.tolist())):
            assert set(m_indices[first:end].tolist()) <= {e, -1}
            y[first:end] = rows[first:end] @ local[e].T
        got += moe_unpermute(y, row_idx, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["moe_gate", "moe_mapping", "moe_permute", "moe_unpermute"])
def test_reference_runs_without_reading_a_value(op):
    """Fake tensors have no values: what needs one on the host, or for a shape, raises."""
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in SAMPLES[op]("cpu")]
        got, want = OPS[op].reference(*args), OPS[op].fake(*args)
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
