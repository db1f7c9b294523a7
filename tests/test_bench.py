"""bench.py: the controls against their definitions, the metrics against a count by hand, and a run that is cut off."""

import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import LLAMA, random_model, write_checkpoint
from test_method import random_ffn

import bench
import ffn2moe
import model as lm
import train
from model import Split

SPLIT = Split.parse("S2A2E8")  # of 48 neurons, 24 run


@pytest.fixture
def layer():
    return random_ffn(dtype=torch.float32), torch.randn(400, 16)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_all_rows_can_be_made():
    """Each layer function of the table runs, and within its budget."""
    ffn, x = random_ffn(16, 256, dtype=torch.float32), torch.randn(400, 16)
    for row in bench.quality_rows()[1:]:
        split = Split.parse(row.experts)
        assert row.layer(ffn, x, split)(x).isfinite().all()
        share = (split.shared + split.active) / split.total
        assert share <= row.percent / 100 and (row.dense == "auto" or row.dense == "none")


def error(module, ffn, x):
    return ((module(x) - ffn(x)) ** 2).sum().item()


def test_static_pruning_keeps_what_contributes_most_and_the_refit_makes_the_most_of_it(layer):
    ffn, x = layer
    contribution = torch.stack([ffn2moe.hidden(ffn, x)[:, i, None] * ffn.down_proj[:, i] for i in range(48)])
    assert torch.allclose(bench.total_energy(ffn, x), contribution.square().sum(dim=(1, 2)), rtol=1e-4)
    keep = contribution.square().sum(dim=(1, 2)).argsort()[-24:]
    pruned, refitted = (bench.static_layer(ffn, x, SPLIT, refit) for refit in (False, True))
    assert torch.allclose(pruned(x), contribution[keep].sum(dim=0), atol=1e-4)
    h = ffn2moe.hidden(ffn, x)[:, keep]
    best = h @ torch.linalg.lstsq(h, ffn(x)).solution
    assert error(refitted, ffn, x) < 1.01 * ((best - ffn(x)) ** 2).sum() < 0.9 * error(pruned, ffn, x)


def test_oracles_know_more_than_routers(layer, even_weights):
    ffn, x = layer
    joint = error(ffn2moe.joint_layer(ffn, x, SPLIT), ffn, x)
    oracle = bench.oracle_router_layer(ffn, x, SPLIT)
    assert error(oracle, ffn, x) < joint
    neurons = bench.oracle_neurons_layer(ffn, x, SPLIT)
    contribution = (ffn2moe.hidden(ffn, x) * ffn.down_proj.norm(dim=0)).abs()
    for t in range(5):
        runs = contribution[t].argsort()[-24:]
        expected = ffn.down_proj[:, runs] @ ffn2moe.hidden(ffn, x[t : t + 1])[0, runs]
        assert torch.allclose(neurons(x[t : t + 1])[0], expected, atol=1e-5)
    everything = Split.parse("S4A4E8")
    for whole in (bench.oracle_router_layer, bench.oracle_neurons_layer, bench.random_layer, bench.paper_refit_layer):
        assert error(whole(ffn, x, everything), ffn, x) < 1e-6


def test_the_joint_partition_is_better_than_one_drawn_by_lot(layer):
    ffn, x = layer
    drawn = bench.random_layer(ffn, x, SPLIT)
    assert drawn.gate_up_proj.shape == (6, 12, 16)
    assert error(ffn2moe.joint_layer(ffn, x, SPLIT), ffn, x) < 0.95 * error(drawn, ffn, x)


def test_metrics_equal_their_definitions():
    dense, other = random_model(LLAMA), random_model(LLAMA, seed=1)
    other.embed_tokens, other.lm_head = dense.embed_tokens, dense.lm_head  # a conversion leaves them alone
    windows = torch.randint(300, (4, 100), generator=torch.Generator().manual_seed(0))
    text = bench.Text("text", windows, [dense.hidden_states(window[None])[0, :-1] for window in windows[:3]])
    found = bench.evaluate(other, text, first=3, whole=True, bar=lambda windows: windows)
    p, q = dense(windows[:3])[:, :-1].double().softmax(-1), other(windows[:3])[:, :-1].double().softmax(-1)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found["same_top"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found["perplexity"] == pytest.approx(lm.perplexity(other, windows[:3].flatten(), 100), rel=1e-5)
    assert found["perplexity_whole"] == pytest.approx(lm.perplexity(other, windows.flatten(), 100), rel=1e-5)


def test_a_run_that_is_cut_off_goes_on_from_its_rows(checkpoint, text, tmp_path, monkeypatch, capsys):
    file = tmp_path / "quality.json"
    tokens = ["--eval-tokens", "256", "--window", "128", "--dtype", "float32"]
    argv = ["quality", "--model", str(checkpoint), "--calib", str(text), "--eval", str(text), *tokens, "--json", str(file)]
    argv += ["--whole", "--only", "dense", "paper", "static pruning", "joint", "oracle neurons"]
    write, written = lm.write_json, []

    def stop_after_two(*args):
        write(*args)
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lm, "write_json", stop_after_two)
    assert bench.main(argv) == 130
    done = json.loads(file.read_text())
    assert [row["key"]["name"] for row in done["rows"]] == ["dense", "paper"]
    done["rows"][0]["seconds"] = 12345  # the mark of a row that is not measured again
    file.write_text(json.dumps(done))
    assert bench.main(argv) == 0
    rows = {(row["key"]["name"], row["key"]["percent"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 13 and "perplexity_whole" not in rows["static pruning", 50]["texts"]["text"] and rows["dense", 100]["seconds"] == 12345
    dense, tokenizer = lm.load_model(checkpoint)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)
    first = rows["dense", 100]["texts"]["text"]
    assert first["perplexity"] == pytest.approx(lm.perplexity(dense, ids[:256], 128), rel=1e-6)
    assert first["perplexity_whole"] == pytest.approx(lm.perplexity(dense, ids, 128), rel=1e-6)
    assert first["kl"] == 0 and first["same_top"] == 1 and rows["dense", 100]["active_ffn"] == 1
    assert rows["static pruning", 25]["active_ffn"] == rows["oracle neurons", 25]["active_ffn"] == 0.25
    assert rows["paper", 50]["active_ffn"] == pytest.approx(0.5 + 6 * (32 + 32 + 2) / (3 * 32 * 64))
    table = file.with_suffix(".md").read_text()
    for (name, percent), row in rows.items():
        assert name in table and f"{row['texts']['text']['perplexity']:.2f}" in table, (name, percent)
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    # A row that was defined otherwise then is measured again, and no other.
    done = json.loads(file.read_text())
    done["rows"][3]["key"]["dense"] = "7"
    file.write_text(json.dumps(done))
    monkeypatch.setattr(lm, "write_json", write)
    assert bench.main(argv) == 0
    again = json.loads(file.read_text())["rows"]
    assert len(again) == 13 and again[:12] == [row for i, row in enumerate(done["rows"]) if i != 3]
    assert again[12]["texts"] == done["rows"][3]["texts"]
    for extra, complaint in ((["--seed", "1"], "other settings"), (["--only", "magic"], "no such row")):
        capsys.readouterr()
        assert bench.main([*argv, *extra]) == 2
        assert complaint in capsys.readouterr().err
    file.write_text("{")
    assert bench.main(argv) == 2


def test_settings_can_be_chosen_on_the_end_of_the_calibration_text(checkpoint, text, tmp_path):
    file = tmp_path / "held.json"
    tokens = ["--eval-tokens", "0", "--window", "64", "--dtype", "float32", "--only", "dense"]
    argv = ["quality", "--model", str(checkpoint), "--calib", str(text), "--eval", "held-back", *tokens, "--json", str(file)]
    assert bench.main(argv) == 0
    found = json.loads(file.read_text())["rows"][0]["texts"]["held-back"]["perplexity"]
    dense, tokenizer = lm.load_model(checkpoint)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)
    assert found == pytest.approx(lm.perplexity(dense, ids[-8 * 64 :], 64), rel=1e-6)
    kept, held_back = bench.hold_back(ids, 64)
    assert len(held_back) == 8 * 64 and torch.equal(kept, ids[: -12 * 64])
    file = tmp_path / "tuned.json"
    argv = ["finetune", "--model", str(checkpoint), "--text", str(text), "--eval", "held-back", "--dtype", "float32", "--json", str(file)]
    assert bench.main([*argv, "--samples", "8", "--length", "16", "--only", "dense"]) == 0
    found = json.loads(file.read_text())["rows"][0]["before"]
    assert found == pytest.approx(lm.perplexity(dense, ids[-8 * 128 :], 128), rel=1e-6)


# --- Speed


def test_the_layers_and_peers_of_the_speed_table_compute_what_they_stand_for():
    torch.manual_seed(0)
    ffn, moe, static = bench.random_layers(16, 64, SPLIT, torch.empty(0))
    x = torch.randn(9, 16)
    h = ffn2moe.hidden(ffn, x)
    assert torch.allclose(static(x), h[:, :32] @ ffn.down_proj[:, :32].T, atol=1e-5)
    assert torch.allclose(bench.plain_ffn(ffn, x), ffn(x), atol=1e-5)
    assert torch.allclose(bench.moe_by_grouped_mm(moe, x), moe(x), atol=1e-5)
    everything = bench.random_layers(16, 64, Split.parse("S2A6E8"), torch.empty(0))
    everything[1].router_weight.zero_()  # all weights are 1 / A
    assert torch.allclose(everything[1](x), everything[0](x), atol=1e-5)


def test_the_transformers_peer_runs_the_same_experts():
    pytest.importorskip("transformers")
    moe, x = bench.random_layers(16, 64, SPLIT, torch.empty(0))[1], torch.randn(9, 16)
    out = bench.transformers_layer(moe)(x[None])
    out = out[0] if isinstance(out, tuple) else out
    assert torch.allclose(out[0], moe(x) - moe.shared_expert(x) / 2, atol=1e-5)


def test_speed_rows(tmp_path, capsys):
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    argv = ["speed", "--shape", "16x64", "--tokens", "1", "30", "--experts", "S3A3E8", "S2A2E16", "--dtype", "float32"]
    assert bench.main([*argv, "--turns", "2", "--device", "cpu", "--json", str(file), "--plot", str(plot)]) == 0
    rows = json.loads(file.read_text())
    assert [(r["what"], r["shape"], r["tokens"], r["batch"], r["experts"]) for r in rows] == [
        ("ffn", "16x64", tokens, 1, experts) for tokens in (1, 30) for experts in ("S3A3E8", "S2A2E16")
    ]
    for r in rows:
        assert r["dtype"] == "float32" and r["device"] == "cpu" and r["spread"] >= 0
        assert r["speedup"] == pytest.approx(r["dense_ms"] / r["moe_ms"]) and r["of_ideal"] == pytest.approx(r["speedup"] / r["ideal"])
        assert r["dense_weight_bytes_per_token"] == 3 * 16 * 64 * 4
    assert [r["ideal"] for r in rows] == pytest.approx([8 / 6, 4.0] * 2)
    router = 4 * (14 * 16 + 2 * 14)  # router_weight, scale and bias
    assert rows[1]["moe_weight_bytes_per_token"] == 3 * 16 * 64 * 4 // 4 + router
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ffn")]) == 4


@pytest.mark.parametrize("what, tokens", [("prefill", 64), ("decode", 32)])
def test_whole_models_are_timed_on_the_same_tokens(what, tokens):
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    models = {"dense": random_model(LLAMA), "S1A1E4": ffn2moe.convert(random_model(LLAMA), ids, "S1A1E4", dense=[])}
    before = models["dense"](ids)
    (row,) = bench.model_speed(models, what, ids, turns=2)
    assert (row["what"], row["tokens"], row["batch"], row["experts"], row["ideal"]) == (what, tokens, 2, "S1A1E4", 2)
    assert row["bound"] > 0 and row["moe_weight_bytes_per_token"] < row["dense_weight_bytes_per_token"]
    assert torch.equal(models["dense"](ids), before)  # its FFNs are still there


def test_functions_run_in_turns():
    called = []
    functions = {name: lambda name=name: called.append(name) or time.sleep(0.03) for name in "ab"}
    times = bench.interleave(functions, "cpu", turns=3)
    assert called == ["a", "b"] + ["a", "b"] + ["a", "b"] * 3 and all(t.shape == (3,) and (t > 29).all() for t in times.values())


# --- Fine-tuning


def test_finetune_rows(tokenizer, text, tmp_path, capsys):
    raw = LLAMA | {"num_hidden_layers": 5}  # of which the joint method leaves 3 alone
    checkpoint, file = write_checkpoint(tmp_path / "five", random_model(raw), tokenizer, raw), tmp_path / "finetune.json"
    argv = ["finetune", "--model", str(checkpoint), "--text", str(text), "--eval", str(text), "--dtype", "float32", "--json", str(file)]
    argv += ["--samples", "80", "--length", "32", "--rate", "0.01", "--distill", "0.2", "--bias-step", "0.02", "--eval-tokens", "512"]
    argv += ["--only", "dense", "joint", "joint, no balancing", "joint, in the paper's order", "joint, router learned from nothing"]
    assert bench.main(argv) == 0
    rows = {(r["key"]["name"], r["key"]["percent"]): r for r in json.loads(file.read_text())["rows"]}
    assert len(rows) == 7
    for r in rows.values():
        assert r["after"] < r["before"] and r["loss"][1] < r["loss"][0]
    joint, blank = rows["joint", 50], rows["joint, router learned from nothing", 50]
    assert joint["before"] == rows["joint, no balancing", 50]["before"] != blank["before"] and joint["active_ffn"] == blank["active_ffn"]
    dense, tokenizer = lm.load_model(checkpoint)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)[:512]
    order = rows["joint, in the paper's order", 50]  # it begins with the dense model as it was; the others with the fine-tuned one
    assert order["before"] > 1.5 * joint["before"] and order["after"] > joint["after"]
    assert rows["dense", 100]["before"] == pytest.approx(lm.perplexity(dense, ids, 128), rel=1e-6)
    capsys.readouterr()
    before = file.read_text()
    assert bench.main(argv) == 0 and file.read_text() == before  # nothing is done again
    assert f"{joint['after'] / rows['dense', 100]['after']:.2f}" in capsys.readouterr().out


def test_an_ablation_switches_what_the_recipe_has():
    for step, name, changed in ((0.0, "joint, with balancing", {"bias_step": 0.02}), (0.1, "joint, no balancing", {"bias_step": 0.0})):
        rows = {row[0]: row[2] for row in bench.finetune_rows(train.settings(bias_step=step))}
        assert rows[name] == changed and len([other for other in rows if "balancing" in other]) == 1


def test_levels(checkpoint, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ffn_levels", partial(bench.ffn_levels, hidden_size=32, intermediate_size=256))
    out = tmp_path / "levels.json"
    argv = ["levels", "--model", str(checkpoint), "--calib", str(text), "--eval", str(text), "--eval-tokens", "256", "--turns", "2"]
    argv += ["--levels", "S2A2E4", "S1A1E4", "--flat", "S16A16E64", "--dense", "0", "--device", "cpu", "--json", str(out)]
    assert bench.main(argv) == 0
    dense, one, two, flat = json.loads(out.read_text())["rows"]
    ffn, tiny = 3 * 32 * 64, lm.load_model(checkpoint)[0]
    assert dense["perplexity"] == pytest.approx(lm.perplexity(tiny.bfloat16(), lm.read_ids(tiny, lm.load_model(checkpoint)[1], str(text), "test")[:256], 128))
    assert dense["ffn_parameters"] == 3 * ffn and one["ffn_parameters"] > two["ffn_parameters"] > 2 * ffn
    assert one["speedup"] > 0 and two["splits"] == ["S2A2E4", "S1A1E4"] and flat["splits"] == ["S16A16E64"]
    assert "| two levels | S2A2E4, then S1A1E4 |" in capsys.readouterr().out


def test_memory(tmp_path, capsys):
    out = tmp_path / "memory.json"
    argv = ["memory", "--shape", "192x256", "--layers", "2", "--vocab-size", "500", "--calib-tokens", "4096", "--dense", "0"]
    assert bench.main([*argv, "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["model_bytes"] == 2 * (192 * (500 + 1) + 2 * (4 * 192 * 192 + 3 * 192 * 256 + 2 * 192)) and "times the model" in capsys.readouterr().out


def test_figures(checkpoint, text, tmp_path, capsys):
    argv = ["figures", "--model", str(checkpoint), "--calib", str(text), "--eval", str(text), "--experts", "S1A2E8", "--dense", "0"]
    argv += ["--layers", "0", "2", "--layer", "2", "--text", "The old river", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "f")]
    assert bench.main(argv) == 0
    assert "expert  6 is for" in capsys.readouterr().out
    assert bench.main([*argv, "--layer", "0"]) == bench.main([*argv, "--layers", "3"]) == 2
    for name in ("activation_rates.png", "partition.png", "words.png"):
        assert (tmp_path / "f" / name).read_bytes()[:4] == b"\x89PNG"


def test_the_faster_of_two_ways_counts():
    times = {"dense": 2, "dense, compiled": 1, "MoE": 1, "MoE, compiled": 3, "static": 5}
    found = bench.faster({name: np.array([t, t + 1]) for name, t in times.items()})
    assert {name: t[0] for name, t in found.items()} == {"dense": 1, "MoE": 1, "static": 5}
