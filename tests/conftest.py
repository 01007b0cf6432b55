"""Small pieces the tests share: `from conftest import PLANS, tiny_model`."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads slow shared cores down
if os.environ.get("HATLLM_TEST_DEVICE") != "cuda":  # all tests but tests/test_cuda.py compare a CPU's bits
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import random  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from hatllm import InputError  # noqa: E402
from model import Config, Llama  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
VOCAB = 64
PLANS = (
    "OR",
    "IN",
    "CR",
    "IN-closed",
    "IN:1 OR:2 CR-own:1",
    "IN-closed:2 OR:1 CR-last:1",
)  # of the 4 layers of tiny_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # tiny models: waking a second one costs more


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def frozen_heap():
    """gc.collect, which extras.bench calls before it measures, does not look through what is loaded already."""
    pytest.importorskip("transformers.models.llama.modeling_llama")
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def refuses(*parts):
    """An InputError of one sentence that holds all of parts."""
    with pytest.raises(InputError) as e:
        yield
    text = str(e.value)
    assert text and "\n" not in text and len(text) < 500 and all(str(part) in text for part in parts), text


def data_root(name: str = "") -> Path:
    """The folder of a prepared data set: in $HATLLM_DATA, ../shared/data or data/; skips where there is none."""
    places = [Path(p) / name for p in (os.environ.get("HATLLM_DATA"), REPO / "../shared/data", REPO / "data") if p]
    if found := [p for p in places if p.is_dir()]:
        return found[0].resolve()
    pytest.skip(f"no data {name} in {' or '.join(map(str, places))}; set HATLLM_DATA")


def weights_root(name: str = "smollm2-135m") -> Path:
    """The folder of real weights: in $HATLLM_WEIGHTS, else weights/; skips where there is none."""
    folder = Path(os.environ.get("HATLLM_WEIGHTS", REPO / "weights")) / name
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no weights in {folder}; set HATLLM_WEIGHTS")
    return folder


def tiny_config(**changes) -> Config:
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB)
    return Config(**small | dict(num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=0) | changes)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave nothing near zero or one: wrong norms, scales and positions must show in the output."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = torch.rand(p.shape, generator=g) + 0.5
        else:
            std = 0.5 if p.dim() == 1 or "embed" in name else 1.0 / p.shape[1] ** 0.5
            p.data = torch.randn(p.shape, generator=g) * std
    return model


def tiny_model(plan: str = "OR", seed: int = 0, **changes) -> Llama:
    return spread(Llama(tiny_config(**changes), plan), seed).eval()


def prompt(rng: random.Random, items: int = 3) -> list[int]:
    """The items of a prompt's tokens: context, titles with or without a separator, and a target."""
    out = [0] * rng.randint(1, 3)
    for k in range(1, items + 1):
        out += [k] * rng.randint(1, 4) + [0] * rng.randint(0, 1)
    return out + [items + 1] * rng.randint(2, 3)
