"""`generate()` in every mode against the same model with attention by loops; training, threads, copies, dtypes."""

import copy
import io
import threading

import pytest
import torch
from sparse_models import (
    OTHER_STACK,
    SMALL_STACK,
    STACK,
    build,
    by_loops,
    differ,
    generate,
    left_padded,
    logits,
    prompt,
    selections,
    sparse,
)
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import sdpa_mask

import sah_transformers
from sah_transformers.integration.attention_function import sah_mask

IDS = prompt(13)
REPEATING = torch.cat([prompt(6), prompt(6), prompt(3)], dim=1)  # something to look up

# (model, configuration, stack of each call for the loops)
MODELS = {
    "llama": ("LlamaForCausalLM", {"maskers": STACK}, lambda *_: STACK),
    "half dense": (
        "LlamaForCausalLM",
        {"maskers": STACK, "dense_layers": [0]},
        lambda layer, *_: STACK if layer == 1 else [],
    ),
    "qwen3 top-p": ("Qwen3ForCausalLM", {"maskers": OTHER_STACK}, lambda *_: OTHER_STACK),
    "gemma3": ("Gemma3ForCausalLM", {"maskers": STACK}, lambda layer, *_: STACK if layer == 1 else []),
    "mistral": ("MistralForCausalLM", {"maskers": SMALL_STACK, "sliding_layers": "sparse"}, lambda *_: SMALL_STACK),
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunks of one": {"prefill_chunk_size": 1},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "two static caches": {"cache_implementation": "static", "num_return_sequences": 2, "do_sample": True},
}


def both(name, **options):
    kind, config, stack_of = MODELS[name]
    return sparse(config, name=kind, **options), by_loops(stack_of, name=kind, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_modes(name, mode):
    ids = REPEATING if mode == "prompt lookup" else IDS
    if mode == "static cache" and name == "mistral":
        pytest.skip("a static window and a dynamic one hold different keys beyond the window")
    answers = []
    for model in both(name):
        torch.manual_seed(0)
        answers.append(generate(model, ids, **MODES[mode]))
    assert torch.equal(*answers)


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked prefill", "static cache", "sampling"])
@pytest.mark.parametrize("name", ["llama", "qwen3 top-p", "gemma3"])
def test_left_padded_batches(name, mode):
    ids, mask = left_padded([prompt(n, seed=n) for n in (13, 4, 9)])
    answers = []
    for model in both(name):
        torch.manual_seed(0)
        answers.append(generate(model, ids, attention_mask=mask, **MODES[mode]))
    assert torch.equal(*answers)


def test_the_stacks_matter():
    for name, (kind, *_) in MODELS.items():
        assert differ(logits(both(name)[0], IDS), logits(build(kind), IDS)), name


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assistant_model(name):
    """A draft that is right often but not always: guesses are taken, and guesses are cropped."""
    model, truth = both(name)
    assistant = build(MODELS[name][0])
    assistant.load_state_dict(model.state_dict())
    calls = []
    handle = model.register_forward_hook(
        lambda m, args, kwargs, out: calls.append(out.logits.shape[1]), with_kwargs=True
    )
    answer = generate(model, IDS, new=12, assistant_model=assistant)
    handle.remove()
    assert torch.equal(answer, generate(truth, IDS, new=12))
    assert any(n > 1 for n in calls[1:])
    assert len(calls) > 2


@pytest.mark.parametrize("prefill", ["same", "dense"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_prefilled_cache_continued_with_a_question(prefill, cache_class):
    model = sparse({"maskers": STACK, "prefill": prefill})
    truth = by_loops(lambda layer, queries, keys: [] if prefill == "dense" and queries == keys else STACK)
    answers = []
    for one in (model, truth):
        options = {"config": one.config, "max_cache_len": 40} if cache_class is StaticCache else {}
        if cache_class is StaticCache and one is truth:
            options, cache = {}, DynamicCache()
        else:
            cache = cache_class(**options)
        logits(one, IDS, past_key_values=cache)
        answers.append(generate(one, torch.cat([IDS, prompt(4, seed=1)], 1), past_key_values=cache))
    assert torch.equal(*answers)


def test_one_token_prompts_and_one_new_token():
    model, truth = both("llama")
    for length, new in ((1, 6), (1, 1), (5, 1)):
        assert torch.equal(generate(model, prompt(length), new=new), generate(truth, prompt(length), new=new))


def test_inputs_embeds():
    model, truth = both("llama")
    answers = []
    for one in (model, truth):
        embeds = one.get_input_embeddings()(IDS)
        with torch.no_grad():
            answers.append(one.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)


# Attention weights


def test_attention_weights_are_returned_only_when_asked():
    model = sparse()
    assert not model(IDS).attentions
    with selections() as log, torch.no_grad():
        out = model(IDS, output_attentions=True)
    assert len(out.attentions) == 2
    assert not differ(out.logits, logits(model, IDS))
    for layer, weights in enumerate(out.attentions):
        assert weights.shape == (1, 4, 13, 13)
        entry = next(e for e in log if e.layer == layer)
        scores = entry.scores.masked_fill(entry.mask == 0, -torch.inf)
        assert torch.allclose(weights.double(), scores.double().softmax(-1), atol=1e-6)


def test_attention_weights_in_generate_and_with_dense_layers():
    model = sparse({"maskers": STACK, "dense_layers": [0]})
    eager = build(attn="eager")
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    assert [len(step) for step in out.attentions] == [2, 2, 2]
    assert [step[0].shape[-1] for step in out.attentions] == [13, 14, 15]
    first = eager(IDS, output_attentions=True).attentions[0]
    assert torch.allclose(out.attentions[0][0], first, atol=1e-5)
    assert (out.attentions[1][1] > 0).sum(-1).max() == 8  # 2 + 3 + 3 keys
    assert torch.equal(out.sequences[:, 13:], generate(sparse({"maskers": STACK, "dense_layers": [0]}), IDS, new=3))


# Training


def loss_and_gradients(model, ids, mask=None):
    model.zero_grad()
    loss = model(ids, labels=ids, attention_mask=mask).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, padded):
    ids, mask = left_padded([prompt(n, seed=n) for n in (13, 8)]) if padded else (prompt(13, batch=2), None)
    model = sparse().train()
    loss, gradients = loss_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, other = loss_and_gradients(model, ids, mask)
    assert not differ(loss, again)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.allclose(gradient, other[name], atol=1e-9), name


def test_gradients_are_those_of_a_model_masked_by_hand():
    """Eager attention with what was selected as its mask: same loss, same gradients in every parameter."""
    model = sparse(STACK, num_hidden_layers=1).train()
    with selections() as log:
        loss, gradients = loss_and_gradients(model, IDS)
    assert len({entry.layer for entry in log}) == 1
    hidden = torch.finfo(torch.float64).min
    bias = torch.zeros_like(log[0].mask, dtype=torch.float64).masked_fill(log[0].mask == 0, hidden)
    plain = build(num_hidden_layers=1, attn="eager").train()
    right, expected = loss_and_gradients(plain, IDS, bias)
    assert not differ(loss, right)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def test_dropout_only_in_training():
    model = sparse(STACK, attention_dropout=0.5)
    assert torch.equal(logits(model, IDS), logits(sparse(), IDS))
    model.train()
    torch.manual_seed(0)
    one = logits(model, IDS)
    assert differ(one, logits(model, IDS))
    torch.manual_seed(0)
    assert torch.equal(one, logits(model, IDS))


# Threads, copies, files, dtypes


def test_threads_generating_at_once():
    """Two models with different stacks, one of them shared by two threads with sequences of equal length."""
    first, second = sparse(STACK), sparse(OTHER_STACK)
    jobs = [(first, prompt(13, seed=1)), (first, prompt(13, seed=2)), (second, prompt(13, seed=1))] * 2
    expected = [generate(model, ids, new=10) for model, ids in jobs]
    found, failures = [None] * len(jobs), []

    def work(i):
        try:
            for _ in range(3):
                found[i] = generate(*jobs[i], new=10)
                assert torch.equal(found[i], expected[i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not torch.equal(expected[0], expected[2])


def test_a_deep_copy_is_a_model_of_its_own():
    model = sparse()
    generate(model, IDS)
    other = copy.deepcopy(model)
    sah_transformers.enable(other, OTHER_STACK)
    assert torch.equal(generate(model, IDS), generate(sparse(), IDS))
    assert torch.equal(generate(other, IDS), generate(sparse(OTHER_STACK), IDS))
    sah_transformers.disable(model)
    assert torch.equal(generate(other, IDS), generate(sparse(OTHER_STACK), IDS))
    assert torch.equal(generate(model, IDS), generate(build(), IDS))


@pytest.mark.parametrize("used", [False, True])
def test_a_pickled_model(used):
    model = sparse()
    if used:
        generate(model, IDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(generate(other, IDS), generate(model, IDS))
    with selections() as log:
        generate(other, IDS, new=2)
    assert log


def test_nothing_keeps_the_cache_alive():
    import gc
    import weakref

    model, cache = sparse(), DynamicCache()
    logits(model, IDS, past_key_values=cache)
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype):
    """Everything selected is dense attention, in each dtype; a sparse stack gives finite numbers of that dtype."""
    ids, mask = left_padded([prompt(13, seed=1), prompt(6, seed=2)])
    whole = sparse([{"type": "oracle_top_k", "heavy_size": 1.0}], dtype=dtype)
    exact, plain = build(), build(dtype=dtype, attn="eager")
    right = logits(exact, ids, attention_mask=mask)[mask.bool()]
    ours, theirs = (logits(m, ids, attention_mask=mask)[mask.bool()].double() for m in (whole, plain))
    assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 1e-5
    model = sparse(dtype=dtype)
    out = logits(model, ids, attention_mask=mask)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert generate(model, ids, attention_mask=mask).shape == (2, 8)
    near = (out[mask.bool()].double() - logits(sparse(), ids, attention_mask=mask)[mask.bool()]).abs()
    assert near.median() < 0.1


def test_packed_positions_without_a_cache():
    """Transformers finds two packed sequences by their positions: neither attends to the other."""
    one, two = prompt(8, seed=1), prompt(6, seed=2)
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None]
    model = sparse()
    packed = logits(model, torch.cat([one, two], 1), position_ids=positions, use_cache=False)
    assert not differ(packed[:, :8], logits(model, one))
    assert not differ(packed[:, 8:], logits(model, two))


def test_a_mask_of_the_users_own():
    """4-D, boolean or additive, hiding some past keys: the loops see the same mask."""
    hidden = torch.rand(1, 1, 13, 13, generator=torch.Generator().manual_seed(0)) < 0.3
    visible = torch.ones(13, 13, dtype=torch.bool).tril()[None, None] & ~(hidden & ~torch.eye(13, dtype=torch.bool))
    additive = torch.zeros(1, 1, 13, 13, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    model, truth = both("llama")
    for mask in (visible, additive):
        found = logits(model, IDS, attention_mask=mask)
        assert not differ(found, logits(truth, IDS, attention_mask=mask))
        assert differ(found, logits(model, IDS))


@pytest.mark.core
@pytest.mark.parametrize("kind", ["no padding", "padding", "padding of the whole buffer"])
@pytest.mark.parametrize("offset", [6, torch.tensor(6)], ids=["host", "device"])
def test_a_steps_mask_is_that_of_transformers(kind, offset):
    """Made by fewer operators."""
    real = torch.rand(3, 12 if kind.endswith("buffer") else 7, generator=torch.Generator().manual_seed(0)) < 0.5
    given = {"batch_size": 3, "q_length": 1, "kv_length": 12, "q_offset": offset, "allow_is_causal_skip": False}
    given["attention_mask"] = None if kind == "no padding" else real
    found, right = sah_mask(**given), sdpa_mask(**given)
    assert found.shape == right.shape == (3, 1, 1, 12)
    assert torch.equal(found, right)


@pytest.mark.parametrize(
    "config", [STACK, {"maskers": STACK, "dense_layers": [0]}, {"maskers": STACK, "prefill": "dense"}]
)
def test_the_prompt_of_a_static_cache_needs_no_mask(config, monkeypatch):
    """As many queries times as many keys as the cache may hold would be 16 GiB for 128K tokens."""
    from sah_transformers.integration import attention_function

    masks, original = [], attention_function.sdpa_mask

    def mask(**arguments):
        masks.append((arguments["q_length"], original(**arguments)))
        return masks[-1][1]

    monkeypatch.setattr(attention_function, "sdpa_mask", mask)
    model = sparse(config)
    found = generate(model, IDS, cache_implementation="static")
    assert all(mask is None or mask.numel() <= 13 for queries, mask in masks if queries > 1)
    assert torch.equal(found, generate(model, IDS))
    ids, padding = left_padded([prompt(13), prompt(6, seed=1)])
    found = generate(model, ids, attention_mask=padding, cache_implementation="static")
    assert torch.equal(found, generate(model, ids, attention_mask=padding))
