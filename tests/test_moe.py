"""Models that are MoEs already, mixtures in two levels, and checkpoints that other engines run."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, LLAMA, MOES, QWEN2_MOE, random_ids, random_model, write_checkpoint
from safetensors import safe_open

import ffn2moe
import kernels
from ffn2moe import convert
from model import MoE, Split, active_parameters, for_export, load_model, native_raw, save_model

IDS = random_ids(8, 128, seed=3)


def converted_model(split="S2A2E8", raw=LLAMA, dtype=torch.float32, **settings):
    return convert(random_model(raw, dtype=dtype), IDS, split, dense=[0], **settings)


def kind_of(path) -> str:
    return json.loads((path / "config.json").read_text())["model_type"]


# --- Two levels


@pytest.mark.parametrize("method", ["joint", "paper"])
@pytest.mark.parametrize("name", MOES)
def test_with_all_inner_experts_active_the_moe_is_unchanged(name, method, even_weights):
    model = random_model(MOES[name])
    expected = model(IDS)
    convert(model, IDS, "S1A3E4", method, dense=[], k_act=4)
    splits = [module.spec.split for module in model.modules() if isinstance(module, MoE)]
    assert splits.count(Split(1, 3, 4)) >= 9
    assert torch.allclose(model(IDS), expected, atol=1e-4)


def test_two_levels_token_by_token():
    """The outer router, then the inner router of each expert that it chose, written out; the shared
    expert is split too."""
    model = convert(random_model(QWEN2_MOE), IDS, "S1A2E4", dense=[0])
    assert model.config.ffns[0] == random_model(QWEN2_MOE).config.ffns[0] != model.config.ffns[1]
    outer = model.ffns[2]

    def inner(moe, x):
        scores = moe.router_weight @ x
        best = scores.argsort()[-2:]
        y = moe.shared_expert(x)
        for i, weight in zip(best, scores[best].softmax(0), strict=True):
            h = kernels.swiglu(F.linear(x, moe.gate_up_proj[i]))
            y = y + weight * F.linear(h, moe.down_proj[i])
        return y

    for x in torch.randn(20, 32):
        p = (outer.router_weight @ x).softmax(0)
        y = inner(outer.shared_expert, x) * torch.sigmoid(outer.shared_expert_gate @ x)
        for e in p.argsort()[-3:]:
            y = y + p[e] * inner(outer.experts[e], x)
        assert torch.allclose(outer(x[None])[0], y, atol=1e-5)


@pytest.mark.parametrize("tokens", [1024, 30])
def test_experts_are_converted_on_their_own_tokens_or_if_few_on_all(tokens, even_weights):
    layer, x = random_model(QWEN2_MOE).ffns[1], torch.randn(tokens, 32)
    before, seen = layer(x), []
    chosen = (x @ layer.router_weight.T).topk(3).indices
    weights = [*layer.gate_up_proj, layer.shared_expert.gate_up_proj]

    def convert_layer(ffn, inputs):
        assert torch.equal(ffn.gate_up_proj, weights[len(seen)])
        seen.append(inputs)
        return ffn2moe.joint_layer(ffn, inputs, Split(1, 3, 4))

    ffn2moe.convert_ffn(layer, x, convert_layer)
    own = [x[[e in row for row in chosen.tolist()]] for e in range(6)]
    few = [len(rows) < 16 for rows in own]  # experts have 16 neurons
    assert any(few) == (tokens == 30) and not all(few)
    expected = [x if is_few else rows for rows, is_few in zip(own, few, strict=True)] + [x]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert layer.spec.inner == Split(1, 3, 4) and torch.allclose(layer(x), before, atol=1e-4)


@pytest.mark.parametrize("method", ["joint", "paper"])
def test_our_own_model_is_split_again(method, tmp_path, tokenizer, capsys):
    model = converted_model("S2A4E8", dtype=torch.float64, method=method, k_act=5)
    _, parameters = active_parameters(model)
    convert(model, IDS, "S1A1E4", method, dense=[0], k_act=2)
    assert ffn2moe.describe(model.config.ffns) == "MoE of MoEs"
    inner_routers = 2 * (1 + 6 * 4 / 6) * 3 * (32 * (2 if method == "paper" else 1) + 2)
    ffns = 2 * 3 * 32 * 64 * 6 / 8
    assert active_parameters(model)[1] == parameters - ffns / 2 + inner_routers
    save_model(for_export(model), tokenizer, tmp_path / "out")
    assert kind_of(tmp_path / "out") == "ffn2moe" and "note: " in capsys.readouterr().err
    loaded, _ = load_model(tmp_path / "out", torch.float64)
    assert loaded.config.ffns == model.config.ffns and torch.equal(loaded(IDS), model(IDS))
    with pytest.raises(ValueError, match="cannot be split again"):
        convert(model, IDS, "S1A1E2", method, dense=[0], k_act=1)


# --- Checkpoints


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-3", "mistral", "qwen2"])
def test_the_standard_form_has_the_same_logits(name, tmp_path, tokenizer):
    raw = {key: value for key, value in CONFIGS[name].items() if key != "head_dim"}
    model = converted_model("S2A3E8", raw)
    standard = for_export(model)
    assert torch.allclose(standard(IDS), model(IDS), atol=1e-5)
    save_model(standard, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    assert config["mlp_only_layers"] == [0] and config["num_experts"] == 6
    assert torch.equal(load_model(tmp_path / "out")[0](IDS), standard(IDS))
    transformers = pytest.importorskip("transformers")  # a development check, not a dependency
    where, dtype = tmp_path / "out", torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    assert torch.allclose(theirs(IDS).logits, standard(IDS), atol=1e-4)


def test_what_has_no_standard_form_is_exported_in_our_own_and_says_why(capsys):
    reasons = [
        (converted_model(method="paper"), "--method joint"),
        (converted_model(raw=CONFIGS["qwen3"]), "attention"),
        (converted_model(raw=CONFIGS["llama-bias"]), "attention"),
        (convert(random_model(QWEN2_MOE), IDS, "S1A1E4"), "two levels"),
    ]
    for name in ("router_scale", "router_bias"):
        model = converted_model()
        getattr(model.ffns[1], name)[1] = 0.1
        reasons.append((model, "trained"))
    for model, why in reasons:
        assert for_export(model) is model and model.config.raw["model_type"] == "ffn2moe"
        note = capsys.readouterr().err
        assert note.startswith("note: ") and why in note and note.count("\n") == 1


@pytest.mark.parametrize("name", ["llama", *MOES])
def test_what_was_not_converted_is_saved_as_it_came(name, tmp_path, tokenizer):
    raw = MOES.get(name, LLAMA)
    path = write_checkpoint(tmp_path / "in", random_model(raw), tokenizer, raw)
    model, _ = load_model(path)
    model.config.raw = native_raw(model.config)
    save_model(model, tokenizer, tmp_path / "native")
    again, _ = load_model(tmp_path / "native")
    assert kind_of(tmp_path / "native") == "ffn2moe" and again(IDS).equal(model(IDS))
    save_model(for_export(again), tokenizer, tmp_path / "out")
    assert kind_of(tmp_path / "out") == raw["model_type"]
    one, other = path / "model.safetensors", tmp_path / "out/model.safetensors"
    with safe_open(one, "pt") as before, safe_open(other, "pt") as after:
        names = set(before.keys())
        assert names == set(after.keys())
        assert all(torch.equal(before.get_tensor(n), after.get_tensor(n)) for n in names)


def test_large_models_are_saved_in_shards(tmp_path, tokenizer, monkeypatch):
    model, out = converted_model(), tmp_path / "out"
    save_model(model, tokenizer, out)
    monkeypatch.setattr("model.SHARD_BYTES", 60_000)
    save_model(model, tokenizer, out, force=True)
    files = sorted(out.glob("model*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files) - 1:05}.safetensors"
    for file in files[:-1]:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
            assert sum(shard.get_tensor(name).nbytes for name in names) <= 60_000
            assert {index[name] for name in names} == {file.name}
    assert torch.equal(load_model(out)[0](IDS), model(IDS))
    monkeypatch.undo()
    save_model(model, tokenizer, out, force=True)
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
