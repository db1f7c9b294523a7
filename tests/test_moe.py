"""Models that are MoEs already, mixtures in two levels, and checkpoints that other engines run."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, LLAMA, MOES, QWEN2_MOE, random_model, write_checkpoint
from safetensors import safe_open

import ffn2moe
import kernels
import model as lm
from model import InputError, MoE

IDS = torch.randint(300, (8, 128), generator=torch.Generator().manual_seed(3))


def converted_model(split="S2A2E8", raw=LLAMA, dtype=torch.float32, **settings) -> lm.Decoder:
    return ffn2moe.convert(random_model(raw, dtype=dtype), IDS, split, dense=[0], **settings)


# --- Two levels


@pytest.mark.parametrize("method", ["joint", "paper"])
@pytest.mark.parametrize("name", MOES)
def test_with_all_inner_experts_active_the_moe_is_unchanged(name, method, even_weights):
    model, ids = random_model(MOES[name]), IDS[:2]
    expected = model(ids)
    ffn2moe.convert(model, IDS, "S1A3E4", method, dense=[], k_act=4)
    assert len([m for m in model.modules() if isinstance(m, MoE) and m.spec.split == (1, 3, 4)]) >= 9
    assert torch.allclose(model(ids), expected, atol=1e-4)


def test_two_levels_token_by_token():
    """Outer router, then the inner router of each expert that it chose, written out; the shared expert is split too."""
    model = random_model(QWEN2_MOE)
    ffn2moe.convert(model, IDS, "S1A2E4", dense=[0])
    assert model.config.ffns[0] == lm.parse_config(QWEN2_MOE).ffns[0] != model.config.ffns[1]
    outer = model.layers[2].mlp
    ffn = lambda x, e, i: F.linear(kernels.swiglu(F.linear(x, e.gate_up_proj[i])), e.down_proj[i])

    def inner(moe, x):
        scores = moe.router_weight @ x
        best = scores.argsort()[-2:]
        return moe.shared_expert(x) + sum(weight * ffn(x, moe, i) for i, weight in zip(best, scores[best].softmax(0)))

    for x in torch.randn(20, 32):
        p = (outer.router_weight @ x).softmax(0)
        y = inner(outer.shared_expert, x) * torch.sigmoid(outer.shared_expert_gate @ x)
        for e in p.argsort()[-3:]:
            y = y + p[e] * inner(outer.experts[e], x)
        assert torch.allclose(outer(x[None])[0], y, atol=1e-5)


def test_inner_experts_are_profiled_on_the_tokens_of_their_expert(monkeypatch):
    model, seen = random_model(QWEN2_MOE), []
    layer = model.layers[0].mlp
    x = model.layers[0].post_attention_layernorm(model.embed_tokens(IDS)).flatten(0, 1)
    chosen = (x @ layer.router_weight.T).topk(3).indices
    ffns = [layer.shared_expert] + [lm.FFN.of(layer.gate_up_proj[e], layer.down_proj[e]) for e in range(6)]

    def convert_layer(ffn, tokens):
        seen.append(tokens)
        assert torch.equal(ffn.gate_up_proj, ffns[len(seen) - 1].gate_up_proj)
        return ffn

    ffn2moe.convert_ffn(layer, x, convert_layer)
    expected = [x] + [x[[e in choice for choice in chosen.tolist()]] for e in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_an_expert_with_too_few_tokens_stays_whole(tmp_path, tokenizer, even_weights, monkeypatch):
    model = random_model(QWEN2_MOE)
    x = torch.randn(400, 32)
    layer = model.layers[1].mlp
    counts, before = layer.route(x)[0].flatten().bincount().tolist(), layer(x)
    limit = sorted(counts)[2]
    monkeypatch.setattr(ffn2moe, "ENOUGH", limit / 16)
    ffn2moe.convert_ffn(layer, x, lambda ffn, x: ffn2moe.joint_layer(ffn, x, lm.Split(1, 3, 4)))
    kinds = [type(expert).__name__ for expert in layer.experts]
    assert kinds == ["MoE" if count >= limit else "FFN" for count in counts] and kinds.count("FFN") == 2
    assert torch.allclose(layer(x), before, atol=1e-4)
    # such a layer is saved and loaded too
    model = random_model(QWEN2_MOE)
    monkeypatch.setattr(ffn2moe, "ENOUGH", 3)
    ffn2moe.convert(model, IDS[:1, :100], "S1A2E4", dense=[])
    assert {type(e) for ffn in model.config.ffns for e in ffn.experts} == {int, lm.MoESpec}
    lm.save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(lm.load_model(tmp_path / "out")[0](IDS), model(IDS))


def test_the_first_layers_of_an_moe_are_split_too():
    dense = lambda config: ffn2moe.resolve(random_model(config), "S1A2E4", "joint", "auto", 10)[1]
    assert dense(QWEN2_MOE) == frozenset() and dense(LLAMA) is None  # still to be chosen


@pytest.mark.parametrize("method", ["joint", "paper"])
def test_our_own_model_is_split_again(method, tmp_path, tokenizer, monkeypatch):
    model = converted_model("S2A4E8", dtype=torch.float64, method=method, k_act=5)
    once, parameters = model(IDS), lm.active_parameters(model)
    same = converted_model("S2A4E8", dtype=torch.float64, method=method, k_act=5)
    with monkeypatch.context() as patch:
        patch.setattr(ffn2moe, "ROUTER_SCALE", 1e-7)  # all inner experts are active, with weights that are all the same
        ffn2moe.convert(same, IDS, "S1A3E4", method, dense=[0], k_act=2)
    assert torch.allclose(same(IDS), once, atol=1e-4)
    ffn2moe.convert(model, IDS, "S1A1E4", method, dense=[0], k_act=2)
    assert ffn2moe.describe(model.config.ffns) == "MoE of MoEs"
    inner_routers = 2 * (1 + 6 * 4 / 6) * 3 * (32 * (2 if method == "paper" else 1) + 2)
    ffns = 2 * 3 * 32 * 64 * 6 / 8
    assert lm.active_parameters(model)[1] == parameters[1] - ffns / 2 + inner_routers
    assert sum(map(lm.neurons_of, model.config.ffns)) == 3 * 64
    lm.save_model(model, tokenizer, tmp_path / "out")
    loaded, _ = lm.load_model(tmp_path / "out", torch.float64)
    assert loaded.config.ffns == model.config.ffns and torch.equal(loaded(IDS), model(IDS))
    with pytest.raises(InputError, match="standard|Qwen2-MoE"):
        lm.standard_form(model)


# --- Standard checkpoints


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-3", "mistral", "qwen2"])
def test_the_standard_form_has_the_same_logits(name, tmp_path, tokenizer):
    raw = {k: v for k, v in CONFIGS[name].items() if k != "head_dim"}
    model = converted_model("S2A3E8", raw)
    standard = lm.standard_form(model)
    assert torch.allclose(standard(IDS), model(IDS), atol=1e-5)
    prompt = IDS[1, :9]
    assert lm.generate(standard, prompt, 64) == lm.generate(model, prompt, 64)
    lm.save_model(standard, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "qwen2_moe" and config["mlp_only_layers"] == [0] and config["num_experts"] == 6
    loaded, _ = lm.load_model(tmp_path / "out")
    assert torch.equal(loaded(IDS), standard(IDS))
    transformers = pytest.importorskip("transformers")  # a development check, not a dependency
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    assert torch.allclose(theirs(IDS).logits, standard(IDS), atol=1e-4)
    found = theirs.generate(prompt[None], max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 9:]
    assert found.tolist() == lm.generate(model, prompt, 64)


def test_what_has_no_standard_form_is_refused_with_the_alternative():
    for model, why in [
        (converted_model(method="paper"), "--method joint"),
        (converted_model(raw=CONFIGS["qwen3"]), "attention"),
        (converted_model(raw=CONFIGS["llama-bias"]), "attention"),
        (ffn2moe.convert(random_model(QWEN2_MOE), IDS, "S1A1E4"), "two levels"),
    ]:
        with pytest.raises(InputError, match=f"--format native.*{why}"):
            lm.standard_form(model)
    for name in ("router_scale", "router_bias"):
        model = converted_model()
        getattr(model.layers[1].mlp, name)[1] = 0.1
        with pytest.raises(InputError, match="--format native.*trained"):
            lm.standard_form(model)
    for untouched in (random_model(LLAMA), random_model(QWEN2_MOE)):
        assert lm.standard_form(untouched) is untouched


def test_formats_of_the_command_line(checkpoint, text, tmp_path, capsys):
    argv = ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), "--window", "128", "--calib-tokens", "1024"]
    argv += ["--eval-tokens", "256", "--dense", "0"]
    kind = lambda name: json.loads((tmp_path / name / "config.json").read_text())["model_type"]
    assert ffn2moe.main([*argv, "--out", str(tmp_path / "a")]) == 0 and kind("a") == "qwen2_moe"
    assert ffn2moe.main([*argv, "--out", str(tmp_path / "b"), "--format", "native"]) == 0 and kind("b") == "ffn2moe"
    paper = [*argv, "--method", "paper"]
    assert ffn2moe.main([*paper, "--out", str(tmp_path / "c")]) == 0 and kind("c") == "ffn2moe"
    capsys.readouterr()
    assert ffn2moe.main([*paper, "--out", str(tmp_path / "d"), "--format", "standard"]) == 2
    printed = capsys.readouterr().err
    assert "--method joint" in printed and "converting" not in printed  # refused before the work
    # An MoE is evaluated as it is, or split again where --experts says so.
    again = ["--model", str(tmp_path / "a"), *argv[2:]]
    assert ffn2moe.main(again) == 0 and "it is evaluated" in capsys.readouterr().err
    assert ffn2moe.main([*again, "--experts", "S1A1E2", "--out", str(tmp_path / "e")]) == 0 and kind("e") == "ffn2moe"
    assert "MoE of MoEs" in capsys.readouterr().out
    assert ffn2moe.main([*again, "--experts", "S1A1E3"]) == 2 and "not divisible" in capsys.readouterr().err


# --- Files


def test_large_models_are_saved_in_shards(tmp_path, tokenizer, monkeypatch):
    model = converted_model()
    lm.save_model(model, tokenizer, tmp_path / "out")
    monkeypatch.setattr(lm, "SHARD_BYTES", 60_000)
    lm.save_model(model, tokenizer, tmp_path / "out", force=True)
    files = sorted((tmp_path / "out").glob("model*"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert files[0].name == f"model-00001-of-{len(files) - 1:05}.safetensors" and len(files) > 3
    for file in files[:-1]:
        with safe_open(file, "pt") as shard:
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 60_000  # noqa: SIM118
            assert {index[name] for name in shard.keys()} == {file.name}  # noqa: SIM118
    assert torch.equal(lm.load_model(tmp_path / "out")[0](IDS), model(IDS))
    monkeypatch.undo()
    lm.save_model(model, tokenizer, tmp_path / "out", force=True)
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_small_files_carry_over(tmp_path, tokenizer):
    path = write_checkpoint(tmp_path / "in", random_model(LLAMA), tokenizer, LLAMA)
    files = {"generation_config.json": b'{"eos_token_id": 299}', "special_tokens_map.json": b'{"eos_token": "<end>"}'}
    files |= {"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}', "chat_template.jinja": b"{{ messages }}"}
    for name, content in files.items():
        (path / name).write_bytes(content)
    model, tokenizer = lm.load_model(path)
    lm.save_model(lm.standard_form(ffn2moe.convert(model, IDS, "S2A2E8")), tokenizer, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in files.items())


@pytest.mark.parametrize("name", MOES)
def test_other_moes_are_saved_as_they_came(name, tmp_path, tokenizer):
    path = write_checkpoint(tmp_path / "in", random_model(MOES[name]), tokenizer, MOES[name])
    model, _ = lm.load_model(path)
    lm.save_model(lm.in_format(model, "standard"), tokenizer, tmp_path / "out")
    with safe_open(path / "model.safetensors", "pt") as before, safe_open(tmp_path / "out/model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        assert all(torch.equal(before.get_tensor(key), after.get_tensor(key)) for key in before.keys())  # noqa: SIM118
    kind = lambda path: json.loads((path / "config.json").read_text())["model_type"]
    assert kind(tmp_path / "out") == MOES[name]["model_type"]
    # In our own form, and back.
    lm.save_model(lm.in_format(model, "native"), tokenizer, tmp_path / "native")
    again, _ = lm.load_model(tmp_path / "native")
    assert kind(tmp_path / "native") == "ffn2moe" and torch.equal(again(IDS), model(IDS))
    lm.save_model(lm.in_format(again, None), tokenizer, tmp_path / "back")
    assert kind(tmp_path / "back") == MOES[name]["model_type"]
    assert torch.equal(lm.load_model(tmp_path / "back")[0](IDS), model(IDS))


def test_experts_that_stay_whole_are_counted(capsys):
    model, ids = random_model(LLAMA), torch.randint(300, (40, 128), generator=torch.Generator().manual_seed(0))
    ffn2moe.convert(model, ids, "S1A1E4", dense=[0])
    chosen = {"experts": "S1A1E2", "dense": frozenset()}  # the first layer is split for the first time: none of its experts counts
    ffn2moe.convert_and_time(copy.deepcopy(model), ids, chosen, None)
    assert "whole" not in capsys.readouterr().err
    ffn2moe.convert_and_time(model, ids[:1, :4], chosen, None)
    assert "6 of 6 routed experts got fewer calibration tokens than they have neurons and stay whole" in capsys.readouterr().err
