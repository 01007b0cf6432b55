"""model.py: equal to transformers and peft where they do the same, and where they do not, to what a mask means."""

import functools
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import PLANS, VOCAB, refuses, spread, tiny_config, tiny_model, weights_root
from safetensors.torch import load_file, save_file
from test_hatllm import as_layout, may_look, random_layout
from tokenizers import Tokenizer
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import data
import train
from eval import frozen
from hatllm import KINDS, TARGET, Layout, is_last, layout, needed
from model import (
    Cache,
    Config,
    Llama,
    LoRALinear,
    add_lora,
    attend,
    compiled_flex,
    load,
    load_lora,
    merge_lora,
    save,
    save_lora,
)

peft = pytest.importorskip("peft")
CLOSE = dict(rtol=1e-5, atol=1e-5)
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY |= dict(vocab_size=VOCAB, attn_implementation="eager", eos_token_id=3)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)  # head width 16 has a kept, a blended and stretched frequencies
SPREAD_HEADS = dict(head_dim=16)  # 4 x 16, not the hidden size
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))


def write_hf(folder, kind="llama", shard="1GB", **changes) -> torch.nn.Module:
    """A folder as transformers writes it, with spread-out weights, and the model in it."""
    model = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | changes))).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def read_hf(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
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


def edit(file, remove=(), **changes):
    c = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in c.items() if k not in remove}))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@torch.no_grad()
def logits(model: Llama, tokens=TOKENS) -> torch.Tensor:
    return model.logits(model(tokens, layout(torch.zeros_like(tokens))))


def assert_equal_to(hf, ours: Llama, tokens=TOKENS, **tolerance):
    with torch.no_grad():
        want = hf(tokens).logits
    assert want.std() > 0.3, "logits too flat to tell anything"
    assert_close(logits(ours, tokens), want, **CLOSE | tolerance)


# --- equal to transformers ------------------------------------------------------------------------------------------

FAMILIES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "head_dim": SPREAD_HEADS,
    "eps": dict(rms_norm_eps=0.1),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "llama3": SPREAD_HEADS | dict(rope_parameters=LLAMA3 | dict(rope_theta=10000.0), max_position_embeddings=256),
    "sharded": dict(shard="20KB"),
    "qwen2": dict(kind="qwen2"),
    "qwen2 tied": dict(kind="qwen2", tie_word_embeddings=True),
    "qwen3": dict(kind="qwen3", head_dim=8),
    "qwen3 tied": dict(kind="qwen3", tie_word_embeddings=True) | SPREAD_HEADS,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(tmp_path, family):
    """The folder that transformers wrote, over more tokens than llama3's original context; and back, plan and all."""
    theirs = write_hf(tmp_path, **FAMILIES[family])
    assert len([*tmp_path.glob("*.safetensors")]) > 2 * (family == "sharded")
    ours = load(tmp_path, "IN:1 CR:1")
    assert [b.kind for b in ours.layers] == ["IN", "CR"]
    save(ours, tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert (again.plan, again.config) == (ours.plan, ours.config), "save keeps the plan, for load without one"
    assert_equal_to(theirs, load(tmp_path))
    back = read_hf(tmp_path / "new" / "folder")  # transformers knows no masks: it computes the plan OR
    assert type(back) is type(theirs)
    assert_equal_to(back, load(tmp_path / "new" / "folder", "OR"))
    with torch.no_grad():
        assert_close(back(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "llama3"} | {k: LLAMA3[k] for k in [*LLAMA3][1:]}])
def test_config_of_transformers_4(tmp_path, scaling):
    """rope_theta and rope_scaling at the top level, as almost every published folder has them: theta 1e4 for 5e5 and
    a dropped scaling are the classic conversion bugs. Also the list of end tokens of Llama-3-Instruct."""
    write_hf(tmp_path, **SPREAD_HEADS)
    changes = dict(rope_theta=5e5, rope_scaling=scaling, torch_dtype="float32", eos_token_id=[5, 7])
    edit(tmp_path / "config.json", remove=["rope_parameters"], **changes)
    assert_equal_to(read_hf(tmp_path), load(tmp_path))
    assert Config.read(tmp_path / "config.json").eos_token_id == 5


def test_absent_or_null_keys_mean_what_they_mean_to_transformers(folder):
    """Older folders leave keys out, or write null: a default of ours that differs is a silent error in every logit."""
    keys, file = ["head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"], folder / "config.json"
    for null in ({}, dict.fromkeys(keys[:2])):
        edit(file, remove=set(keys) - set(null), **null)
        assert all(getattr(Config.read(file), k) == getattr(LlamaConfig.from_pretrained(folder), k) for k in keys)
    edit(file, remove=["head_dim"], model_type="qwen3", num_key_value_heads=2)
    assert Config.read(file).head_dim == AutoConfig.from_pretrained(folder).head_dim == 128


@pytest.mark.parametrize("stored", ["equal", "different", "head alone"])
def test_a_tied_head_that_is_stored(folder, stored):
    """As transformers where there is one reading; a folder that disagrees with itself is refused."""
    t = load_file(folder / "model.safetensors")
    t |= {"lm_head.weight": t["model.embed_tokens.weight"].clone()} if stored != "different" else {}
    save_file({k: v for k, v in t.items() if stored != "head alone" or "embed" not in k}, folder / "model.safetensors")
    edit(folder / "config.json", tie_word_embeddings=True)
    if stored == "different":
        with refuses(folder, "lm_head.weight differs"):
            load(folder)
    else:
        assert_equal_to(read_hf(folder), load(folder))


PUBLISHED = {
    "smollm2": dict(is_llama_config=True, rope_interleaved=False, pretraining_tp=1, rope_scaling=None, rope_theta=10**5)
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "torch_dtype": "bfloat16"},
    "qwen2.5": dict(model_type="qwen2", max_window_layers=24, sliding_window=32768, use_sliding_window=False)
    | dict(use_mrope=False, rope_theta=1000000.0),
    "qwen3": dict(model_type="qwen3", max_window_layers=28, sliding_window=None, use_sliding_window=False)
    | dict(attention_dropout=0.0, head_dim=128, rope_theta=1000000),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configs_are_read(folder, family):
    edit(folder / "config.json", remove=["rope_parameters"], **PUBLISHED[family])
    c = Config.read(folder / "config.json")
    expected = {"model_type": "llama"} | PUBLISHED[family]
    assert (c.rope_theta, c.model_type) == (expected["rope_theta"], expected["model_type"])


def test_smollm2_equals_transformers():
    """The default model, on real text: no tiny model has its depth, its width or its outliers."""
    folder = weights_root("smollm2-135m")
    text = "She bought a lavender hand cream, two bars of soap and a hair brush; next she will buy a bottle of shampoo."
    tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text * 2).ids])
    assert_equal_to(read_hf(folder), load(folder), tokens, rtol=1e-4, atol=1e-4)


# --- masks in the model ---------------------------------------------------------------------------------------------


def batch(seed: int) -> tuple[torch.Tensor, Layout, list]:
    """Two prompts with branches and padding: tokens, layout, and item, branch, fork of each."""
    rows = random_layout(seed)
    return torch.randint(VOCAB, (2, len(rows[0][0]))), as_layout(rows), rows


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", [3, 5, 8])
def test_every_text_is_computed_as_if_alone(plan, seed):
    """Whatever else is in the batch, padding and branches that share its history: the same states and gradients. A
    gradient by what is not in the text is exactly zero."""
    model, (tokens, lay, rows) = tiny_model(plan), batch(seed)
    x = model.embed_tokens(tokens).detach().requires_grad_()
    got = model.blocks(x, lay)
    assert got.isfinite().all()
    for r, (item, branch, fork) in enumerate(rows):
        for b in {*branch}:
            own = [i for i in range(len(item)) if branch[i] == b and item[i] >= 0]
            text = [*range(fork[own[0]] if b else 0), *own]
            want = model.blocks(x[r : r + 1, text], layout(lay.item[r : r + 1, text]))[0, -len(own) :]
            assert_close(got[r, own], want, **CLOSE)
            weight = torch.randn_like(want)
            one, alone = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (got[r, own], want))
            assert_close(one, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
            assert torch.equal(one != 0, alone != 0)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_cached_chunks_equal_one_forward(plan):
    """Prefill, then chunks of one token and of several, through a cache that has to grow and one that has not."""
    model, (tokens, full, _) = tiny_model(plan), batch(8)
    want, T, start = model(tokens, full), tokens.shape[1], 0
    cache = Cache(len(model.layers))
    whole = ((full.item < 1) | (full.item == TARGET) | is_last(full.item)).all(0)  # no bought item is cut after it
    possible = [n for n in range(2, T) if whole[n - 1]]
    for end in (possible[0], possible[1], possible[-4], T):
        part = Layout(full.item[:, :end], full.pos[:, start:end], full.sees[:, start:end, :end])
        assert_close(model(tokens[:, start:end], part, cache), want[:, start:end], **CLOSE)
        start = end
        assert {k.shape[2] for k in cache.k} == {end}


@pytest.mark.parametrize("plan", ["CR-last", "OR:1 CR-last", "IN-closed:1 OR:1 CR-last:2"])
@pytest.mark.parametrize("seed", [3, 5, 8])
def test_what_nobody_sees_is_not_computed(plan, seed):
    """States and gradients are those of the masked computation, with branches and padding; and fewer tokens reach the
    CR-last layers. A layer that is not CR-last after them computes all."""
    model, (tokens, lay, rows) = tiny_model(plan), batch(seed)
    last = torch.tensor([r * tokens.shape[1] + i for r, (item, *_) in enumerate(rows) for i, k in enumerate(item)
                         if k == TARGET or k == 0])  # fmt: skip
    x = model.embed_tokens(tokens).detach().requires_grad_()
    widths = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    want = model.blocks(x, lay).flatten(0, 1)[last]
    n = needed(lay.item).shape[1]
    assert {*widths} == {tokens.shape[1]} and n < tokens.shape[1] and not widths.clear()
    got = model.blocks(x, lay, rows=last)
    assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert widths == [n if kind == "CR-last" else tokens.shape[1] for kind in model.plan]
    weight = torch.randn_like(want)
    assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)), rtol=1e-4, atol=5e-5)
    mixed = tiny_model("CR-last:3 OR:1")
    assert_close(mixed.blocks(x, lay, rows=last), mixed.blocks(x, lay).flatten(0, 1)[last], **CLOSE)


def jacobian(plan: str, item: list[int]) -> torch.Tensor:
    """(T, T) bool: whether a random direction of output i moves with input j; a gradient is exactly zero, or not."""
    model = tiny_model(plan, num_hidden_layers=3 if ":" in plan else 1)
    x = torch.randn(1, len(item), model.config.hidden_size, requires_grad=True)
    y = (model.blocks(x, layout(torch.tensor([item]))) * torch.randn(model.config.hidden_size)).sum(-1)[0]
    return torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0][0].abs().sum(-1) for v in y]) != 0


def reach(kinds: list[str], item: list[int]) -> torch.Tensor:
    """The boolean product of the layers' masks as defined, first layer rightmost."""
    T, flow = range(len(item)), torch.eye(len(item))
    for kind in kinds:
        looks = [[float(may_look(kind, i, j, item, [0] * len(T), None)) for j in T] for i in T]
        flow = (torch.tensor(looks) @ flow > 0).float()
    return flow.bool()


FLOW = [[1, 1, 1, 2, 2, 3, 3, 3, 4], [0, 1, 1, 0, 2, 2, 2, 3, 0, 4, 4], [1, 1, 2, 2, 2, 0, 0, 3, 3]]
CHAINS = ["IN:3", "CR:3", "IN-closed:3", "IN:1 OR:1 CR:1", "IN-closed:2 CR:1", "CR:1 IN-closed:2", "IN:1 CR:2"]


@pytest.mark.parametrize("plan", [*KINDS, *CHAINS])
@pytest.mark.parametrize("item", FLOW, ids=str)
def test_gradients_flow_where_the_masks_allow(plan, item):
    """Exactly zero where the definition hides, not zero where it shows: a mask that is built but not used, used in the
    wrong layer, or added to the scores' softmax cannot pass; nor can a norm over tokens, or a memo without the kind."""
    kinds = [plan] if plan in KINDS else tiny_model(plan, num_hidden_layers=3).plan
    assert torch.equal(jacobian(plan, item), reach(kinds, item))


# --- loading: what is wrong is said, in one sentence ----------------------------------------------------------------

OTHERS = dict(
    model_type="mistral", hidden_act="gelu", attention_bias=True, mlp_bias=True, use_sliding_window=True,
    pretraining_tp=2, rope_interleaved=True, partial_rotary_factor=0.5, quantization_config={"bits": 4},
)  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_config_that_means_another_computation(folder, key):
    """Never run a model that we compute differently."""
    edit(folder / "config.json", **{key: OTHERS[key]})
    with refuses("config.json", key):
        load(folder)


WRONG = dict(
    hidden_size=["576", 32.0, -32, 0, True, [], None, 10**30], intermediate_size=[0, "48"], vocab_size=[0, None],
    num_hidden_layers=[10_000_000, -1, 0, "2"], num_attention_heads=[0, 3, {}], num_key_value_heads=[0, 3, -2, 8],
    head_dim=[7, -8, "8", 1e999], rms_norm_eps=["1e-6", -1.0, float("nan")], max_position_embeddings=["x"],
    rope_parameters=[[1], "x", {"rope_type": ["default"]}, {"rope_type": "yarn", "factor": 4.0}]
    + [{"type": "linear", "factor": 2.0}, {"full_attention": LLAMA3, "sliding_attention": LLAMA3}]
    + [{"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "llama3", "factor": 8.0}]
    + [LLAMA3 | x for x in ({"factor": 0.0}, {"factor": "8"})]
    + [{"rope_type": "default", "rope_theta": theta} for theta in (None, "1e4", 0, -1.0, float("inf"))],
    eos_token_id=[64, -1, "3", None, [], ["3"], 1.0], tie_word_embeddings=["yes", 1], hatllm_plan=["XX", 3, []],
    rope_scaling=[{"rope_type": "linear", "factor": 2.0}], model_type=[["llama"]],
)  # fmt: skip


@pytest.mark.parametrize("key, value", [(k, v) for k, values in WRONG.items() for v in values])
def test_config_value_of_a_wrong_type_or_size(folder, key, value):
    """Neither a traceback, nor hours spent on building ten million layers, nor another computation."""
    edit(folder / "config.json", **{key: value})
    with refuses("plan" if key == "hatllm_plan" else "config.json"):
        load(folder)


def test_a_large_theta_is_read(folder):
    edit(folder / "config.json", remove=["rope_parameters"], rope_theta=3580165449.0)  # gradientai's Llama 3
    Config.read(folder / "config.json")


@pytest.mark.parametrize("text", ["{broken", "", "[1, 2]", "\xff", "{}", '{"a":' * 10**5, None])
def test_config_that_is_no_json(folder, text):
    file = folder / "config.json"
    file.unlink() if text is None else file.write_bytes(text.encode("latin1"))
    with refuses("config.json"):
        load(folder)


Q0 = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(Q0), ["lacks", Q0]),
    "missing head": (lambda t: t.pop("lm_head.weight"), ["lacks", "lm_head.weight"]),
    "missing layer": (lambda t: [t.pop(k) for k in [*t] if "layers.1." in k], ["lacks", "6 more"]),
    "extra": (lambda t: t.update(surprise=torch.ones(1)), ["unknown", "surprise"]),
    "misshapen": (lambda t: t.update({Q0: t[Q0][:-1].clone()}), [Q0, "[31, 32]", "[32, 32]"]),
    "not finite": (lambda t: t[Q0].view(-1)[7:8].fill_(torch.nan), [Q0, "finite"]),
} | {
    str(d)[6:]: (lambda t, d=d: t.update({Q0: t[Q0].to(d)}), [Q0, str(d)])
    for d in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(folder, case):
    """Names must agree both ways and shapes too, and no quantised weight is taken for a number."""
    change, parts = TENSORS[case]
    rewrite(folder / "model.safetensors", change)
    with refuses(*parts):
        load(folder)


@pytest.mark.parametrize("keep", [None, 0, 4, 500, -1])
def test_truncated_or_missing_weights(tmp_path, keep):
    """Of a single file, and of a shard or of the index of the shards."""
    write_hf(tmp_path, shard="20KB")
    write_hf(tmp_path / "one")
    index, *shards = tmp_path / "model.safetensors.index.json", *sorted(tmp_path.glob("model-*.safetensors"))[1:2]
    for file in (tmp_path / "one" / "model.safetensors", *shards, *[index] * (keep in (0, 4))):
        file.unlink() if keep is None else file.write_bytes(file.read_bytes()[:keep])
        with refuses(file.name):
            load(file.parent)


def test_loading_initialises_nothing_and_trains_a_copy(folder):
    rewrite(folder / "model.safetensors", lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)}))  # as of old
    noise = torch.get_rng_state()
    model = load(folder)
    assert torch.equal(torch.get_rng_state(), noise), "something was initialised only to be overwritten"
    assert {p.device.type for p in model.parameters()} == {"cpu"} and not [*model.buffers()]
    before = (folder / "model.safetensors").read_bytes()
    model.layers[0].self_attn.q_proj.weight.data.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


# --- LoRA, with peft as the judge -----------------------------------------------------------------------------------


def fill(model):
    """Random adapters: peft's and ours start with B = 0, where every mistake is invisible."""
    torch.manual_seed(0)
    for n, p in sorted(model.named_parameters()):
        p.data = torch.randn(p.shape) * 0.1 if "lora_" in n else p.data
    return model


def adapted(folder, r=4, alpha=12.0, dropout=0.0, targets=NAMES, plan="OR") -> Llama:
    return fill(add_lora(load(folder, plan), r, alpha, dropout, targets)).eval()


LORAS = [(4, 12, ["q_proj", "v_proj"]), (2, 1, ["down_proj", "o_proj", "k_proj"]), (8, 16.5, NAMES)]


@pytest.mark.parametrize("r, alpha, targets", LORAS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_pefts_adapter_is_loaded(hf_folder, tmp_path, r, alpha, targets, dropout):
    """The same outputs: scale alpha / r, all targets, GQA's narrow k and v; and the same parameters are trained."""
    c = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)
    theirs = fill(peft.get_peft_model(read_hf(hf_folder), c)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_lora(load(hf_folder), tmp_path).eval()
    assert_equal_to(theirs, ours)
    assert (logits(ours) - logits(load(hf_folder))).abs().max() > 0.1
    assert {m.dropout.p for m in ours.modules() if isinstance(m, LoRALinear)} == {dropout}
    trained = {n.replace(".default", "") for n, p in theirs.named_parameters() if p.requires_grad}
    assert {"base_model.model.model." + n for n, p in ours.named_parameters() if p.requires_grad} == trained


def test_save_lora_is_loaded_by_peft(hf_folder, tmp_path):
    """Also with the plan in its config, which peft knows nothing of: it computes OR."""
    ours = adapted(hf_folder, targets=["q_proj", "down_proj"], plan="IN:1 CR:1")
    save_lora(ours, tmp_path / "adapter", base=str(hf_folder))
    assert json.loads((tmp_path / "adapter" / "hatllm.json").read_text())["hatllm_plan"] == "IN:1 CR:1"
    theirs = peft.PeftModel.from_pretrained(read_hf(hf_folder), tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(hf_folder)
    again = load_lora(load(hf_folder), tmp_path / "adapter").eval()
    assert_equal_to(theirs, again)
    same = adapted(hf_folder, targets=["q_proj", "down_proj"])  # what was saved, beside what was read
    assert_equal_to(theirs, same)
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in ours.state_dict().items())


def test_lora_starts_as_the_base(hf_folder):
    model = add_lora(load(hf_folder), 8, 16, 0.5, NAMES).train()
    assert torch.equal(logits(model), logits(load(hf_folder)))
    for m in (m for m in model.modules() if isinstance(m, LoRALinear)):
        bound = m.in_features**-0.5  # Kaiming uniform with a = sqrt 5
        assert not m.lora_B.weight.any() and 0.8 * bound < m.lora_A.weight.abs().max() <= bound


def test_dropout_is_on_the_input_of_a():
    """y = W x + B A dropout(x) alpha / r: never on W x, and not on A's or B's output."""
    base, x = torch.nn.Linear(6, 5), torch.randn(4, 6)
    m = fill(LoRALinear(base, 3, 12, 0.5)).train()
    torch.manual_seed(0)
    got = m(x)
    torch.manual_seed(0)
    assert_close(got, base(x) + F.dropout(x, 0.5) @ m.lora_A.weight.T @ m.lora_B.weight.T * 4)
    assert_close(m.eval()(x), base(x) + x @ m.lora_A.weight.T @ m.lora_B.weight.T * 4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_merge(tmp_path, kind):
    """Merged equals unmerged, biases too, and it is what transformers reads; unmerged ones are not lost silently."""
    write_hf(base := tmp_path / "base", kind)
    model = adapted(base)
    want = logits(model)
    with pytest.raises(ValueError, match="adapters would be lost"):
        save(model, tmp_path)
    assert_close(logits(merge_lora(model)), want, **CLOSE)
    assert (want - logits(load(base))).abs().max() > 0.1
    save(model, tmp_path)
    assert_equal_to(read_hf(tmp_path), model)
    assert torch.equal(logits(load(tmp_path)), logits(model))


VARIANTS = dict(
    init_lora_weights=["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal"], use_dora=[True],
    use_rslora=[True], bias=["all", "lora_only"], fan_in_fan_out=[True], rank_pattern=[{"q_proj": 2}],
    alpha_pattern=[{"q_proj": 2}], layers_to_transform=[[0], 1], alora_invocation_tokens=[[5]], peft_type=["IA3"],
    lora_alpha=["8", None], r=[None, "4", 4.0, True], lora_dropout=["0"], target_modules=["all-linear", None],
)  # fmt: skip


@pytest.mark.parametrize("key, value", [(k, v) for k, values in VARIANTS.items() for v in values])
def test_other_adapters_are_refused(hf_folder, tmp_path, key, value):
    """Their tensors look alike, what they mean does not: as plain LoRA they would be wrong without a word."""
    save_lora(adapted(hf_folder), tmp_path)
    edit(tmp_path / "adapter_config.json", **{key: value})
    with refuses("adapter_config.json", key):
        load_lora(load(hf_folder), tmp_path)


DAMAGES = {
    "lacks one": (lambda t: t.pop(min(t)), "layers.0.mlp.down_proj.lora_A"),
    "other shape": (lambda t: t.update({min(t): t[min(t)][:3].clone()}), "layers.0.mlp.down_proj.lora_A"),
}


@pytest.mark.parametrize("how", [*DAMAGES, "adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapters(hf_folder, tmp_path, how):
    """Or a file is missing. None of them may end in evaluating the base unawares."""
    save_lora(adapted(hf_folder), tmp_path)
    change, names = DAMAGES.get(how, (None, how))
    rewrite(tmp_path / "adapter_model.safetensors", change) if change else (tmp_path / how).unlink()
    with refuses("adapter", names):
        load_lora(load(hf_folder), tmp_path)


# --- training, and half precision -----------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout():
    """On the embeddings and on both branches of every block, while training; off in evaluation."""
    tokens, lay, _ = batch(0)
    plain, model = tiny_model("IN:1 OR:2 CR:1"), Llama(tiny_config(), "IN:1 OR:2 CR:1", dropout=0.5)
    model.load_state_dict(plain.state_dict())
    zeros, want = [], plain(tokens, lay)
    for m in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        m.register_forward_hook(lambda m, x, y: zeros.append(float((y == 0).float().mean())))
    assert torch.equal(model.eval()(tokens, lay), want) and not any(zeros)
    zeros.clear()
    assert (model.train()(tokens, lay) - model(tokens, lay)).abs().max() > 0.1
    assert len(zeros) == 2 * 9 and all(abs(z - 0.5) < 0.1 for z in zeros)
    assert torch.equal(plain.train()(tokens, lay), want), "the default is none"


def test_rows_are_those_of_the_whole_forward():
    """The last MLP and norm on some tokens only: the same values and gradients, in the order asked for."""
    model = tiny_model("IN:1 OR:2 CR:1")
    tokens, lay, _ = batch(3)
    rows = torch.tensor([7, 2, tokens.shape[1] + 3, 2])
    whole, some = model(tokens, lay).flatten(0, 1)[rows], model(tokens, lay, rows=rows)
    assert_close(some, whole, rtol=0, atol=1e-6)
    p = model.layers[0].self_attn.k_proj.weight
    a, b = (torch.autograd.grad(y.square().sum(), p)[0] for y in (whole, some))
    assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_bfloat16_is_that_of_float32(kind):
    """It is written out on a CPU: the scale, the mask, the gradients."""
    lay = layout(torch.tensor([[0, 1, 1, 0, 2, 2, 0], [0, 1, 1, 1, -1, -1, -1]]))
    mask = lay.additive_mask(kind, 2, torch.bfloat16)
    q, k, v, g = (torch.randn(2, 3, n, 8).bfloat16() for n in (14, 7, 7, 14))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        args = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attend(*args, mask.to(dtype))
        found.append([x.float() for x in (y, *torch.autograd.grad(y, args, g.to(dtype)))])
    assert_close(*found, atol=0.06, rtol=0.02)


def test_a_mask_is_made_once(monkeypatch):
    """Catches a copy of it in every layer, with a cache or without."""
    used, real = [], attend
    monkeypatch.setattr("model.attend", lambda q, k, v, mask: used.append(mask) or real(q, k, v, mask))
    model, item = tiny_model("IN:2 CR:2"), torch.tensor([[0, 1, 1, 0, 2, 2, 0]])
    for cache in (None, Cache(4)):
        lay = layout(item)
        model(torch.ones_like(item), lay, cache)
        own = [lay.additive_mask(kind, 2, torch.float32) for kind in model.plan]
        assert all(a is b for a, b in zip(used[-4:], own, strict=True))


def test_training_by_blocks(monkeypatch):
    """What a GPU computes, on a CPU: texts packed into rows, and attention that leaves out blocks, have the loss and
    the gradients of dense masks. A kernel is compiled for every length of rows, for none of their numbers."""
    kernels, lengths = [], set()
    titles = [f"{a} {b} in a nice box" for a in ("red", "blue", "old") for b in ("pen", "pencil", "ink pot", "paper")]
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # a CPU's kernel has no gradients
    backend = lambda *a: kernels.append(a) or aot_eager(*a)  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr("model.compiled_flex", functools.cache(compiled_flex.__wrapped__))
    monkeypatch.setattr(data, "TINY_VOCABULARY", 270)  # words of many tokens
    tokenizer = data.train_tokenizer(titles)
    model = tiny_model("IN-closed:1 IN:1 CR:1 OR:1 CR-own:1 CR-last", num_hidden_layers=6, head_dim=16,
                       vocab_size=tokenizer.get_vocab_size())  # fmt: skip
    cat = data.Catalogue(titles, tokenizer, model.config)
    for n, width in ((20, 512), (30, 512), (20, 768)):
        pool = [data.Example([i % 12, n % 12, 3, 5], [(1, 2), (4, (i + n) % 12)]) for i in range(n)]
        b, found = data.collate(cat, data.pack([data.encode(cat, e, True) for e in pool], width), width), []
        for blocks in (False, True):
            monkeypatch.setattr("model.by_blocks", lambda x, D, blocks=blocks: blocks)
            h = model(b.tokens, layout(b.item, b.branch, b.fork, b.places, b.start), rows=b.rows)
            loss = train.trie_nll(model, cat.trie, h, b).sum()
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert len(b.tokens) > 1 and b.start.any() and b.branch is not None
        assert_close(*found, rtol=1e-4, atol=1e-4)
        lengths |= {width, b.places.shape[1]}
    assert len(kernels) == len(lengths) > 2


def test_bf16(hf_folder):
    """Half the memory; logits in fp32: in bfloat16 steps of 1/8 many titles would tie."""
    model, columns = load(hf_folder, dtype=torch.bfloat16), torch.tensor([7, 3, 3, 63])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model) - logits(load(hf_folder))).std() < 0.03 * logits(model).std()
    x = model(TOKENS, layout(TOKENS * 0))
    want = x.float() @ model.head[columns].float().T
    assert_close(model.logits(x, columns), want, rtol=0, atol=1e-5)
    add_lora(model, 8, 16, 0.0, NAMES)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    assert model(TOKENS, layout(TOKENS * 0)).dtype == torch.bfloat16


def test_init_weights():
    """GPT-2's: projections into the residual stream are smaller. llama2.c scaled w3, the up projection, instead."""
    model = Llama(tiny_config(hidden_size=128, intermediate_size=256, num_hidden_layers=8)).init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            deep = "o_proj" in name or "down_proj" in name
            assert abs(float(p.detach().std()) / (0.02 / 4 if deep else 0.02) - 1) < 0.05, name


def test_a_model_is_freed_at_once():
    """Every validation of LoRA makes a copy. If a model referred to itself, the copies would fill a GPU until Python's
    collector runs, which is rare."""
    m = add_lora(tiny_model("IN:1 OR CR-last:1"), 2, 4.0, 0.0, ["q_proj"])
    copy = weakref.ref(frozen(m, torch.bfloat16).layers[0])
    assert m.layers and copy() is None
