"""`sah eval`: which rows are sparse, what is scored, that stacks do not meet, and that the figures are right."""

import functools
import json
import re

import pytest
import torch
from sparse_models import build, by_position, prompt, selections
from test_cli import sah
from test_invariances import assert_same_selections, every_stack

import sah_transformers
from sah_transformers import evaluate
from sah_transformers.evaluate import Prompt, Stack, cut, evaluate_needle, evaluate_text, make_prompt, over_budgets
from sah_transformers.evaluate.mass import measuring
from sah_transformers.evaluate.prompts import CITIES, HAYSTACK, QUESTION, sentences_of
from sah_transformers.evaluate.reading import decode, read, sparse
from sah_transformers.evaluate.text import compare

WINDOWS = [{"type": "sink", "sink_size": 2}, {"type": "local", "window_size": 3}]
STACKS = {
    "windows": WINDOWS,
    "top-k": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 4}],
    "quest": [*WINDOWS, {"type": "quest", "heavy_size": 8, "page_size": 4}],
    "pq": [*WINDOWS, {"type": "pq_cache", "heavy_size": 6, "pq_sub_dim": 4, "pq_bits": 2}],
    "random": [*WINDOWS, {"type": "random_sampling", "sampling_rate": 0.3}],
    "causal": [{"type": "causal"}],
}
CHAT = "{% for m in messages %}<u>{{ m.content | trim }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def stack(name, **fields):
    fields = {"maskers": STACKS[name], **fields}
    return Stack(name, sah_transformers.SparseAttentionConfig.from_dict(fields))


def haystack():
    return HAYSTACK.read_text(encoding="utf-8")


@functools.cache
def tokenizer(merges=300, bos=False, chat=False):
    """A byte-pair tokenizer trained on the haystack."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([haystack()], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    fast.chat_template = CHAT if chat else None
    return fast


def answered(model, length=40, question=9, seed=0, right=True):
    """A prompt of random tokens whose answer is what `model` says, or (not `right`) ends otherwise."""
    ids = prompt(length, seed=seed)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[:, length:]
    if not right:
        answer[0, -1] = (answer[0, -1] + 1) % 90
    return Prompt("single", length, 0.5, seed, ids, answer, length - question, range(10, 16), "1234567")


# the text


def test_the_haystack_is_varied_prose():
    text = haystack()
    sentences = sentences_of(text)
    words = text.lower().split()
    assert 5000 <= len(words) <= 6500
    assert len(set(sentences)) == len(sentences)
    runs = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    assert len(set(runs)) == len(runs)
    assert not re.search(r"\d", text)
    assert not set(re.findall(r"[a-z]+", text.lower())) & set(CITIES)


# prompts


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [{}, {"merges": 0}, {"bos": True}, {"chat": True}])
def test_prompts_know_where_their_parts_are(kind, depth, task):
    tok = tokenizer(**kind)
    length = 1500 if kind.get("merges") == 0 else 900
    made = make_prompt(tok, haystack(), task, length, depth, seed=3)
    text = tok.decode(made.ids[0])
    needle = tok.decode(made.ids[0, made.needle.start : made.needle.stop]).strip()
    assert re.fullmatch(rf"One of the special magic numbers for \w+ is: {made.number}\.", needle)
    city = needle.split()[-3]
    question = tok.decode(made.ids[0, made.question :]).strip()
    assert question.startswith(QUESTION.format(city=city))
    assert question.endswith(f"The special magic number for {city} mentioned in the provided text is")
    assert tok.decode(made.answer[0]).strip() == made.number
    assert text.count("special magic numbers for") == (4 if task == "multi" else 1)
    assert len(set(re.findall(r"\d{7}", text))) == (4 if task == "multi" else 1)
    assert length - 200 < made.ids.shape[1] <= length
    assert ("<u>" in text) == bool(kind.get("chat"))
    if "bos" in kind:
        assert made.ids[0].tolist().count(0) == 1
    sentences = sentences_of(text.split("afterwards.", 1)[1].split(f"What is the special magic number for {city}")[0])
    assert sentences.index(needle) == round(depth * (len(sentences) - 1))


def test_prompts_are_deterministic_and_differ_by_seed():
    a, b, c = (make_prompt(tokenizer(), haystack(), "multi", 900, 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(a.ids, b.ids)
    assert a.number == b.number != c.number
    assert not torch.equal(a.ids[:, 50:90], c.ids[:, 50:90])


def test_prompts_that_cannot_be_made():
    with pytest.raises(ValueError, match="length 90,000 is more than the text gives"):
        make_prompt(tokenizer(), haystack(), "single", 90_000, 0.5, 0)
    with pytest.raises(ValueError, match="length 50 leaves no room"):
        make_prompt(tokenizer(), haystack(), "single", 50, 0.5, 0)
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\]"):
        make_prompt(tokenizer(), haystack(), "single", 900, 1.5, 0)
    with pytest.raises(ValueError, match="task must be one of single, multi"):
        make_prompt(tokenizer(), haystack(), "double", 900, 0.5, 0)


def test_segments_of_a_text():
    tok = tokenizer(bos=True)
    ids = tok(haystack())["input_ids"]
    parts = cut(tok, haystack(), 100, 3)
    assert [part.shape for part in parts] == [(1, 100)] * 3
    assert all(part[0, 0] == 0 and (part[0, 1:] != 0).all() for part in parts)
    assert parts[0][0].tolist() == ids[:100]
    apart = (len(ids) - 1 - 3 * 99) // 2  # tokens between two segments
    assert parts[2][0, 1:].tolist() == ids[1 + 2 * (99 + apart) :][:99]
    with pytest.raises(ValueError, match="200 segments of 1,000 tokens need"):
        cut(tok, haystack(), 1000, 200)


# stacks


def test_budgets_replace_the_heavy_size_everywhere():
    one = stack("top-k", layers={"1": STACKS["quest"]}, prefill="same")
    many = over_budgets(one, [0.1, 0.5])
    assert [two.label for two in many] == ["top-k @ 0.1", "top-k @ 0.5"]
    assert [two.config.maskers[2].heavy_size for two in many] == [0.1, 0.5]
    assert [two.config.layers["1"][2].heavy_size for two in many] == [0.1, 0.5]
    assert many[0].config.prefill == "dense"
    assert over_budgets(stack("windows"), [0.1]) == [stack("windows")]
    assert [two.config.maskers[2].sampling_rate for two in over_budgets(stack("random"), [0.1, 0.5])] == [0.1, 0.5]
    with pytest.raises(ValueError, match="budgets must be"):
        over_budgets(one, [1.5])
    with pytest.raises(ValueError, match="sampling_rate must be"):
        over_budgets(stack("random"), [8])


# the needle


def test_only_prompts_that_dense_attention_answers_are_scored():
    model = build()
    prompts = [answered(model, seed=0), answered(model, seed=1, right=False)]
    told = []
    outcomes = list(evaluate_needle(model, prompts, [stack("causal"), stack("windows")], tell=told.append))
    assert [one.dense for one in outcomes] == [True, False]
    assert [len(one.answers) for one in outcomes] == [4, 0]
    assert all(one.found for one in outcomes[0].answers if one.stack.name == "causal")
    assert told[0] == "dense attention answers"
    assert told[-1] == "dense attention fails"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("most", [64, 4])
def test_the_setups_differ_in_which_rows_are_sparse(most):
    model = build()
    made = answered(model, length=40, question=9)
    one = stack("top-k", decode_max_queries=most)
    for setup, first, rows in (("A", 39, 4), ("B", 31, 12)):
        with selections() as log:
            outcome = next(evaluate_needle(model, [made], [one], [setup]))
        seen = sorted(position for entry in log if entry.layer == 0 for position in entry.rows)
        assert seen == list(range(first, first + rows))
        assert outcome.answers[0].rows == rows
        assert {entry.layer for entry in log} == set(range(model.config.num_hidden_layers))


def test_the_answer_is_what_generate_gives():
    """Setup B by `generate` on a densely read text: the number is found where and only where the tokens agree."""
    model = build()
    found = []
    for seed in range(6):
        made = answered(model, seed=seed)
        answer = next(evaluate_needle(model, [made], [stack("windows")], ["B"])).answers[0]
        cache = read(model, made.ids[:, : made.question])
        sah_transformers.enable(model, stack("windows").config)
        out = model.generate(made.ids, past_key_values=cache, max_new_tokens=4, do_sample=False)[:, made.ids.shape[1] :]
        sah_transformers.disable(model)
        assert answer.found == torch.equal(out, made.answer)
        found.append(answer.found)
    assert not all(found)


def test_stacks_do_not_meet():
    model = build()
    prompts = [answered(model, length=60, seed=seed) for seed in range(2)]
    stacks = [stack(name) for name in STACKS]
    together = list(evaluate_needle(model, prompts, stacks))
    backwards = list(evaluate_needle(model, prompts[::-1], stacks[::-1], ["B", "A"]))
    for one, other in zip(together, backwards[::-1], strict=True):
        assert one.answers == other.answers[::-1]
    for one in stacks:
        alone = list(evaluate_needle(model, prompts, [one]))
        assert [a for o in alone for a in o.answers] == [a for o in together for a in o.answers if a.stack == one]


# the text


@pytest.mark.parametrize("name", ["causal", "windows", "top-k", "quest"])
def test_divergence_and_agreement(name):
    """Against the whole rest in one sparse call, and PyTorch's own divergence."""
    model, ids, one = build(), prompt(50, seed=5), stack(name)
    (found,) = next(evaluate_text(model, [ids], 30, [one]))
    with torch.no_grad():
        dense = model(ids).logits[0, 30:].log_softmax(-1)
        sah_transformers.enable(model, one.config)
        cache = model(ids[:, :30], use_cache=True).past_key_values
        other = model(ids[:, 30:], past_key_values=cache).logits[0].log_softmax(-1)
        sah_transformers.disable(model)
    kl = torch.nn.functional.kl_div(other, dense, log_target=True, reduction="none").sum(-1).mean()
    assert found.tokens == 20
    assert found.kl == pytest.approx(kl.item(), abs=1e-9)
    assert found.agreement == (dense.argmax(-1) == other.argmax(-1)).double().mean()
    if name == "causal":
        assert abs(found.kl) < 1e-9
        assert found.agreement == found.density == 1
        assert found.recall == pytest.approx(1)
    else:
        assert found.kl > 1e-4
        assert 0 < found.density < 1


def test_text_stacks_do_not_meet():
    model, ids = build(), [prompt(60, seed=seed) for seed in range(2)]
    stacks = [stack(name) for name in STACKS]
    together = list(evaluate_text(model, ids, 40, stacks))
    for i, one in enumerate(stacks):
        assert [found[0] for found in evaluate_text(model, ids, 40, [one])] == [found[i] for found in together]


def test_compare_takes_tokens_that_are_ruled_out_and_shows_nan():
    ruled_out = torch.tensor([[1.0, 2.0, float("-inf")]]).log_softmax(-1)
    assert compare(ruled_out, ruled_out) == (0.0, 1.0)
    assert compare(ruled_out, torch.full((1, 3), float("nan")))[0] != 0.0


# decoding


@every_stack
def test_rows_of_one_call_select_what_they_select_one_by_one(stack):
    """Windows and pages are far shorter than the calls; the text before them is long enough for codebooks."""
    model, ids = build(), prompt(60, seed=3)
    config = sah_transformers.SparseAttentionConfig.from_dict({"maskers": stack, "prefill": "dense"})
    found = []
    for most in (1, 16, 64):
        cache = read(model, ids[:, :20])
        with sparse(model, config), selections() as log:
            found.append((decode(model, ids[:, 20:], cache, most), by_position(log)))
    for logits, selected in found[1:]:
        torch.testing.assert_close(logits, found[0][0])
        assert_same_selections(selected, found[0][1], exact=True)


# mass


def test_mass_is_what_record_says():
    model = build()
    ids, one = prompt(40), stack("top-k")
    with sah_transformers.record(sah_transformers.enable(model, one.config)) as log:
        decode(model, ids[:, 34:], read(model, ids[:, :34]))
    with measuring(model) as mass:
        decode(model, ids[:, 34:], read(model, ids[:, :34]))
    assert mass.recall == pytest.approx(log.mean("recall"))
    assert mass.density == pytest.approx(9 * 6 / sum(range(35, 41)))
    assert mass.needle_recall is None
    assert set(mass.rows.values()) == {6}


def test_needle_recall_is_the_mass_on_its_keys():
    """One layer, so that dense attention's own weights are those the sparse rows see."""
    model = build(num_hidden_layers=1, attn="eager")
    ids, needle = prompt(30), range(22, 27)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0, :, 26:]  # rows 26 to 29
    key, row = torch.arange(30), torch.arange(26, 30)[:, None]
    active = (key < 2) | ((key > row - 3) & (key <= row))
    inside = (key >= needle.start) & (key < needle.stop)
    sah_transformers.enable(model, stack("windows").config)
    with measuring(model, needle) as mass:
        decode(model, ids[:, 26:], read(model, ids[:, :26]))
    assert mass.needle_recall == pytest.approx(((weights * (active & inside)).sum() / (weights * inside).sum()).item())
    assert mass.recall == pytest.approx((weights * active).sum(-1).mean().item())
    nothing = sah_transformers.disable(model)
    with measuring(nothing) as mass:
        decode(nothing, ids[:, 26:], read(nothing, ids[:, :26]))
    assert mass.recall is mass.density is mass.needle_recall is None


# the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random Llama with a tokenizer of the haystack."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    tokenizer(chat=True).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 557}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None)).save_pretrained(path)
    return path


TEXT = ["--segments", 2, "--context", 60, "--tokens", 5]
NEEDLE = ["--lengths", "500,600", "--depths", "0.5", "--seeds", 1, "--tasks", "single"]
JSON_STACK = json.dumps(STACKS["top-k"])


def test_eval_text(folder, tmp_path):
    out = sah(
        "eval", "text", folder, *TEXT, "--sparse", JSON_STACK, "--sparse", "streaming_llm", "--json", tmp_path / "x"
    )
    assert "sink 2 + local 3 + oracle_top_k 4" in out
    data = json.loads(out.strip().splitlines()[-1])
    assert data["complete"]
    assert data["settings"] == {"segments": 2, "context": 60, "tokens": 5}
    assert [row["tokens"] for row in data["summary"]] == [10, 10]
    top_k, windows = data["summary"]
    assert 0 < top_k["kl"] < 1
    assert abs(windows["kl"]) < 1e-5  # 516 keys are all of them
    assert windows["agreement"] == windows["density"] == 1
    assert {config["prefill"] for config in data["stacks"].values()} == {"dense"}
    written = json.loads((tmp_path / "x").read_text())
    assert len(written.pop("segments")) == 4
    assert written["summary"] == data["summary"]
    again = json.loads(sah("eval", "text", folder, *TEXT, "--sparse", JSON_STACK).strip().splitlines()[-1])
    assert again["summary"] == data["summary"][:1]


def test_eval_needle_with_a_model_that_knows_nothing(folder, tmp_path):
    out = sah("eval", "needle", folder, *NEEDLE, "--sparse", JSON_STACK, "--json", tmp_path / "x")
    assert "dense attention answers 0 of 2 prompts" in out
    assert "0 of 0" in out
    data = json.loads(out.strip().splitlines()[-1])
    assert [(row["length"], row["setup"]) for row in data["summary"]][:3] == [(500, "A"), (500, "B"), (600, "A")]
    assert all(row["share"] is None for row in data["summary"])
    assert not any(one["dense"] for one in json.loads((tmp_path / "x").read_text())["prompts"])


def test_eval_needle_counts(folder, monkeypatch):
    """The random model is given what it answers: the causal stack finds all of it."""
    make = make_prompt

    def answerable(tok, *arguments):
        from dataclasses import replace

        from transformers import AutoModelForCausalLM

        made, model = make(tok, *arguments), AutoModelForCausalLM.from_pretrained(folder)
        out = model.generate(made.ids, attention_mask=torch.ones_like(made.ids), max_new_tokens=4, do_sample=False)
        return replace(made, answer=out[:, made.ids.shape[1] :])

    monkeypatch.setattr(evaluate, "make_prompt", answerable)
    out = sah("eval", "needle", folder, *NEEDLE, "--sparse", '[{"type": "causal"}]', "--setups", "A")
    assert "dense attention answers 2 of 2 prompts" in out
    (short, long, both) = json.loads(out.strip().splitlines()[-1])["summary"]
    assert (short["found"], short["scored"], long["found"], both["found"], both["length"]) == (1, 1, 1, 2, "all")
    assert both["recall"] == pytest.approx(1)
    assert both["needle_recall"] == pytest.approx(1)


def test_eval_draws_curves(folder, tmp_path):
    pytest.importorskip("matplotlib")
    options = [
        "--sparse",
        f"exact={JSON_STACK}",
        "--sparse",
        "streaming_llm",
        "--budgets",
        "0.5,0.1",
        "--plot",
        tmp_path / "x.png",
    ]
    data = json.loads(sah("eval", "text", folder, *TEXT, *options).strip().splitlines()[-1])
    assert [row["budget"] for row in data["summary"]] == [0.1, 0.5, None]
    assert [row["stack"] for row in data["summary"]] == ["exact", "exact", "streaming_llm"]
    assert data["summary"][0]["recall"] < data["summary"][1]["recall"]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    sah("eval", "needle", folder, *NEEDLE, *options[:-1], tmp_path / "y.png")
    assert (tmp_path / "y.png").is_file()


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_evaluation_keeps_what_is_done(folder, monkeypatch, done):
    from typer.testing import CliRunner

    from sah_transformers.cli import app

    def interrupted(*arguments):
        every = evaluate_text(*arguments)
        for _ in range(done):
            yield next(every)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_text", interrupted)
    command = ["eval", "text", str(folder), *map(str, TEXT), "--sparse", JSON_STACK]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert f"interrupted: {done} of 2 done" in result.stderr
    if done:
        data = json.loads(result.stdout.strip().splitlines()[-1])
        assert not data["complete"]
        assert data["summary"][0]["segments"] == 1
    else:
        assert not result.stdout


def test_eval_wrong_use(folder, tmp_path):
    text, needle = ["eval", "text", folder, *TEXT], ["eval", "needle", folder, "--sparse", JSON_STACK]
    for command in (text, needle[:3]):
        assert "give --sparse at least once" in sah(*command, code=2)
        assert "did you mean 'oracle_top_k'?" in sah(*command, "--sparse", "orakle_top_k", code=2)
        assert "names 'oracle_top_k' twice" in sah(
            *command, "--sparse", "oracle_top_k", "--sparse", "oracle_top_k", code=2
        )
    text += ["--sparse", JSON_STACK]
    assert "2 segments of 100,065 tokens need" not in sah(*text, "--context", 100_060, code=2)  # the model's positions
    assert "more than the model's 2,048 positions" in sah(*text, "--context", 100_060, code=2)
    assert "--segments, --context, --tokens: 90 segments" in sah(*text, "--segments", 90, "--context", 900, code=2)
    assert "--json: no such folder" in sah(*text, "--json", tmp_path / "no" / "x.json", code=2)
    assert "--plot must end in" in sah(*text, "--plot", "x.jpg", code=2)
    assert "give --budgets" in sah(*text, "--plot", "x.png", code=2)
    assert "--budgets takes numbers" in sah(*text, "--budgets", "a", code=2)
    assert "--budgets: must be an int >= 1" in sah(*text, "--budgets", "2.5", code=2)
    assert "has a heavy_size" in sah(*text[:-1], "streaming_llm", "--budgets", "0.1", code=2)
    assert "--text: no such file" in sah(*text, "--text", tmp_path / "no.txt", code=2)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "no text in UTF-8" in sah(*text, "--text", tmp_path / "bytes", code=2)
    assert "layer 9 does not exist" in sah(*text[:-1], json.dumps({"maskers": WINDOWS, "dense_layers": [9]}), code=2)
    pq = [{"type": "pq_cache", "heavy_size": 6, "pq_sub_dim": 3, "pq_bits": 2}]
    assert "pq_sub_dim" in sah(*text[:-1], json.dumps(pq), code=2)
    assert "--tasks takes single, multi" in sah(*needle, "--tasks", "triple", code=2)
    assert "--setups takes A, B" in sah(*needle, "--setups", "A,C", code=2)
    assert "--lengths takes whole numbers" in sah(*needle, "--lengths", "1.2K", code=2)
    assert "--depths takes numbers" in sah(*needle, "--depths", "half", code=2)
    assert "depth must be in [0, 1]" in sah(*needle, "--depths", "2", "--lengths", "500", code=2)
    assert "length 60 leaves no room" in sah(*needle, "--lengths", "60", code=2)
