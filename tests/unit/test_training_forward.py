# SPDX-License-Identifier: Apache-2.0
"""The training forward pass of packed samples is that of the layer, row by row; on GPUs that of flex_attention too."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vllm_longspec.training import attention
from vllm_longspec.training.attention import BLOCK, NOTHING, Intervals, block_mask, interval_attention
from vllm_longspec.training.forward import draft_hidden, lay_out, pack
from vllm_longspec.training.layer import SELF_ATTENTION_WINDOW, GlideLayer, attend
from vllm_longspec.training.teachers import Lesson, Sample

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
GRANITE = {
    **CONFIG,
    "model_type": "granite",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
}
GLM4 = {**CONFIG, "model_type": "glm4", "partial_rotary_factor": 0.5}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sample(num_tokens, supervised, gap=0, anchors=4):
    """A sample of random tokens with supervised stretches [first, last), its positions with `gap` left out."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    for first, last in supervised:
        mask[first:last] = True
    positions = torch.arange(num_tokens)
    positions = torch.where(positions < anchors, positions, positions + gap)
    return Sample(torch.randint(50, (num_tokens,)), mask, positions)


def lesson(of, config, dtype=torch.float64):
    keys, values = torch.randn(2, len(of.input_ids), config["num_key_value_heads"], config["head_dim"], dtype=dtype)
    return Lesson(of, keys, values, torch.randn(len(of.rows), config["hidden_size"], dtype=dtype))


def layer(config, dtype=torch.float64):
    torch.manual_seed(0)
    glide = GlideLayer(SimpleNamespace(**config))
    for parameter in glide.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return glide.to(dtype)


def by_the_layer(glide, embedding, lesson, withheld):
    """All rows of one sample, by `GlideLayer.forward` over the whole text."""
    of = lesson.sample
    distances = of.positions[:, None] - of.positions
    index = torch.arange(len(of.input_ids))
    hidden, _ = glide(
        embedding[of.input_ids][None],
        of.positions[None],
        ((distances >= 0) & (distances <= SELF_ATTENTION_WINDOW))[None],
        lesson.keys[None],
        lesson.values[None],
        (index <= index[:, None] - withheld)[None],
    )
    return hidden[0, of.rows]


SAMPLES = {
    "dense": [(600, [(1, 600)], 0)],
    "answers": [(600, [(580, 600)], 0), (40, [(1, 3), (20, 40)], 0), (900, [(600, 640), (890, 900)], 0)],
    "anchors": [(560, [(1, 560)], 5000), (300, [(250, 300)], 700)],
}


@pytest.mark.parametrize(
    ("config", "samples", "withheld"),
    [
        *((CONFIG, samples, withheld) for samples in SAMPLES for withheld in ((1,), (3,), (1, 2, 3, 4, 5), (2, 5))),
        (GRANITE, "answers", (1, 3)),
        (GLM4, "answers", (1, 3)),
    ],
    ids=str,
)
def test_rows_are_those_of_the_layer(config, samples, withheld):
    torch.manual_seed(1)
    glide, embedding = layer(config), torch.randn(50, 32, dtype=torch.float64)
    lessons = [lesson(sample(*arguments), config) for arguments in SAMPLES[samples]]
    layout = lay_out([each.sample for each in lessons])
    packed = pack(lessons, layout, "cpu")
    found = draft_hidden(glide, embedding[layout.ids], packed, withheld)
    for depth, number in enumerate(withheld):
        expected = torch.cat([by_the_layer(glide, embedding, each, number) for each in lessons])
        torch.testing.assert_close(found[depth], expected)
    labels = torch.cat([each.sample.input_ids[each.sample.rows + 1] for each in lessons])
    assert torch.equal(packed.layout.labels, labels)
    torch.testing.assert_close(packed.hidden, torch.cat([each.hidden for each in lessons]))


@pytest.mark.parametrize("recompute_above", [1 << 16, 37])
def test_gradients_are_those_of_the_layer(recompute_above):
    torch.manual_seed(1)
    embedding = torch.randn(50, 32, dtype=torch.float64)
    lessons = [lesson(sample(*arguments), CONFIG) for arguments in SAMPLES["answers"]]
    layout = lay_out([each.sample for each in lessons])
    withheld = (1, 2, 4)
    glide, reference = layer(CONFIG), layer(CONFIG)
    upstream = torch.randn(len(withheld), len(layout.labels), 32, dtype=torch.float64)
    packed = pack(lessons, layout, "cpu")
    (draft_hidden(glide, embedding[layout.ids], packed, withheld, recompute_above) * upstream).sum().backward()
    whole = [torch.cat([by_the_layer(reference, embedding, each, number) for each in lessons]) for number in withheld]
    (torch.stack(whole) * upstream).sum().backward()
    for (name, found), expected in zip(glide.named_parameters(), reference.parameters(), strict=True):
        # Its keys and values are the target's.
        if name.startswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            assert found.grad is None
        else:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_without_gradients_the_mlp_is_computed_by_parts_too():
    torch.manual_seed(1)
    glide, embedding = layer(CONFIG), torch.randn(50, 32, dtype=torch.float64)
    lessons = [lesson(sample(*arguments), CONFIG) for arguments in SAMPLES["answers"]]
    layout = lay_out([each.sample for each in lessons])
    packed, sizes = pack(lessons, layout, "cpu"), []
    glide.mlp.register_forward_hook(lambda _module, given, _output: sizes.append(given[0].shape[:-1].numel()))
    with torch.no_grad():
        found = draft_hidden(glide, embedding[layout.ids], packed, (1, 2, 4), 37)
        expected = draft_hidden(glide, embedding[layout.ids], packed, (1, 2, 4))
    assert max(sizes[:-1]) <= 37 and sizes[-1] == 3 * len(layout.labels)
    torch.testing.assert_close(found, expected)


def test_only_windows_of_rows_are_computed():
    layout = lay_out([sample(5000, [(4990, 5000)]), sample(3000, [(2000, 2001)])])
    assert len(layout.ids) == (512 + 10) + (512 + 1)
    assert layout.rows is not None
    # The last token is no row, and in no window.
    layout = lay_out([sample(100, [(1, 100)])])
    assert layout.rows is None and len(layout.ids) == 99
    with pytest.raises(ValueError, match="no supervised token"):
        lay_out([sample(100, [])])


def intervals(num_rows, num_keys, seed):
    """Sorted as those of packed samples, of all lengths, some empty."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(num_keys, (num_rows,), generator=generator).sort().values
    length = torch.randint(num_keys, (num_rows,), generator=generator) // 2
    length[torch.rand(num_rows, generator=generator) < 0.1] = 0
    return Intervals(first, (first + length).clamp(max=num_keys))


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_of_blocks_is_that_of_the_rows(seed):
    first, end = intervals(4 * BLOCK, 6 * BLOCK, seed)
    if seed == 3:  # causal, with whole blocks
        first, end = torch.zeros_like(first), torch.arange(4 * BLOCK) + 1
    mask = block_mask(first, end, 6 * BLOCK)
    index = torch.arange(6 * BLOCK)
    sees = (first[:, None] <= index) & (index < end[:, None])
    blocks = sees.view(4, BLOCK, 6, BLOCK)
    partial, whole = torch.zeros(2, 4, 6, dtype=torch.bool)
    for row in range(4):
        partial[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]]] = True
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]]] = True
    assert torch.equal(whole, blocks.all(3).all(1))
    # An interval that ends before a block and one that begins after it may leave it out though it is touched.
    assert not (blocks.any(3).any(1) & ~(partial | whole)).any()
    assert not (partial & whole).any()
    if seed == 3:
        assert whole.any()


def dense(queries, keys, values, seen):
    index = torch.arange(len(keys), device=keys.device)
    mask = (seen.first[:, None] <= index) & (index < seen.end[:, None])
    return attend(queries[None], keys[None], values[None], mask[None])[0].view_as(queries)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    ("num_rows", "num_keys", "heads", "kv_heads", "head_dim"),
    [
        (300, 500, 4, 2, 32),
        (128, 128, 2, 2, 64),
        (1000, 700, 8, 1, 128),
        (1, 1, 4, 4, 64),
        (130, 4000, 10, 2, 96),
    ],
)
def test_attention_to_intervals(device, num_rows, num_keys, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    queries = torch.randn(num_rows, heads, head_dim, device=device)
    keys, values = (torch.randn(num_keys, kv_heads, head_dim, device=device) for _ in range(2))
    seen = Intervals(*(bound.to(device) for bound in intervals(num_rows, num_keys, num_rows)))
    inputs = [part.requires_grad_() for part in (queries, keys, values)]
    output, log_sum = interval_attention(queries, keys, values, seen)
    expected = dense(queries, keys, values, seen)
    close = {"atol": 2e-5, "rtol": 2e-4} if device == "cpu" else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(output, expected, **close)
    nothing = seen.first >= seen.end
    assert (output[nothing] == 0).all() and (log_sum[nothing] == NOTHING).all()
    upstream, weights = torch.randn_like(output), torch.rand_like(log_sum)
    found = torch.autograd.grad((output * upstream).sum() + (log_sum * weights).sum(), inputs)
    index = torch.arange(num_keys, device=device)
    mask = (seen.first[:, None] <= index) & (index < seen.end[:, None])
    scores = torch.einsum("rhd,shd->hrs", queries, keys.repeat_interleave(heads // kv_heads, 1)) * head_dim**-0.5
    sums = scores.masked_fill(~mask, NOTHING).logsumexp(-1).T.masked_fill(nothing[:, None], NOTHING)
    torch.testing.assert_close(log_sum, sums, **close)
    wanted = torch.autograd.grad((expected * upstream).sum() + (sums * weights).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("num_rows", "num_keys", "heads"), [(300, 500, 4), (130, 1000, 2), (1, 1, 2)])
def test_flex_attention_without_compiling(monkeypatch, num_rows, num_keys, heads):
    """Masks, padding and sums are those of the CPU; kernels are tested on GPUs."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    queries, keys, values = torch.randn(num_rows, heads, 32), torch.randn(num_keys, 2, 32), torch.randn(num_keys, 2, 32)
    seen = intervals(num_rows, num_keys, num_rows)
    output, log_sum = attention._flex(queries, keys, values, seen, 0.3)
    expected, expected_sum = interval_attention(queries, keys, values, seen, 0.3)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum, expected_sum)


@needs_gpu
@pytest.mark.parametrize("samples", SAMPLES)
def test_flex_attention_computes_what_the_cpu_does(samples):
    torch.manual_seed(1)
    withheld = (1, 2, 3, 4, 5)
    glide, embedding = layer(CONFIG, torch.float32), torch.randn(50, 32)
    lessons = [lesson(sample(*arguments), CONFIG, torch.float32) for arguments in SAMPLES[samples]]
    layout = lay_out([each.sample for each in lessons])
    expected = draft_hidden(glide, embedding[layout.ids], pack(lessons, layout, "cpu"), withheld)
    found = draft_hidden(glide.cuda(), embedding.cuda()[layout.ids.cuda()], pack(lessons, layout, "cuda"), withheld)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-2, rtol=2e-2)
