"""model.py: equal to transformers and peft where they do the same, and where they do not, to what a mask means."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import PLANS, VOCAB, pad, prompt, prompts, spread, tiny_config, tiny_model, weights_root
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hatllm import InputError, Layout, layout
from model import (
    Cache,
    Config,
    Llama,
    LoRALinear,
    add_lora,
    attend,
    load,
    load_lora,
    merge_lora,
    save,
    save_lora,
)

CLOSE = dict(rtol=1e-5, atol=1e-5)
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY |= dict(vocab_size=VOCAB, attn_implementation="eager", eos_token_id=3)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)  # head width 16 has a kept, a blended and stretched frequencies
SPREAD_HEADS = dict(head_dim=16)  # 4 x 16, not the hidden size


def write_hf(folder, cls=LlamaForCausalLM, config=LlamaConfig, shard="1GB", **changes):
    """A folder as transformers writes it, with spread-out weights, and the model in it."""
    model = spread(cls(config(**TINY | changes))).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def random_tokens(B: int = 2, T: int = 100) -> torch.Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens, layout(torch.zeros_like(tokens))))


def assert_equal_to(hf, ours: Llama, tokens=None, **tolerance):
    tokens = random_tokens() if tokens is None else tokens
    with torch.no_grad():
        want = hf(tokens).logits
    assert want.std() > 0.3, "logits too flat to tell anything"
    assert_close(logits(ours, tokens), want, **CLOSE | tolerance)


# --- equal to transformers ------------------------------------------------------------------------------------------

FAMILIES = {
    "gqa": (LlamaForCausalLM, LlamaConfig, {}),
    "mha": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=4)),
    "mqa": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=1)),
    "tied": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    "head_dim": (LlamaForCausalLM, LlamaConfig, SPREAD_HEADS),
    "eps": (LlamaForCausalLM, LlamaConfig, dict(rms_norm_eps=0.1)),
    "theta": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        SPREAD_HEADS | dict(rope_parameters=LLAMA3 | dict(rope_theta=10000.0), max_position_embeddings=256),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 tied": (Qwen2ForCausalLM, Qwen2Config, dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(tmp_path, family):
    """Same logits from a folder that transformers wrote, over more tokens than llama3's original context."""
    cls, config, changes = FAMILIES[family]
    assert_equal_to(write_hf(tmp_path, cls, config, **changes), load(tmp_path))


def test_llama3_scaling_matters_here(tmp_path):
    """The test above would pass with the scaling ignored if it changed nothing: it does."""
    write_hf(tmp_path, **FAMILIES["llama3"][2])
    model = load(tmp_path)
    scaled = logits(model, random_tokens())
    model.rope.c = Config(**vars(model.config) | dict(rope_scaling=None))
    model.rope.freq = None
    assert (logits(model, random_tokens()) - scaled).abs().max() > 0.1


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "llama3"} | {k: LLAMA3[k] for k in [*LLAMA3][1:]}])
def test_config_of_transformers_4(tmp_path, scaling):
    """rope_theta and rope_scaling at the top level, as almost every published folder has them: theta 1e4 for 5e5 and
    a dropped scaling are the classic conversion bugs."""
    write_hf(tmp_path, **SPREAD_HEADS)
    c = json.loads((tmp_path / "config.json").read_text())
    c.pop("rope_parameters")
    c |= dict(rope_theta=5e5, rope_scaling=scaling, torch_dtype="float32", transformers_version="4.40.0")
    c["eos_token_id"] = [5, 7]  # Llama-3-Instruct has a list
    (tmp_path / "config.json").write_text(json.dumps(c))
    ours = load(tmp_path)
    assert ours.config.rope_theta == 5e5 and ours.config.eos_token_id == 5
    assert_equal_to(LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval(), ours)


@pytest.mark.parametrize("key", ["head_dim", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"])
def test_absent_or_null_keys_mean_what_they_mean_to_transformers(tmp_path, key):
    """Older folders leave keys out, or write null: a default of ours that differs is a silent error in every logit."""
    changes = dict(num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-6)
    write_hf(tmp_path, **changes)
    file = tmp_path / "config.json"
    c = json.loads(file.read_text())
    c.pop(key)
    file.write_text(json.dumps(c))
    theirs, ours = LlamaConfig.from_pretrained(tmp_path), Config.read(file)
    assert getattr(ours, key) == getattr(theirs, key)
    if key in ("head_dim", "num_key_value_heads"):
        file.write_text(json.dumps(c | {key: None}))
        assert getattr(Config.read(file), key) == getattr(theirs, key)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(qkv_bias=True), dict(head_dim=16)])
def test_save_is_read_by_transformers(tmp_path, changes):
    model = tiny_model(**changes)
    save(model, tmp_path / "new" / "folder")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder").eval()
    assert type(hf).__name__ == ("Qwen2ForCausalLM" if changes.get("qkv_bias") else "LlamaForCausalLM")
    assert_equal_to(hf, model)
    assert_equal_to(hf, load(tmp_path / "new" / "folder"))


def test_save_keeps_the_whole_config(tmp_path):
    """Also llama3's scaling, theta, eps and the end token: what load() reads is what save() was given."""
    c = tiny_config(head_dim=16, rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-6, eos_token_id=9)
    model = spread(Llama(c)).eval()
    save(model, tmp_path)
    again = Config.read(tmp_path / "config.json")
    assert again == Config(**vars(c) | dict(rope_scaling=again.rope_scaling)), "only rope_scaling may be spelled anew"
    assert LLAMA3.items() <= again.rope_scaling.items()
    assert_equal_to(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load(tmp_path))


def test_sharded_folder(tmp_path):
    hf = write_hf(tmp_path, shard="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert_equal_to(hf, load(tmp_path))


def test_a_plan_changes_the_masks_and_no_weight(tmp_path):
    write_hf(tmp_path)
    plain, hat = load(tmp_path), load(tmp_path, "IN:1 CR:1")
    assert hat.plan == [b.kind for b in hat.layers] == ["IN", "CR"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), hat.parameters(), strict=True))
    (tokens, item), *_ = prompts(1)
    assert (plain(tokens, layout(item)) - hat(tokens, layout(item))).abs().max() > 0.1


def test_smollm2_equals_transformers():
    """The default model, on real text: no tiny model has its depth, its width or its outliers."""
    folder = weights_root("smollm2-135m")
    from tokenizers import Tokenizer

    text = (
        "A customer of the beauty shop bought a lavender hand cream, two bars of olive oil soap and a wooden hair "
        "brush last year; the next thing that she will buy there is most likely a bottle of shampoo, or a towel."
    )
    tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids])
    assert tokens.shape[1] > 35
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_equal_to(hf, load(folder), tokens, rtol=1e-4, atol=1e-4)


def test_stored_logits():
    """The same check without transformers: weights from a formula, logits as transformers 5.23 computed them."""
    model = Llama(tiny_config(num_hidden_layers=2, head_dim=16, rope_scaling=LLAMA3))
    for k, p in enumerate(model.parameters()):
        p.data = (torch.arange(p.numel(), dtype=torch.float64) * (k + 1) * 0.37).sin().float().view_as(p)
    got = logits(model, torch.arange(60)[None] * 7 % VOCAB)[0, -1, :6]
    assert_close(got, torch.tensor([-0.8803, 0.1901, 0.5386, -1.1581, 1.5428, -1.6146]), rtol=1e-3, atol=1e-3)


# --- masks in the model ---------------------------------------------------------------------------------------------


def states(model: Llama, tokens, lay: Layout) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, lay)


def test_all_or_is_plain_causal(monkeypatch):
    """OR is what the baseline of every claim stands on: SDPA with is_causal gives the same."""
    model, tokens = tiny_model("OR"), random_tokens(2, 40)
    item = torch.randint(0, 4, tokens.shape)
    got, plain = states(model, tokens, layout(item)), F.scaled_dot_product_attention

    def causal(q, k, v, attn_mask):
        B, Hkv, GT, D = q.shape
        q = q.view(B, Hkv, -1, k.shape[2], D).flatten(1, 2)
        k, v = (x.repeat_interleave(q.shape[1] // Hkv, 1) for x in (k, v))
        return plain(q, k, v, is_causal=True).view(B, Hkv, GT, D)

    monkeypatch.setattr(F, "scaled_dot_product_attention", causal)
    assert_close(states(model, tokens, layout(item)), got, **CLOSE)


@pytest.mark.parametrize("plan", PLANS)
def test_padding_and_batch_size_change_nothing(plan):
    """A batch of unequal prompts gives each the states it has alone; padding is finite and nobody looks at it."""
    model, texts = tiny_model(plan), prompts(5)
    tokens, item = pad(texts)
    got = states(model, tokens, layout(item))
    assert got.isfinite().all()
    for b, (t, i) in enumerate(texts):
        assert_close(got[b : b + 1, : t.shape[1]], states(model, t, layout(i)), **CLOSE)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [4, 64])
def test_cached_chunks_equal_one_forward(plan, size):
    """Prefill, then chunks of one token and of several, through a cache that has to grow and one that has not."""
    model = tiny_model(plan)
    tokens, item = pad(prompts(3))
    full = layout(item)
    want, T = states(model, tokens, full), tokens.shape[1]
    cache, start = Cache(model.config, 3, size, model.head), 0
    for end in (9, 10, 11, 14, T):
        part = Layout(item[:, :end], full.pos[:, start:end], full.sees[:, start:end, :end])
        assert_close(states_of(model, tokens[:, start:end], part, cache), want[:, start:end], **CLOSE)
        start = end
        assert cache.n == end


def states_of(model, tokens, lay, cache):
    with torch.no_grad():
        return model(tokens, lay, cache)


def branched(seed: int):
    """A history with three continuations at different forks, as one text, and as (rows in it, separate text) pairs."""
    rng = random.Random(seed)
    item, branch, fork, apart = prompt(rng, 3), [], [], []
    trunk = len(item)
    branch, fork = [0] * trunk, [0] * trunk
    for b, f in enumerate((trunk, trunk - 3, 4), 1):
        tail = [0] * rng.randint(0, 2) + [9] * rng.randint(1, 3)
        apart.append((f, range(len(item), len(item) + len(tail))))
        item, branch, fork = item + tail, branch + [b] * len(tail), fork + [f] * len(tail)
    tokens = [rng.randrange(VOCAB) for _ in item]
    rows = [([*range(trunk)], slice(None))] + [([*range(f), *own], slice(f, None)) for f, own in apart]
    return *(torch.tensor([x]) for x in (tokens, item, branch, fork)), rows


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", [0, 1])
def test_branches_equal_separate_texts(plan, seed):
    """One history, many continuations: states and gradients of each as if it stood alone after its fork."""
    model = tiny_model(plan)
    tokens, item, branch, fork, rows = branched(seed)
    x = model.embed_tokens(tokens).detach().requires_grad_()
    got = model.blocks(x, layout(item, branch, fork))
    apart = [model.blocks(x[:, keep], layout(item[:, keep])) for keep, _ in rows]
    for (keep, own), want in zip(rows, apart, strict=True):
        assert_close(got[:, keep][:, own], want[:, own], **CLOSE)
    weight = torch.randn_like(got)
    one = torch.autograd.grad((got * weight).sum(), x)[0]
    loss = sum((want * weight[:, keep])[:, own].sum() for (keep, own), want in zip(rows, apart, strict=True))
    many = torch.autograd.grad(loss, x)[0]
    assert_close(one, many, rtol=1e-4, atol=1e-4 * float(many.abs().max()))


def test_branches_through_the_cache():
    """Decoding's layout: the trunk is prefilled, the branches come later, token by token and interleaved."""
    model = tiny_model("IN:1 OR:2 CR:1")
    tokens, item, branch, fork, _ = branched(0)
    full = layout(item, branch, fork)
    want, cache = states(model, tokens, full), Cache(model.config, 1, 8, model.head)
    trunk, start = int((branch == 0).sum()), 0
    for end in (trunk, *range(trunk + 1, tokens.shape[1] + 1)):
        part = Layout(item[:, :end], full.pos[:, start:end], full.sees[:, start:end, :end])
        assert_close(states_of(model, tokens[:, start:end], part, cache), want[:, start:end], **CLOSE)
        start = end


def test_first_and_last_split_the_forward():
    """blocks(last=k) then blocks(first=k) is the whole: the item cache starts users above their IN layers."""
    model, (tokens, item) = tiny_model("IN:1 OR:2 CR:1"), prompts(1)[0]
    lay, x = layout(item), model.embed_tokens(tokens)
    for k in range(5):
        assert torch.equal(model.norm(model.blocks(model.blocks(x, lay, last=k), lay, first=k)), model(tokens, lay))


# --- information flow, by gradient ----------------------------------------------------------------------------------


def jacobian(model: Llama, lay: Layout) -> torch.Tensor:
    """(T, T): how much a random direction of output i moves with input j; exactly zero if nothing flows."""
    x = torch.randn(1, lay.item.shape[1], model.config.hidden_size, requires_grad=True)
    y = (model.blocks(x, lay) * torch.randn(model.config.hidden_size)).sum(-1)[0]
    return torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0][0].abs().sum(-1) for v in y])


def looks(kind: str, item: list[int], sees) -> torch.Tensor:
    """(T, T) bool: the definition, design.md section 1, cell by cell."""
    T, out = len(item), torch.zeros(len(item), len(item), dtype=torch.bool)
    for i in range(T):
        for j in range(T):
            other, same = item[i] and item[j] and item[i] != item[j], item[i] and item[i] == item[j]
            hidden = {"OR": False, "IN": other, "CR": same, "IN-closed": item[i] != item[j]}[kind]
            out[i, j] = i == j or bool(sees(i, j) and not hidden)
    return out


FLOW = [[1, 1, 1, 2, 2, 3, 3, 3, 4], [0, 1, 1, 0, 2, 2, 2, 3, 0, 4, 4], [1, 1, 2, 2, 2, 0, 0, 3, 3]]


@pytest.mark.parametrize("kind", ["IN", "OR", "CR", "IN-closed"])
@pytest.mark.parametrize("item", FLOW, ids=str)
def test_one_layer_moves_what_its_mask_allows(kind, item):
    """Gradient exactly zero where the definition hides, not zero where it shows: a mask that is built but not used,
    used in the wrong layer, or added to instead of masking the scores cannot pass."""
    got = jacobian(tiny_model(kind, num_hidden_layers=1), layout(torch.tensor([item])))
    assert torch.equal(got != 0, looks(kind, item, lambda i, j: j < i))


@pytest.mark.parametrize(
    "plan", ["IN:3", "CR:3", "IN-closed:3", "IN:1 OR:1 CR:1", "IN-closed:2 CR:1", "CR:1 IN-closed:2", "IN:1 CR:2"]
)
@pytest.mark.parametrize("item", FLOW, ids=str)
def test_many_layers_move_what_their_masks_chain(plan, item):
    """Reachability is the boolean product of the layers' masks, first layer rightmost: no layer takes another's mask
    (a memo that forgets the kind), and there is no side path (a norm over tokens, a shared buffer)."""
    model = tiny_model(plan, num_hidden_layers=3)
    reach = torch.eye(len(item)).bool()
    for kind in model.plan:
        reach = (looks(kind, item, lambda i, j: j < i).float() @ reach.float()) > 0
    assert torch.equal(jacobian(model, layout(torch.tensor([item]))) != 0, reach)


def test_some_chains_are_closed():
    """The test above is not vacuous: with no context between, CR never reaches a token's own item, IN no other."""

    def reach(plan):
        return (jacobian(tiny_model(plan, num_hidden_layers=3), layout(torch.tensor([FLOW[0]]))) != 0)[7]

    assert reach("CR:3").tolist() == [True] * 5 + [False, False, True, False]
    assert reach("IN:3").tolist() == [False] * 5 + [True] * 3 + [False]
    assert reach("IN-closed:2 CR:1").tolist() == [True] * 8 + [False]


def test_branches_do_not_leak():
    """No gradient between branches, nor from the trunk behind a fork, in any plan."""
    for plan in PLANS:
        tokens, item, branch, fork, rows = branched(0)
        got = jacobian(tiny_model(plan), layout(item, branch, fork)) != 0
        for keep, own in rows:
            others = [j for j in range(item.shape[1]) if j not in keep]
            assert not got[keep[own]][:, others].any()


# --- IN-closed: item states are functions of the title --------------------------------------------------------------


def item_states(kind: str, seed: int, where: int) -> torch.Tensor:
    """The states of one fixed title after two layers of a kind, in a prompt of random others, from token `where` on."""
    model, g = tiny_model(f"{kind}:2 OR:1 CR:1"), torch.Generator().manual_seed(seed)
    title, n = torch.tensor([5, 17, 40, 8]), 70
    tokens, item = torch.randint(VOCAB, (1, n), generator=g), torch.randint(0, 5, (1, n), generator=g)
    item[item == 3] = 1
    tokens[0, where : where + 4], item[0, where : where + 4] = title, 3
    with torch.no_grad():
        return model.blocks(model.embed_tokens(tokens), layout(item), last=2)[0, where : where + 4]


def test_closed_item_state_depends_on_the_title_alone():
    """What the item cache stands on: anywhere, after anything, the same state as alone at position 0."""
    model, title = tiny_model("IN-closed:2 OR:1 CR:1"), torch.tensor([[5, 17, 40, 8]])
    with torch.no_grad():
        alone = model.blocks(model.embed_tokens(title), layout(torch.ones_like(title)), last=2)[0]
    for seed, where in enumerate((0, 1, 30, 66)):
        assert_close(item_states("IN-closed", seed, where), alone, **CLOSE)


def test_open_item_state_does_not():
    """With an open context it depends on the prompt, so a cache of it would be wrong."""
    assert (item_states("IN", 0, 30) - item_states("IN", 1, 30)).abs().max() > 0.1
    assert (item_states("OR", 0, 30) - item_states("OR", 1, 30)).abs().max() > 0.1


# --- loading: what is wrong is said, in one sentence ----------------------------------------------------------------


def says(e, *parts):
    text = str(e.value)
    assert "\n" not in text and len(text) < 400 and text[-1] not in " :", text
    for part in parts:
        assert part in text, text


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hf(folder)
    return folder


@pytest.fixture
def folder(hf_folder, tmp_path):
    """A copy of a good folder, to be broken."""
    for f in hf_folder.glob("*.*"):
        (tmp_path / f.name).write_bytes(f.read_bytes())
    return tmp_path


def edit_config(folder, remove=(), **changes):
    c = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if k not in remove}))


@pytest.mark.parametrize(
    "key, changes",
    [
        ("model_type", dict(model_type="mistral")),
        ("hidden_act", dict(hidden_act="gelu")),
        ("rope_type", dict(rope_parameters=dict(rope_type="yarn", factor=4.0))),
        ("rope_type", dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0))),
        ("attention_bias", dict(attention_bias=True)),
        ("mlp_bias", dict(mlp_bias=True)),
        ("use_sliding_window", dict(model_type="qwen2", use_sliding_window=True)),
    ],
)
def test_config_that_cannot_be_honoured(folder, key, changes):
    """Never run a model that we compute differently."""
    edit_config(folder, **changes)
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, key, "config.json")


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_config_without_a_key(folder, key):
    edit_config(folder, remove=[key])
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, key, "config.json")


@pytest.mark.parametrize("text", ["{broken", "", "[1, 2]", "\xff", None])
def test_config_that_is_no_json(folder, text):
    file = folder / "config.json"
    file.unlink() if text is None else file.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, "config.json")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: t.pop(Q0), ["lacks", Q0]),
        (lambda t: t.pop("lm_head.weight"), ["lacks", "lm_head.weight"]),
        (lambda t: t.update({"model.layers.0.surprise": torch.ones(1)}), ["unknown", "model.layers.0.surprise"]),
        (lambda t: t.update({Q0: t[Q0][:-1].clone()}), [Q0, "[31, 32]", "[32, 32]"]),
        (lambda t: [t.pop(k) for k in [*t] if "layers.1." in k], ["lacks", "and 6 more"]),
    ],
    ids=["missing", "missing head", "extra", "misshapen", "missing layer"],
)
def test_tensors_that_do_not_fit(folder, change, parts):
    """Names must agree both ways and shapes too: strict=False would leave random weights in place."""
    rewrite(folder, change)
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, *parts)


def test_tensors_that_may_be_there(folder):
    """Old Llama folders store rotary frequencies, some tied ones their head as well: both are harmless."""
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert load(folder).lm_head is None


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_weights(folder, keep):
    """An interrupted download or copy."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, "model.safetensors")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as e:
        load(folder)
    says(e, "model.safetensors is missing")


@pytest.mark.parametrize("how", ["missing", "truncated", "index", "empty index"])
def test_damaged_shards(tmp_path, how):
    write_hf(tmp_path, shard="20KB")
    shard, index = sorted(tmp_path.glob("model-*.safetensors"))[1], tmp_path / "model.safetensors.index.json"
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        index.write_text("{" if how == "index" else "{}")
    with pytest.raises(InputError) as e:
        load(tmp_path)
    says(e, shard.name if how in ("missing", "truncated") else index.name)


def test_loaded_model_is_complete(hf_folder):
    """Built on meta, loaded by assignment: nothing is left there, and the file's own memory is not trained on."""
    noise = torch.get_rng_state()
    model = load(hf_folder)
    assert torch.equal(torch.get_rng_state(), noise), "something was initialised only to be overwritten"
    assert {p.device.type for p in model.parameters()} == {"cpu"} and not [*model.buffers()]
    assert model.rope(torch.arange(3)[None])[0].device.type == "cpu"
    before = load_file(hf_folder / "model.safetensors")[Q0].clone()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.add_(1)
    assert torch.equal(load_file(hf_folder / "model.safetensors")[Q0], before)


@pytest.mark.parametrize("kind", ["IN", "OR", "CR", "IN-closed"])
def test_attention_in_bfloat16_is_that_of_float32(kind):
    """Written out on a CPU: the scale, the mask and the gradients; what is hidden has a gradient of exactly zero."""
    torch.manual_seed(0)
    item = torch.tensor([[0, 1, 1, 0, 2, 2, 0], [0, 1, 1, 1, -1, -1, -1]])
    mask = layout(item).additive_mask(kind, 2, torch.bfloat16)
    q, k, v, g = (torch.randn(2, 3, n, 8) for n in (14, 7, 7, 14))
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        args = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        y = attend(*args, mask.to(dtype))
        y.backward(g.bfloat16().to(dtype))
        grads.append([y, *(x.grad for x in args)])
    for low, high in zip(*grads, strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), high, atol=0.06, rtol=0.02)
    args = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    attend(*args, mask)[:, :, 4].sum().backward()  # the query 4 of the first head that shares a key
    hidden = mask[:, 0, 4].isinf()[:, None, :, None]
    assert hidden.any() and not any((x.grad * hidden).any() for x in args[1:])


def test_bf16(hf_folder):
    """Half the memory, logits in fp32 and near: a softmax over a vocabulary in bf16 has three digits."""
    model, tokens = load(hf_folder, dtype=torch.bfloat16), random_tokens()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    got, want = logits(model, tokens), logits(load(hf_folder), tokens)
    assert got.dtype == torch.float32
    assert (got - want).std() < 0.03 * want.std()
    add_lora(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    assert model(tokens, layout(torch.zeros_like(tokens))).dtype == torch.bfloat16


def test_logits_of_some_columns(hf_folder):
    model, x = load(hf_folder), torch.randn(3, 32)
    columns = torch.tensor([7, 3, 3, 63])
    assert_close(model.logits(x, columns), model.logits(x)[:, columns])


# --- LoRA, with peft as the judge -----------------------------------------------------------------------------------

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fill(model, seed: int = 0):
    """Random adapters: peft's and ours start with B = 0, where every mistake is invisible."""
    g = torch.Generator().manual_seed(seed)
    for n, p in sorted(model.named_parameters()):
        if "lora_" in n:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return model


def peft_model(folder, seed: int = 0, targets=("q_proj", "v_proj"), **config):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    c = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets if type(targets) is str else [*targets], **config)
    return fill(peft.get_peft_model(base, c), seed).eval()


def adapted(folder, **lora) -> Llama:
    return fill(add_lora(load(folder), **lora)).eval()


LORAS = [
    dict(r=4, alpha=12, targets=("q_proj", "v_proj")),
    dict(r=2, alpha=1, targets=("down_proj", "o_proj", "k_proj")),
    dict(r=8, alpha=16, targets=NAMES),
]


@pytest.mark.parametrize("lora", LORAS, ids=lambda c: f"r{c['r']}")
def test_lora_equals_peft(hf_folder, lora):
    """The same adapters give the same outputs: scale alpha / r, all targets, GQA's narrow k and v."""
    theirs = peft_model(hf_folder, r=lora["r"], lora_alpha=lora["alpha"], targets=lora["targets"])
    ours = add_lora(load(hf_folder), lora["r"], lora["alpha"], 0.0, ",".join(lora["targets"]))
    adapters = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n.removeprefix("base_model.model.model.") for n in adapters
    }
    for n, p in ours.named_parameters():
        if "lora_" in n:
            p.data = adapters["base_model.model.model." + n].data.clone()
    plain = load(hf_folder)
    assert (logits(ours, random_tokens()) - logits(plain, random_tokens())).abs().max() > 0.1
    assert_equal_to(theirs, ours)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]


def test_lora_parameter_count(hf_folder):
    """r * (in + out) per layer and target: 2 layers, q 32 -> 32, v 32 -> 16."""
    model = add_lora(load(hf_folder), r=4, alpha=8, targets="q_proj, v_proj")
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trainable.values()) == 2 * 4 * (32 + 32 + 32 + 16) and all("lora_" in n for n in trainable)


def test_lora_starts_as_the_base(hf_folder):
    model = add_lora(load(hf_folder), targets=",".join(NAMES), dropout=0.5).train()
    assert torch.equal(logits(model, random_tokens()), logits(load(hf_folder), random_tokens()))
    for m in (m for m in model.modules() if isinstance(m, LoRALinear)):
        bound = m.in_features**-0.5  # Kaiming uniform with a = sqrt 5
        assert not m.lora_B.weight.any() and 0.8 * bound < m.lora_A.weight.abs().max() <= bound


def test_training_changes_adapters_only(hf_folder):
    model = add_lora(load(hf_folder), targets=",".join(NAMES)).train()
    before, tokens = copy.deepcopy(model.state_dict()), random_tokens(1, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        F.cross_entropy(model.logits(model(tokens, layout(tokens * 0)))[0], tokens[0]).backward()
        optimizer.step()
    for n, p in model.state_dict().items():
        assert torch.equal(p, before[n]) != ("lora_" in n), n


def test_merge(hf_folder):
    """Merged equals unmerged; twice is once; taking it back restores; and a merged model does not add B A again."""
    model = adapted(hf_folder, r=4, alpha=12, targets=",".join(NAMES))
    want, weights = logits(model, random_tokens()), copy.deepcopy(model.state_dict())
    merged = merge_lora(model)
    assert_close(logits(merged, random_tokens()), want, **CLOSE)
    once = copy.deepcopy(merged.state_dict())
    assert not torch.equal(once["layers.0.self_attn.q_proj.weight"], weights["layers.0.self_attn.q_proj.weight"])
    assert all(torch.equal(v, once[k]) for k, v in merge_lora(model).state_dict().items())
    merge_lora(merge_lora(model, on=False), on=False)
    assert_close(model.state_dict(), weights, rtol=0, atol=1e-6)
    assert_close(logits(model, random_tokens()), want, **CLOSE)


def test_merged_model_is_saved_for_transformers(hf_folder, tmp_path):
    model = merge_lora(adapted(hf_folder, targets=",".join(NAMES)))
    save(model, tmp_path)
    assert_equal_to(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load(tmp_path))
    assert torch.equal(logits(load(tmp_path), random_tokens()), logits(model, random_tokens()))


def test_save_lora_is_loaded_by_peft(hf_folder, tmp_path):
    peft = pytest.importorskip("peft")
    ours = adapted(hf_folder, r=4, alpha=12, targets="q_proj,down_proj")
    save_lora(ours, tmp_path / "adapter", base=str(hf_folder))
    base = LlamaForCausalLM.from_pretrained(hf_folder, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_equal_to(theirs, ours)
    assert theirs.peft_config["default"].base_model_name_or_path == str(hf_folder)
    again = load_lora(load(hf_folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, random_tokens()), logits(ours, random_tokens()))


@pytest.mark.parametrize("lora", LORAS, ids=lambda c: f"r{c['r']}")
def test_pefts_adapter_is_loaded(hf_folder, tmp_path, lora):
    theirs = peft_model(hf_folder, r=lora["r"], lora_alpha=lora["alpha"], targets=lora["targets"], lora_dropout=0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_lora(load(hf_folder), tmp_path).eval()
    assert_equal_to(theirs, ours)
    assert {m.dropout.p for m in ours.modules() if isinstance(m, LoRALinear)} == {0.2}
    assert all(p.requires_grad == ("lora_" in n) for n, p in ours.named_parameters()), "training may go on"


@pytest.mark.parametrize(
    "config", [dict(use_rslora=True), dict(alpha_pattern={"q_proj": 3}), dict(targets=r".*\.q_proj")], ids=str
)
def test_pefts_variants_are_refused(hf_folder, tmp_path, config):
    """Their tensors look alike, their scale does not: loading them as plain LoRA would be wrong without a word."""
    peft_model(hf_folder, r=4, **config).save_pretrained(tmp_path)
    with pytest.raises(InputError) as e:
        load_lora(load(hf_folder), tmp_path)
    says(e, *config.keys() - {"targets"}, "adapter_config.json")


def test_untrained_adapters_are_refused(hf_folder, tmp_path):
    """Adapters that were never saved right (peft issue 286) leave B at zero: evaluating the base unawares."""
    save_lora(add_lora(load(hf_folder)), tmp_path)
    with pytest.raises(InputError) as e:
        load_lora(load(hf_folder), tmp_path)
    says(e, "lora_B", "adapter_model.safetensors")


@pytest.mark.parametrize("how", ["no config", "no r", "no tensors", "other shape", "lacks one"])
def test_damaged_adapters(hf_folder, tmp_path, how):
    save_lora(adapted(hf_folder, r=4), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if how == "no config":
        config.unlink()
    elif how == "no r":
        config.write_text("{}")
    elif how == "no tensors":
        file.unlink()
    elif how == "other shape":
        config.write_text(config.read_text().replace('"r": 4', '"r": 3'))
    else:
        save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(InputError) as e:
        load_lora(load(hf_folder), tmp_path)
    says(e, "adapter_config.json" if how in ("no config", "no r") else "adapter_model.safetensors")
    if how in ("other shape", "lacks one"):
        says(e, "layers.0.self_attn.")


@pytest.mark.parametrize("target", ["qproj", "lora_A", "lm_head", "embed_tokens", ""])
def test_unknown_target(hf_folder, target):
    """A target that adapts nothing is an error; so is lm_head, whose adapter `logits` would not use."""
    with pytest.raises(InputError) as e:
        add_lora(load(hf_folder), targets=f"v_proj,{target}")
    says(e, target, "q_proj")
    assert "lm_head" not in str(e.value).partition("; it has")[2]


def test_dropout_is_on_the_input_of_a():
    """y = W x + B A dropout(x) alpha / r: never on W x, and not on A's or B's output."""
    base, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    m = fill(LoRALinear(base, 3, 12, 0.5)).train()
    torch.manual_seed(0)
    got = m(x)
    torch.manual_seed(0)
    want = base(x) + F.dropout(x, 0.5) @ m.lora_A.weight.T @ m.lora_B.weight.T * 4
    assert_close(got, want)
    assert_close(m.eval()(x), base(x) + x @ m.lora_A.weight.T @ m.lora_B.weight.T * 4)


def test_adapters_follow_the_models_device(hf_folder, tmp_path):
    """load_lora on a model that was moved already: meta stands for cuda here."""
    save_lora(adapted(hf_folder), tmp_path)
    model = load_lora(load(hf_folder).to("meta"), tmp_path)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["OR", "IN:1 OR:2 CR:1"])
def test_checkpointing_gives_the_same_gradients(plan):
    """And does recompute: each block runs twice. With dropout, twice with the same noise."""
    tokens, item = pad(prompts(3))
    grads, calls = [], []
    for checkpointing in (False, True):
        model = fill(add_lora(tiny_model(plan), dropout=0.3, targets="q_proj,up_proj")).train()
        model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        model.requires_grad_(True)
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        model.logits(model(tokens, layout(item))[item > 2]).logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert len(calls) == 1 + 2
    assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_rows_are_those_of_the_whole_forward():
    """The last MLP and norm on some tokens only: the same values and gradients, in the order asked for."""
    model = tiny_model("IN:1 OR:2 CR:1")
    tokens, item = pad(prompts(3))
    rows = torch.tensor([7, 2, tokens.shape[1] + 3, 2])
    whole, some = model(tokens, layout(item)).flatten(0, 1)[rows], model(tokens, layout(item), rows=rows)
    assert_close(some, whole, rtol=0, atol=1e-6)
    p = model.layers[0].self_attn.k_proj.weight
    a, b = (torch.autograd.grad(y.square().sum(), p)[0] for y in (whole, some))
    assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mlp_keeps_gate_and_up_alone():
    """What a frozen MLP keeps for the backward pass: 2 of its width per token; silu(gate) would be a third one."""
    model = tiny_model().requires_grad_(False)
    x, kept = torch.randn(1, 50, 32, requires_grad=True), {}
    weights = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model.layers[0].mlp(x)
    assert sum(t.numel() for at, t in kept.items() if at not in weights) == 2 * 48 * 50


def test_bf16_logits_of_some_columns_are_not_rounded():
    """In bfloat16 steps of 1/8 a hundred tokens of a flat model would share a few scores."""
    model = tiny_model().bfloat16()
    x, columns = torch.randn(5, 32).bfloat16(), torch.arange(3, 60)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.logits(x, columns)
    assert z.dtype == torch.float32
    assert_close(z, x.float() @ model.head[columns].float().T, rtol=0, atol=1e-5)


def test_init_weights():
    """GPT-2's: projections into the residual stream are smaller. llama2.c scaled w3, the up projection, instead."""
    model = Llama(tiny_config(hidden_size=128, intermediate_size=256, num_hidden_layers=8)).init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            deep = "o_proj" in name or "down_proj" in name
            assert abs(float(p.detach().std()) / (0.02 / 4 if deep else 0.02) - 1) < 0.05, name
