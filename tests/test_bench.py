"""bench.py: controls and metrics against their definitions, and runs that are cut off."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLAMA, random_ffn, random_ids, random_model, write_checkpoint

import bench
import ffn2moe
from bench import Masked
from model import FFN, MoESpec, Split, load_model, perplexity, spec_of

SPLIT, EVERYTHING = Split.parse("S2A2E8"), Split.parse("S2A6E8")

@pytest.fixture
def case():
    """An FFN of 48 neurons, of which 24 run in SPLIT, and its inputs."""
    return random_ffn(dtype=torch.float32), torch.randn(400, 16)

def error(module, ffn, x) -> float:
    return ((module(x) - ffn(x)) ** 2).sum().item()

def contributions(ffn, x):
    """What each neuron adds to the output: [T, q, D]."""
    return ffn2moe.hidden(ffn, x)[:, :, None] * ffn.down_proj.T

# --- Controls

def test_static_pruning_keeps_what_contributes_most_and_refits_it(case, monkeypatch):
    monkeypatch.setattr(ffn2moe, "BLOCK", 150)  # of 400 tokens
    ffn, x = case
    parts = contributions(ffn, x)
    keep = parts.square().sum(dim=(0, 2)).argsort()[-24:]
    pruned, refitted = (bench.static_layer(ffn, x, SPLIT, refit) for refit in (False, True))
    assert torch.allclose(pruned(x), parts[:, keep].sum(dim=1), atol=1e-4)
    # Ridge regression from the neurons that stay, as if the others had never been there
    h, down = ffn2moe.hidden(ffn, x)[:, keep].double(), ffn.down_proj[:, keep].double()
    gram = h.T @ h
    gram.diagonal().add_(ffn2moe.HIDDEN_RIDGE * gram.diagonal().median())
    fitted = down.T + torch.linalg.solve(gram, h.T @ (ffn(x) - h @ down.T))
    assert torch.allclose(refitted(x), (h @ fitted).float(), atol=1e-4)
    assert error(refitted, ffn, x) < 0.9 * error(pruned, ffn, x)

def objective(rows, bins) -> float:
    """Of k-means: the squared distances to the mean of the cluster."""
    clusters = [rows[bins == b] for b in bins.unique()]
    return sum((c - c.mean(dim=0)).square().sum().item() for c in clusters)

def test_groups_of_other_systems_are_balanced_and_group_what_they_say():
    ffn, x = random_ffn(16, 64, dtype=torch.float32), torch.randn(400, 16)
    directions = torch.linalg.qr(torch.randn(16, 16)).Q[:8]
    cluster = torch.arange(64)[torch.randperm(64)] % 8
    ffn.gate_proj[:] = (directions[cluster] + 0.05 * torch.randn(64, 16)) * torch.rand(64, 1)
    by_weight = bench.weight_bins(ffn, x, Split.parse("S1A2E8"))
    rows = torch.nn.functional.normalize(ffn.gate_proj)
    chance = bench.random_bins(ffn, x, Split.parse("S1A2E8"))
    assert objective(rows, by_weight) < 0.7 * objective(rows, chance)
    energy = contributions(ffn, x).square().sum(dim=(0, 2))
    for bins in (by_weight, chance):
        assert bins.bincount().tolist() == [8] * 8
    for e in range(1, 8):  # the shared cluster has the most energy
        assert energy[by_weight == 0].sum() > energy[by_weight == e].sum()
    assert chance.unique_consecutive().numel() > 30  # not in order
    for two_shared in (bench.weight_bins(ffn, x, SPLIT), bench.random_bins(ffn, x, SPLIT)):
        assert two_shared.bincount().tolist() == [16] + [8] * 6

def test_an_mlp_learns_which_expert_has_most_energy():
    """On tokens that it has not seen, it explains most of what varies; the mean explains none."""
    torch.manual_seed(0)
    x, mix = torch.randn(4000, 8), torch.randn(8, 5)
    norms = (torch.tanh(x @ mix) + 0.1 * torch.randn(4000, 5)).exp()
    mlp = bench.mlp_scores(x[:3000], norms[:3000])
    assert mlp(x[:3000]).abs().max() == pytest.approx(ffn2moe.ROUTER_SCALE)
    found, target = mlp(x[3000:]), norms[3000:].log()
    found, target = (t - t.mean(dim=1, keepdim=True) for t in (found, target))
    slope = (found * target).sum() / found.square().sum()
    assert (slope * found - target).square().sum() < 0.2 * target.square().sum()

@pytest.mark.parametrize("group", bench.GROUPINGS.values())
def test_cells_of_the_grid_with_all_experts_active_are_dense(group, case, even_weights):
    ffn, x = case
    for router, refit in itertools.product(bench.ROUTERS, (False, True)):
        moe = bench.grid_layer(ffn, x, EVERYTHING, group, router, refit)
        assert torch.allclose(moe(x), ffn(x), atol=1e-4)

def test_cells_of_the_grid_are_what_they_combine(case):
    ffn, x = case
    paper = bench.grid_layer(ffn, x, SPLIT, bench.paper_bins, "representative", False)
    assert torch.equal(paper(x), ffn2moe.paper_layer(ffn, x, SPLIT)(x))
    joint = bench.grid_layer(ffn, x, SPLIT, bench.joint_bins, "ridge", True)
    assert torch.allclose(joint(x), ffn2moe.joint_layer(ffn, x, SPLIT)(x), atol=1e-3)
    mlp = bench.grid_layer(ffn, x, SPLIT, bench.joint_bins, "MLP", True)
    assert mlp.route(x)[0].equal(mlp.scores(x).topk(2).indices)
    assert not mlp.route(x)[0].equal(joint.route(x)[0])

def test_a_layer_in_two_levels(case, even_weights):
    ffn, x = case
    whole = bench.two_level_layer(ffn, x, EVERYTHING, "S1A2E3")
    assert whole.spec.inner == (1, 2, 3) and torch.allclose(whole(x), ffn(x), atol=1e-4)
    half = bench.two_level_layer(ffn, x, SPLIT, "S1A1E3")
    assert bench.neurons_read(half.spec, 1) == pytest.approx(48 / 2 * 2 / 3)

@pytest.mark.parametrize("keep", [1, 2 / 3, 1 / 4])
def test_wina_runs_the_largest_of_the_neurons_that_run(case, keep):
    ffn, x = case
    moe, masked = ffn2moe.joint_layer(ffn, x, SPLIT), bench.wina_layer(ffn, x, SPLIT, keep)
    assert masked.share == pytest.approx(keep / 2)
    for token in x[:20]:
        chosen, weights = moe.route(token[None])
        gate_ups = [moe.shared_expert.gate_up_proj, *moe.gate_up_proj[chosen[0]]]
        downs = [moe.shared_expert.down_proj, *moe.down_proj[chosen[0]]]
        parts = []
        for gate_up, down, w in zip(gate_ups, downs, [1, *weights[0]], strict=True):
            parts.append(w * contributions(FFN(gate_up, down), token[None])[0])
        parts = torch.cat(parts)  # of the 24 neurons that run, [24, D]
        largest = parts.norm(dim=1).argsort()[-round(24 * keep) :]
        assert torch.allclose(masked(token), parts[largest].sum(dim=0), atol=1e-5)

def test_oracles_know_more_than_routers(case, monkeypatch):
    ffn, x = case
    oracle = bench.oracle_router_layer(ffn, x, SPLIT)
    assert error(oracle, ffn, x) < error(ffn2moe.joint_layer(ffn, x, SPLIT), ffn, x)
    # One huge token does not blur the others
    huge = torch.cat([1e4 * x[:1], x[1:]])
    oracle = bench.oracle_router_layer(ffn, huge, SPLIT)
    energy = contributions(ffn, x[1:]).square().sum(dim=2)  # [T, q]
    norms = ffn2moe.expert_norms(energy, oracle.bin_of, SPLIT.routed)
    assert torch.equal(oracle.route(x[1:])[0], norms.topk(SPLIT.active).indices)
    neurons = bench.oracle_neurons_layer(ffn, x, SPLIT)
    parts = contributions(ffn, x)
    largest = parts.norm(dim=2).topk(24).indices[:, :, None].expand(-1, -1, 16)
    expected = parts.gather(1, largest).sum(dim=1)
    assert torch.allclose(neurons(x.view(4, 100, 16)).view(400, 16), expected, atol=1e-5)
    monkeypatch.setattr(ffn2moe, "ROUTER_SCALE", 1e-7)  # all experts run with weight 1 / A
    for whole in (bench.oracle_router_layer, bench.oracle_neurons_layer):
        assert error(whole(ffn, x, EVERYTHING), ffn, x) < 1e-6

@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_every_row_runs_within_its_budget(monkeypatch):
    """The share of the neurons that run in a model of 30 layers, those that stay dense included."""
    rows = bench.quality_rows()
    assert len({(row.name, row.percent) for row in rows}) == len(rows)
    assert {row for _, row in bench.WATERFALL} <= {row.name for row in rows if row.percent == 50}
    how = {row.name: row.key()["layer"] for row in rows}
    assert how["joint"] == "joint_layer" and how["joint, 0 rounds"] == "joint_layer, rounds=0"
    assert how["MoEfication"] == "grid_layer, group=weight_bins, router=MLP, refit=False"
    monkeypatch.setattr(ffn2moe, "predicted_losses", lambda model, windows: torch.arange(30.0))
    model, windows = SimpleNamespace(specs=[256] * 30), torch.zeros(4, 512)
    monkeypatch.setattr(bench, "mlp_scores", lambda x, norms: torch.nn.Linear(16, norms.shape[1]))
    ffn, x = random_ffn(16, 256, dtype=torch.float32), torch.randn(300, 16)
    for row in rows[1:]:
        split = Split.parse(row.experts)
        layer = row.layer(ffn, x, split)
        assert layer(x).isfinite().all()
        if isinstance(layer, Masked):
            share = layer.share
        else:
            share = bench.neurons_read(spec_of(layer), 1) / 256
        if row.dense == "auto":
            dense = ffn2moe.choose_dense(model, windows, split, row.percent / 100)
        else:
            dense = ffn2moe.parse_layers(row.dense)
        active = (len(dense) + (30 - len(dense)) * share) / 30
        assert 0.8 * row.percent / 100 < active < row.percent / 100 + 0.01, row

# --- Quality

def test_metrics_equal_their_definitions():
    dense, other, windows = random_model(LLAMA), random_model(LLAMA, seed=1), random_ids(4, 100)
    other.embed_tokens, other.lm_head = dense.embed_tokens, dense.lm_head  # as in a conversion
    seen = [dense.hidden_states(window[None])[0, :-1] for window in windows[:3]]
    found = bench.evaluate(other, bench.Text("text", windows, seen), whole=True, title="")
    p = dense(windows[:3])[:, :-1].double().softmax(-1)
    q = other(windows[:3])[:, :-1].double().softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found["same_top"] == pytest.approx(same)
    for key, part in (("perplexity", windows[:3]), ("perplexity_whole", windows)):
        assert found[key] == pytest.approx(perplexity(other, part.flatten(), 100), rel=1e-5)

def test_results_remember_their_rows_and_their_origin(tmp_path, monkeypatch):
    commit = {"commit": "abc", "clean": True, "torch": "2", "machine": "M", "threads": 2}
    monkeypatch.setattr(bench, "origin", lambda device: commit)
    file, settings = tmp_path / "r.json", {"seed": 0}
    done = bench.read_results(file, settings)
    once = SimpleNamespace(device="cpu", json=file, again=False)
    again = SimpleNamespace(device="cpu", json=file, again=True)
    for name, text in (("a", 1), ("b", 2), ("a", 3)):
        assert not bench.is_done(done, name, {"text": text}, once)
        bench.add_row(once, done, name, {"text": text}, {})
    beside = bench.read_results(file, settings)  # of another run, at the same time
    bench.add_row(once, beside, "c", {}, {})
    bench.add_row(once, done, "d", {}, {})
    done = bench.read_results(file, settings)
    assert list(done["rows"]) == ["a", "b", "c", "d"]
    assert not bench.is_done(done, "a", {"text": 1}, once)  # it was defined otherwise
    for args in (once, again):
        assert bench.is_done(done, "a", {"text": 3}, args)
    for other in ({"commit": "def"}, {"clean": False}, {"machine": "N"}):
        monkeypatch.setattr(bench, "origin", lambda device, other=other: commit | other)
        assert bench.is_done(done, "a", {"text": 3}, once)
        assert not bench.is_done(done, "a", {"text": 3}, again)
    with pytest.raises(ValueError, match="made with seed = 0, and not 1"):
        bench.read_results(file, {"seed": 1})
    rows = done["rows"].values()
    assert bench.describe_origin(rows).count("commit abc") == 1
    done["rows"]["a"]["origin"] = commit | {"clean": False}
    assert "abc with changes" in bench.describe_origin(rows)

def test_tables_are_put_between_their_markers():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    found = bench.with_tables(text, {"one": "new\n", "two": "2\n", "three": "3\n"})
    expected = "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    assert found == expected == bench.with_tables(expected, {"one": "new\n"})

def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (bench.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    marked = dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    assert marked == bench.readme_tables()
    makers = {"quality": bench.quality_tables, "speed": bench.speed_tables,
              "finetune": bench.finetune_tables}  # fmt: skip
    all_tables = ""
    for name, make in makers.items():
        found = (bench.RESULTS / f"{name}.md").read_text(encoding="utf-8")
        assert found.endswith(make(json.loads((bench.RESULTS / f"{name}.json").read_text())))
        all_tables += found
    # The text between the tables quotes no figure that is not in them.
    prose = text[text.index("## What it shows") : text.index("### Measure again")]
    prose = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", prose, flags=re.DOTALL)
    quoted = re.findall(r"\d+\.\d+", prose)
    assert len(quoted) > 5 and [one for one in quoted if one not in all_tables] == []

def test_all_commands_run_in_order(monkeypatch):
    seen = []
    for name in ("default", "quality", "speed", "finetune", "figures", "readme"):
        monkeypatch.setitem(bench.COMMANDS, name, seen.append)
    assert bench.main(["all", "--calib", "a", "--eval", "b", "--again"]) == 0
    names = [args.json.stem for args in seen]
    assert names == ["default", "quality", "speed", "finetune", "figures", "readme"]
    assert names == [args.command for args in seen]
    assert all(args.calib == "a" and args.eval == ["b"] and args.again for args in seen)
    assert all(args.json.parent == bench.RESULTS for args in seen)

def test_the_default_job_is_measured_once(tmp_path, monkeypatch):
    calls, file = [], tmp_path / "default.json"

    def job(args):
        calls.append(args)
        return {"table": "made"}

    monkeypatch.setattr(ffn2moe, "run", job)
    for again in ([], [], ["--again"]):
        assert bench.main(["default", "--json", str(file), *again]) == 0
    assert len(calls) == 2 and {"origin", "table"} <= json.loads(file.read_text()).keys()

def test_bad_flags_end_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        bench.main(["all", "--json", "x"])
    for flags, message in {
        "all --only joint": "--only is for quality and finetune",
        "finetune --samples 0": "must be at least 2, other counts",
        "quality --eval-tokens -5": "--eval-tokens at least 0",
        "quality --dtype float32 bfloat16": "more than one --dtype",
        "speed --turns 0": "must be at least 1",
        "speed --tokens 1 0": "must be at least 1",
        "speed --shape 576": "--shape '576'",
        "speed --shape smollm2-135m --experts S1A1E7": "not divisible by E = 7",
        f"speed --json {bench.RESULTS}/default.json": "holds no rows",
    }.items():
        assert bench.main(flags.split()) == 2
        assert message in capsys.readouterr().err

def arguments(command, checkpoint, text, file, **more) -> list[str]:
    argv = [command, "--model", str(checkpoint), "--calib", str(text), "--json", str(file)]
    argv += ["--dtype", "float32", "--device", "cpu"]
    for name, value in ({"eval": text} | more).items():
        values = value if isinstance(value, list) else [value]
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return argv

def rows_of(file) -> dict:
    rows = json.loads(file.read_text())["rows"].values()
    return {(row["key"]["name"], row["key"]["percent"]): row for row in rows}

def run(command, checkpoint, text, file, **more) -> dict:
    assert bench.main(arguments(command, checkpoint, text, file, **more)) == 0
    return rows_of(file)

def test_a_run_that_is_cut_off_goes_on_from_its_rows(checkpoint, text, tmp_path, monkeypatch):
    file, write, written = tmp_path / "quality.json", bench.write_json, []

    def stop_after_two(*content):
        write(*content)
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    rows = [replace(row, calib_windows=4) for row in bench.quality_rows()]
    few = [row for row in rows if row.percent in (100, 75, 50)]
    monkeypatch.setattr(bench, "quality_rows", lambda: few)
    names = ["dense", "paper", "static pruning", "joint", "joint, E = 8", "oracle neurons"]
    names += ["joint, seed 1", "joint, seed 2"]
    sizes = {"eval_tokens": 256, "window": 128, "turns": 1, "only": names}
    text.write_text(text.read_text()[:4000])
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    texts = [text, tmp_path / "other.txt"]
    argv = arguments("quality", checkpoint, text, file, eval=texts, **sizes)
    monkeypatch.setattr(bench, "write_json", stop_after_two)
    assert bench.main(argv) == 130
    done = json.loads(file.read_text())
    assert list(done["rows"]) == ["dense, 100 %", "paper, 75 %"]
    done["rows"]["dense, 100 %"]["active_ffn"] = 12345  # to see that it is not measured again
    done["rows"]["dense, 100 %"]["origin"]["commit"] = "another"
    file.write_text(json.dumps(done))
    assert bench.main(argv) == 0
    rows = rows_of(file)
    assert len(rows) == 15 and rows["dense", 100]["active_ffn"] == 12345
    dense, tokenizer = load_model(checkpoint)
    ids = tokenizer.encode(text.read_text()).ids
    first = rows["dense", 100]["texts"]["text"]
    again = {**sizes, "only": "dense", "eval": texts}
    again = run("quality", checkpoint, text, file, again=[], **again)["dense", 100]
    assert again["active_ffn"] == 1 and again["texts"]["text"] == first
    assert first["perplexity"] == pytest.approx(perplexity(dense, ids[:256], 128), rel=1e-6)
    assert first["perplexity_whole"] == pytest.approx(perplexity(dense, ids, 128), rel=1e-6)
    assert first["kl"] == 0 and first["same_top"] == 1
    quoted = rows["paper", 50]["texts"]  # on all texts, and on all of the first
    assert quoted["other"]["kl"] != quoted["text"]["kl"] and "perplexity_whole" in quoted["text"]
    assert rows["joint, E = 8", 50]["texts"].keys() == {"text"}
    assert "perplexity_whole" not in rows["joint, E = 8", 50]["texts"]["text"]
    routers = 6 * (32 + 32) / (3 * 32 * 64)
    assert rows["paper", 50]["active_ffn"] == pytest.approx(0.5 + routers)
    for name in ("static pruning", "oracle neurons"):
        assert rows[name, 75]["active_ffn"] == 0.75
    timed = {key for key, row in rows.items() if "prefill_ms" in row}
    assert timed >= {("paper", 75), ("joint", 50), ("joint, E = 8", 50)}
    assert not timed & {("dense", 100), ("oracle neurons", 50)}
    table = file.with_suffix(".md").read_text()
    for (name, _), row in rows.items():
        assert name in table and f"{row['texts']['text']['perplexity']:.2f}" in table
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    seeds = [rows[name, 50]["texts"]["text"]["perplexity"] for name in names if "joint" in name]
    seeds.pop(1)  # E = 8
    assert len(set(seeds)) == 3
    assert f"{seeds[0]:.2f}" in bench.readme_tables()["quality"]
    assert f"{seeds[0]:.2f} (joint)" in bench.grid_table(json.loads(file.read_text()))
    assert f"{np.mean(seeds):.2f} (" in bench.seeds_cell(json.loads(file.read_text()), "joint", 50)
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "quality-waterfall.png").exists()  # not all steps are measured
    for i, name in enumerate({name for _, name in bench.WATERFALL}):
        row = {"key": {"name": name, "percent": 50}, "texts": {"text": {"perplexity": 30.0 + i}}}
        done["rows"][f"{name}, 50 %"] = row
    bench.plot_waterfall(done, tmp_path / "w.png")
    assert (tmp_path / "w.png").read_bytes()[:4] == b"\x89PNG"
    for extra in (["--seed", "1"], ["--only", "magic"], ["--eval", str(text), str(text)]):
        assert bench.main([*argv, *extra]) == 2
    for changed in (texts[1], checkpoint / "model.safetensors", checkpoint / "config.json"):
        before = changed.read_bytes()
        changed.write_bytes(before + b"\n")
        assert bench.main(argv) == 2
        changed.write_bytes(before)
    file.write_text("{")
    assert bench.main(argv) == 2

def test_settings_can_be_chosen_on_the_end_of_the_calibration_text(checkpoint, text, tmp_path):
    dense, tokenizer = load_model(checkpoint)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)
    expected = pytest.approx(perplexity(dense, ids[-8 * 64 :], 64), rel=1e-6)
    sizes = {"eval": "held-back", "eval_tokens": 0, "window": 64, "only": "dense"}
    row = run("quality", checkpoint, text, tmp_path / "q.json", **sizes)["dense", 100]
    assert row["texts"]["held-back"]["perplexity"] == expected
    done = json.loads((tmp_path / "q.json").read_text())  # a row of the README without the whole
    del done["rows"]["dense, 100 %"]["texts"]["held-back"]["perplexity_whole"]
    (tmp_path / "q.json").write_text(json.dumps(done))
    row = run("quality", checkpoint, text, tmp_path / "q.json", **sizes)["dense", 100]
    assert row["texts"]["held-back"]["perplexity_whole"] == expected
    sizes |= {"samples": 8, "length": 16}
    row = run("finetune", checkpoint, text, tmp_path / "f.json", **sizes)["dense", 100]
    assert row["before"] == expected
    kept, _ = bench.hold_back(ids, 64)
    assert torch.equal(kept, ids[: -12 * 64])

# --- Speed

def test_the_layers_and_peers_of_the_speed_table_compute_what_they_stand_for():
    torch.manual_seed(0)
    x = torch.randn(9, 16)
    spec = bench.parse_spec("S2A2E8", 64)
    ffn, moe = (bench.random_ffn(16, of, torch.float32, "cpu") for of in (64, spec))
    assert torch.allclose(bench.plain_ffn(ffn, x), ffn(x), atol=1e-5)
    assert torch.allclose(bench.moe_by_grouped_mm(moe, x), moe(x), atol=1e-5)
    theirs = bench.transformers_layer(moe)
    if theirs:  # their gate halves the shared expert
        assert torch.allclose(theirs(x[None])[0], moe(x) - moe.shared_expert(x) / 2, atol=1e-5)

@pytest.mark.parametrize("R, A, batch", [(5, 2, 3), (4, 1, 4), (3, 3, 2), (6, 2, 1)])
def test_the_weights_that_a_batch_reads(R, A, batch):
    """The mean over all choices that the tokens can make."""
    choices = list(itertools.combinations(range(R), A))
    counts = [len(set().union(*tokens)) for tokens in itertools.product(choices, repeat=batch)]
    found = bench.neurons_read(MoESpec(20, R, 7, A), batch)
    assert found == pytest.approx(20 + 7 * np.mean(counts)) and bench.neurons_read(64, batch) == 64
    assert bench.neurons_read(MoESpec(20, R, 7, A), np.inf) == 20 + 7 * R
    # Two levels: all 64 neurons, and those of 2 of 4 slices in 1 shared and 2 of 3 routed experts
    two_levels = bench.parse_spec("S1A2E4+S1A1E4", 64)
    assert bench.neurons_read(two_levels, np.inf) == pytest.approx(64)
    assert bench.neurons_read(two_levels, 1) == pytest.approx(3 * 8)

def test_speed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.can_compile", lambda device: False)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    file, splits = tmp_path / "speed.json", {"S3A3E8": 8 / 6, "S2A2E16": 4}  # ideal speedups
    sizes = {"shape": "16x64", "tokens": [1, 30], "experts": list(splits), "turns": 2}
    argv = arguments("speed", "none", "none", file, **sizes)
    assert bench.main(argv) == 0
    content, rows = file.read_text(), [*json.loads(file.read_text())["rows"].values()]
    assert bench.main(argv) == 0 and file.read_text() == content  # nothing is measured again
    for row, (tokens, experts) in zip(rows, itertools.product((1, 30), splits), strict=True):
        about = {"what": "ffn", "shape": "16x64", "tokens": tokens, "batch": 1, "device": "cpu",
                 "experts": experts, "dtype": "float32"}  # fmt: skip
        assert about.items() <= row["key"].items() and row["tokens_at_once"] == tokens
        assert row["ideal"] == pytest.approx(splits[experts])
        assert row["bound"] == pytest.approx(row["ideal"]) and row["spread"] >= 0
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["moe_ms"])
        assert tokens > 1 or row["read_bound"] == pytest.approx(row["ideal"])
        assert row["parameters"] == [3 * 16 * 64, round(3 * 16 * 64 / row["ideal"])]
        assert {"static", "plain"} <= row["peers_ms"].keys() and row["origin"]["machine"]
        table = bench.speed_tables({"rows": {experts: row}})
        assert f"| {row['speedup']:.2f}x | {row['spread']:.1%} |" in table
        overview = bench.readme_tables()["speed"]
        shown = f"{row['speedup']:.2f}x of {row['ideal']:.2f}x" in overview
        assert "1 token" not in overview and (shown or tokens == 1)
    key = rows[0]["key"] | {"shape": "16x256", "tokens": 4, "experts": "S2A4E8+S3A3E8"}
    row = bench.ffn_speed(key, turns=1)
    assert row["ideal"] == pytest.approx(1 / (6 / 8 * 6 / 8)) and "static" in row["peers_ms"]

def test_speed_of_the_whole_model(tokenizer, tmp_path, monkeypatch):
    raw = LLAMA | {"max_position_embeddings": 2048}
    tiny = write_checkpoint(tmp_path / "long", random_model(raw), tokenizer, raw)
    monkeypatch.setattr("kernels.can_compile", lambda device: False)
    monkeypatch.setattr(bench, "load_model", lambda _, *more: load_model(tiny, *more))
    sizes = {"shape": "smollm2-135m", "experts": "S2A2E8", "batch": [1, 2], "turns": 1}
    assert bench.main(arguments("speed", "none", "none", tmp_path / "speed.json", **sizes)) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"].values()
    found = [(row["key"]["what"], row["key"]["tokens"], row["tokens_at_once"]) for row in rows]
    assert found == [("prefill", 2048, 2048), ("decode", 128, 1),
                     ("prefill", 1024, 2048), ("decode", 128, 2)]  # fmt: skip
    for row in rows:
        before, after = row["parameters"]
        assert row["ideal"] == pytest.approx(2)
        assert before - after == 3 * (3 * 32 * 64 / 2 - 6 * 32)

def test_the_faster_of_two_ways_counts():
    times = {"dense": 2, "dense, compiled": 1, "MoE": 1, "MoE, compiled": 3, "static": 5}
    found = bench.faster({name: np.array([t, t + 1]) for name, t in times.items()})
    assert {name: t[0] for name, t in found.items()} == {"dense": 1, "MoE": 1, "static": 5}

# --- Fine-tuning, figures

def test_finetune_rows(checkpoint, text, tmp_path, monkeypatch):
    rows = bench.finetune_rows(2048)
    assert len({(row.name, row.percent) for row in rows}) == len(rows)
    few = [replace(row, calib_windows=4) for row in rows if row.percent in (100, 50)]
    monkeypatch.setattr(bench, "finetune_rows", lambda samples: few)
    variants = ["with balancing", "in the paper's order", "router learned from nothing"]
    names = ["dense", "joint", *(f"joint, {variant}" for variant in variants)]
    recipe = {"samples": 56, "length": 32, "rate": 0.01, "distill": 0.2, "eval_tokens": 512}
    file = tmp_path / "finetune.json"
    rows = run("finetune", checkpoint, text, file, **recipe, only=names)
    assert len(rows) == 5
    for row in rows.values():
        assert row["after"] < row["before"] and row["loss"][1] < row["loss"][0]
        assert row["tokens"] == 56 * 32
    joint, balanced, in_order, blank = (rows[name, 50] for name in names[1:])
    assert joint["before"] == balanced["before"] != blank["before"]
    assert balanced["imbalance"][1] < joint["imbalance"][1]
    # This one begins with the dense model as it was; the others with the fine-tuned one.
    assert in_order["before"] > 1.5 * joint["before"]
    dense, tokenizer = load_model(checkpoint)
    before = perplexity(dense, tokenizer.encode(text.read_text()).ids[:512], 128)
    assert rows["dense", 100]["before"] == pytest.approx(before, rel=1e-6)
    table = file.with_suffix(".md").read_text()
    assert f"({joint['after'] / rows['dense', 100]['after']:.2f})" in table
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    content = file.read_text()  # nothing is done again, and only the first text counts
    run("finetune", checkpoint, text, file, **recipe, only=names, eval=[text, "none"])
    assert file.read_text() == content
    # A row that is missing is measured again, with a teacher that is made again.
    done = json.loads(content)
    done["rows"] = {name: done["rows"][name] for name in ("dense, 100 %", "joint, 50 %")}
    file.write_text(json.dumps(done))
    again = run("finetune", checkpoint, text, file, **recipe, only=names[2])[names[2], 50]
    assert again["after"] == balanced["after"]

def test_figures(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FIGURES", tmp_path / "f")
    monkeypatch.setattr(bench, "SHOWN", "The old river")
    assert bench.main(arguments("figures", checkpoint, text, tmp_path / "x", window=128)) == 0
    for name in ("activation_rates", "partition", "words"):
        assert (tmp_path / "f" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

def test_the_fine_tuned_dense_model_of_as_many_tokens_is_the_measure():
    rows = {}
    for name, percent, tokens, after in (
        ("dense", 100, 10, 4.0), ("dense, 2 x the samples", 100, 20, 2.0), ("joint", 50, 20, 3.0)
    ):  # fmt: skip
        row = {"key": {"name": name, "percent": percent}, "tokens": tokens, "after": after}
        rows[f"{name}, {percent} %"] = row | {"before": 9.0}
    assert bench.finetune_cell({"rows": rows}, "joint", 50) == "9.00 → 3.00 (1.50)"
