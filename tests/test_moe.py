"""Models that are MoEs already, mixtures in two levels, and what is written of them."""

import json

import pytest
import torch

# isort: off
from conftest import LLAMA, MOES, QWEN2_MOE, kind_of, random_ids, random_model, refused
from conftest import write_checkpoint
from safetensors.torch import load_file
import ffn2moe
from ffn2moe import convert
from model import Split, export, load_model, save_model, split_spec

IDS, FILE = random_ids(8, 128, seed=3), "model.safetensors"

def converted_model(split="S2A2E8", raw=LLAMA, dtype=torch.float32, **settings):
    return convert(random_model(raw, dtype=dtype), IDS, split, dense=[0], **settings)

# --- Two levels

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

    split = ffn2moe.convert_ffn(layer, x, convert_layer)
    own = [x[[e in row for row in chosen.tolist()]] for e in range(6)]
    few = [len(rows) < 16 for rows in own]  # experts have 16 neurons
    assert any(few) == (tokens == 30) and not all(few)
    expected = [x if is_few else rows for rows, is_few in zip(own, few, strict=True)] + [x]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert split.spec.inner == Split(1, 3, 4) and torch.allclose(split(x), before, atol=1e-4)
    assert torch.equal(layer(x), before)  # the old layer is left as it was

@pytest.mark.parametrize("method", ["joint", "paper"])
def test_our_own_model_is_split_again(method, tmp_path, tokenizer, capsys):
    model = converted_model("S2A4E8", dtype=torch.float64, method=method, k_act=5)
    convert(model, IDS, "S1A1E4", method, k_act=2)  # the first layer, a dense one, stays so
    assert ffn2moe.describe(model.specs) == "MoE of MoEs"
    router = {"joint": "linear", "paper": "neurons"}[method]
    spec = split_spec(split_spec(64, Split(2, 4, 8), router), Split(1, 1, 4), router)
    assert model.specs == [64, spec, spec]
    save_model(model, tokenizer, tmp_path / "out")
    assert kind_of(tmp_path / "out") == "ffn2moe" and "note: " in capsys.readouterr().err
    loaded, _ = load_model(tmp_path / "out", torch.float64)
    assert loaded.specs == model.specs and torch.equal(loaded(IDS), model(IDS))
    refused("cannot be split again", convert, model, IDS, "S1A1E2", method, dense=[0], k_act=1)

# --- Checkpoints

@pytest.mark.parametrize("name", ["llama", *MOES])
def test_what_was_not_converted_is_saved_as_it_came(name, tmp_path, tokenizer):
    raw = MOES.get(name, LLAMA)
    path = write_checkpoint(tmp_path / "in", random_model(raw), tokenizer, raw)
    model, _ = load_model(path)
    save_model(model, tokenizer, tmp_path / "out")
    assert kind_of(tmp_path / "out") == raw["model_type"] and export(model)[0] == raw
    before, after = (load_file(folder / FILE) for folder in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)

def test_large_models_are_saved_in_shards(tmp_path, tokenizer, monkeypatch):
    """Named as those of Hugging Face, and all of them are needed."""
    model, out = converted_model(), tmp_path / "out"
    save_model(model, tokenizer, out)
    whole = load_file(out / FILE)
    monkeypatch.setattr("model.SHARD_BYTES", 60_000)
    save_model(model, tokenizer, out, force=True)
    *files, index = sorted(out.glob("model*"))
    places = json.loads(index.read_text())["weight_map"]
    assert len(files) > 2 and index.name == f"{FILE}.index.json"
    for i, file in enumerate(files, start=1):
        assert file.name == f"model-{i:05}-of-{len(files):05}.safetensors"
        shard = load_file(file)
        assert sum(t.nbytes for t in shard.values()) <= 60_000
        assert all(places.pop(name) == file.name for name in shard)
        assert all(torch.equal(t, whole.pop(name)) for name, t in shard.items())
    assert not places and not whole and torch.equal(load_model(out)[0](IDS), model(IDS))
    files[0].rename(out / "a.safetensors")  # others may name them otherwise
    index.write_text(index.read_text().replace(files[0].name, "a.safetensors"))
    assert torch.equal(load_model(out)[0](IDS), model(IDS))
    files[1].unlink()
    refused(f"{files[1].name} is missing", load_model, out)
    index.write_text("[]")
    refused("weight_map", load_model, out)
    monkeypatch.undo()
    save_model(model, tokenizer, out, force=True)
    assert [file.name for file in out.glob("model*")] == [FILE]
