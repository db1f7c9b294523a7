"""Fine-tuning: what is trained, that a run can be cut off anywhere, and what is left at the end."""

import itertools
import json
import os

import pytest
import torch
from tokenizers import Tokenizer

# isort: off
from conftest import CONFIGS, LLAMA, kind_of, random_ids, random_model, refused, write_checkpoint
import ffn2moe
import kernels
import train
from model import Decoder, export, load_model, perplexity, read_ids, save_model

SMALL = {"samples": 24, "length": 16, "batch": 4, "rate": 2e-3, "rank": 4, "dropout": 0.1}
SMALL |= {"scale_rate": 1e-3, "bias_step": 0.02}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
IDS = torch.randint(40, (600,), generator=torch.Generator().manual_seed(5))  # 40 of 300 tokens

def small(**changes):
    return train.make_settings(**(SMALL | changes))

def moe_model(dtype=torch.float32, seed=0, raw=LLAMA, method="joint") -> Decoder:
    """Three layers; the FFN of the first is dense."""
    model, ids = random_model(raw, seed, dtype), random_ids(512, seed=seed)
    return ffn2moe.convert(model, ids, "S1A2E8", method, [0], window=128)

def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def fill_disk(monkeypatch):
    """Let the disk be full when a run saves its state for the fourth time."""
    calls = itertools.count(1)

    def fsync(_):
        if next(calls) == 4:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fsync)

def test_lora_starts_at_zero_and_merges_into_w_plus_scale_b_a():
    model, ids = moe_model(), torch.arange(40)[None]
    before, logits = weights(model), model(ids)
    train.prepare(model, small(dropout=0.5, scale_rate=0.0, bias_step=0.0))
    assert torch.allclose(model.eval()(ids), logits, atol=1e-5)
    expected = dict(before)
    for name, module in model.named_modules():
        for weight in getattr(module, "parametrizations", ()):
            lora = module.parametrizations[weight][0].requires_grad_(False)
            torch.nn.init.normal_(lora.b, std=0.1)
            expected[f"{name}.{weight}"] = before[f"{name}.{weight}"] + 8 * lora.b.matmul(lora.a)
    logits = model(ids)
    train.merge(model.train())  # no dropout in what is merged
    after = weights(model)
    assert after.keys() == before.keys() and not any(p.requires_grad for p in model.parameters())
    assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in after)
    assert torch.allclose(model(ids), logits, atol=1e-4)

@pytest.mark.parametrize("method", ["joint", "paper"])
def test_gradients_of_an_moe_are_exact(method):
    """By its input, router, gate scales and experts, against finite differences; three tokens leave
    an expert that none of them chose."""
    moe = moe_model(torch.float64, method=method).layers[1].mlp
    moe.router_scale = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    names = [name for name, _ in moe.named_parameters()]
    values = [torch.randn(3, 32, dtype=torch.float64), *map(moe.get_parameter, names)]

    def forward(x, *tensors):
        return torch.func.functional_call(moe, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, [v.requires_grad_() for v in values], fast_mode=True)

@pytest.mark.parametrize("changes, moved", [
    ({}, ("_proj", "router_scale", "router_bias")),
    ({"router": True}, ("_proj", "router")),
    ({"bias_step": 0.0}, ("_proj", "router_scale")),
    ({"scale_rate": 0.0, "bias_step": 0.0}, ("_proj",)),
])
def test_what_moves(changes, moved):
    for model in (moe_model(), moe_model(method="paper"), random_model(LLAMA)):
        before = weights(model)
        train.finetune(model, IDS, small(**changes))
        for name, t in weights(model).items():
            was = before.get(name, torch.zeros(7))  # scales and biases
            assert torch.equal(t, was) != any(part in name for part in moved), name

def test_a_router_moves_in_proportion_to_its_size():
    relative = []
    for size in (1e-3, 10.0):
        model = moe_model()
        moe = model.layers[1].mlp
        before = moe.router_weight.mul_(size / moe.router_weight.norm(dim=1).mean()).clone()
        train.finetune(model, IDS, small(router=True, samples=8))
        relative.append(((moe.router_weight - before).norm() / size).item())
    assert 0.01 < relative[0] < 1 and relative[1] == pytest.approx(relative[0], rel=0.5)

def test_small_steps_of_a_bfloat16_model_are_not_lost():
    model = moe_model(torch.bfloat16)
    ones = torch.ones(7, dtype=torch.bfloat16)  # the neighbours of 1 are 4e-3 and 8e-3 away
    scale = model.layers[1].mlp.router_scale = torch.nn.Parameter(ones)
    train.finetune(model, IDS, small(samples=160))  # 40 steps of up to 1e-3
    assert scale.dtype == torch.bfloat16 and (scale != 1).sum() > 3

def test_two_levels_are_trained():
    """Also where no token comes to the router inside an expert; here with tied embeddings."""
    model = moe_model(raw=CONFIGS["llama-tied"])
    ffn2moe.convert(model, IDS, "S1A1E4", dense=[0], window=128, k_act=4)
    outer = model.layers[1].mlp
    outer.router_bias = torch.nn.Parameter(-torch.eye(outer.spec.num_experts)[0])  # never expert 0
    log = train.finetune(model, IDS, small(samples=80))
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert not outer.experts[0].router_bias.any() and outer.experts[1].router_bias.any()
    assert log["loss"][-1] < log["loss"][0]

def test_balance_by_hand():
    moe, x = moe_model().layers[1].mlp, torch.randn(50, 32)
    moe.make_trained("router_bias")
    tokens = torch.tensor([(moe.route(x)[0] == e).sum().item() for e in range(7)])
    p = (x @ moe.router_weight.T).softmax(-1)
    expected = -0.5 * p.std(correction=0) * (tokens - 100 / 7).sign()
    moe.train()(x.view(5, 10, 32))
    assert train.balance([moe], 0.5) == pytest.approx(tokens.max().item() / (100 / 7))
    assert torch.allclose(moe.router_bias, expected) and moe.router_bias.any()

def test_an_expert_of_two_levels_counts_the_tokens_that_chose_it():
    """In bfloat16, where the products of other experts get more rows."""
    model = ffn2moe.convert(moe_model(), IDS, "S1A1E4", dense=[0], window=128, k_act=4)
    moe, x = model.layers[1].mlp.bfloat16().train(), torch.randn(50, 32).bfloat16()
    moe(x)
    for e, expert in enumerate(moe.experts):
        own = (moe.last[1] == e).any(dim=1)
        assert torch.equal(expert.last[0], x[own])

def test_what_is_balanced_is_what_ran(monkeypatch):
    """Also where dropout on the router would choose others if it were asked again."""
    model, ran, moe = moe_model(), [], kernels.moe

    def remember(*arguments):
        ran.append(arguments[4])
        return moe(*arguments)

    def check(moes, step):
        assert all(one.last[1].equal(chosen) for one, chosen in zip(moes, ran, strict=True))
        ran.clear()
        return 1.0

    monkeypatch.setattr(kernels, "moe", remember)
    monkeypatch.setattr(train, "balance", check)
    train.finetune(model, IDS, small(router=True, dropout=0.5))
    assert not any("last" in vars(ffn) for ffn in model.ffns)

@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("taught", [True, False])
def test_the_loss_and_its_gradient_are_what_they_say(share, taught):
    """Against PyTorch's own gradient of the whole formula; 150 tokens are more than one block."""
    model, teacher = moe_model(torch.float64), random_model(LLAMA, 1, torch.float64)
    ids, weight = IDS[:156].view(6, 26), model.layers[0].mlp.gate_up_proj.requires_grad_()
    logp, teacher_logp = (m(ids)[:, :-1].log_softmax(-1) for m in (model, teacher))
    expected = -logp.gather(-1, ids[:, 1:, None]).mean()
    if taught:
        kl = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1).mean()
        expected = (1 - share) * expected + share * kl
    (gradient,) = torch.autograd.grad(expected, weight)
    loss = train.backpropagate(model, ids, teacher if taught else None, share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    error = (weight.grad - gradient).norm() / gradient.norm()
    assert error < 1e-5

def test_learning_rates_rise_and_fall():
    factors = [train.rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == factors[4] > 0.99
    assert factors[50] == pytest.approx(0.55) and 0.1 < factors[99] < 0.11
    assert factors[4:] == sorted(factors[4:], reverse=True)

def test_batches_use_all_of_the_text_before_any_comes_again():
    settings = small(samples=24, length=10, batch=5)  # 24 samples are 5 batches
    batches = train.make_batches(random_model(LLAMA), torch.arange(100), settings)
    assert batches.shape == (5, 5, 10)
    order = batches.view(25, 10)[:, 0].tolist()  # how each window begins
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(set(order))
    assert order[:10] != order[10:20] and len(set(order[20:])) == 5

def test_what_a_run_that_is_cut_off_leaves(tmp_path, monkeypatch):
    """An ordinary model, and the last whole state, which no other run can use."""
    model, state = moe_model(), tmp_path / "state"
    fill_disk(monkeypatch)
    full = "could not write .*: no space left"
    refused(full, train.finetune, model, IDS, small(), state, save_every=1)
    assert list(tmp_path.iterdir()) == [state]
    assert torch.load(state, weights_only=True)["step"] == 2
    left = {name for name in weights(model) if not name.endswith(("router_scale", "router_bias"))}
    assert left == weights(moe_model()).keys()
    other = "other settings, another model or another text"
    for seed, ids, settings in ((0, IDS, small(seed=1)), (0, IDS + 1, small()), (1, IDS, small())):
        refused(other, train.finetune, moe_model(seed=seed), ids, settings, state, resume=True)
    state.write_bytes(state.read_bytes()[:1000])
    refused("cannot be resumed from", train.finetune, model, IDS, small(), state, resume=True)

def test_a_loss_that_is_not_finite_leaves_a_state_to_go_on_from(tmp_path, monkeypatch):
    state, calls, backpropagate = tmp_path / "state", itertools.count(), train.backpropagate
    expected = train.finetune(moe_model(), IDS, small())

    def broken(*args):
        return backpropagate(*args) * (torch.inf if next(calls) == 3 else 1)

    monkeypatch.setattr(train, "backpropagate", broken)
    refused("step 3: loss inf", train.finetune, moe_model(), IDS, small(), state, save_every=1)
    log = train.finetune(moe_model(), IDS, small(rate=2e-4), state, resume=True)
    assert log["loss"][:3] == expected["loss"][:3]  # from step 2, the last with a finite loss
    assert log["loss"][3] != expected["loss"][3] and len(log["loss"]) == 6

def test_a_last_step_that_breaks_the_weights_is_refused():
    settings = small(samples=4, rate=1e30)
    refused("the last step", train.finetune, moe_model(torch.float16), IDS, settings)

def test_a_router_that_cannot_learn_is_refused():
    """Of one expert per token, or of the paper's, the weight is 1 whatever the router says."""
    for split, method in (("S1A1E4", "joint"), ("S1A2E8", "paper")):
        model, ids = random_model(LLAMA), random_ids(512)
        ffn2moe.convert(model, ids, split, method, [0], window=128)
        refused("train gate scales", train.finetune, model, IDS, small(router=True, scale_rate=0.0))
    refused("'dropuot'", train.make_settings, dropuot=0.1)

def test_scales_and_biases_of_zero_are_not_saved():
    model = moe_model()
    train.prepare(model, small())
    train.merge(model)
    raw, state = export(model)
    assert raw["model_type"] == "qwen2_moe" and not any("router_bias" in name for name in state)
    model.layers[1].mlp.router_bias[0] = 1.0
    raw, state = export(model)
    assert raw["model_type"] == "ffn2moe" and "layers.1.mlp.router_bias" in state

@pytest.fixture
def argv(tokenizer, text, tmp_path):
    save_model(moe_model(), tokenizer, tmp_path / "moe")
    argv = [f"--text={text}", f"--eval={text}", "--eval-tokens=256", *FLAGS]
    return [*argv, f"--model={tmp_path / 'moe'}", f"--out={tmp_path / 'tuned'}"]

@pytest.mark.parametrize("extras, kind", [(0.0, "qwen2_moe"), (0.02, "ffn2moe")])
def test_command_line(extras, kind, argv, text, tmp_path):
    """A Qwen2-MoE stays one, unless there are gate scales and selection biases."""
    result, out = tmp_path / "result", tmp_path / "tuned"
    flags = ["--samples=200", f"--scale-rate={extras}", f"--bias-step={extras}", f"--json={result}"]
    assert train.main([*argv, *flags]) == 0
    found = json.loads(result.read_text())
    assert found["perplexity"]["after"] < 0.9 * found["perplexity"]["before"]
    assert len(found["log"]["loss"]) == 50 and not (tmp_path / "tuned.state").exists()
    assert kind_of(out) == kind
    tuned, tokenizer = load_model(out)
    ids = read_ids(tuned, tokenizer, str(text), "test")[:256]
    assert perplexity(tuned, ids, 128) == pytest.approx(found["perplexity"]["after"], rel=1e-5)

def test_what_cannot_work_is_refused_before_the_long_work(argv, tokenizer, tmp_path, capsys):
    refusals = {
        "--resume": "to resume from",
        "--dropout=1": "--dropout below 1",
        "--seed=99999999999999999999": "--seed below",
        "--rate=-1": "rates",
        "--bias-step=nan": "rates",
        "--samples=0": "at least 1",
        f"--json={tmp_path}": "of another kind",
        "--length=9999": "9999 tokens are more than",
        f"--text={os.devnull}": "0 tokens of text",
        f"--out={tmp_path / 'moe'}": "not empty",
    }
    for flag, message in refusals.items():
        assert train.main([*argv, flag]) == 2
        error = capsys.readouterr().err
        assert message in error and "fine-tuning" not in error, error
    assert train.main(["--router", f"--out={tmp_path / 'new'}"]) == 2  # what is converted has A = 1
    assert "train gate scales" in capsys.readouterr().err
    stranger = Tokenizer.from_str(tokenizer.to_str())
    stranger.add_special_tokens(["<other>"])
    teacher = write_checkpoint(tmp_path / "teacher", random_model(LLAMA), stranger, LLAMA)
    assert train.main([*argv, f"--teacher={teacher}"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    (tmp_path / "tuned.state").write_text("not a state")
    assert train.main(argv) == 2 and "--resume continues" in capsys.readouterr().err
    assert train.main([*argv, "--resume"]) == 2 and "cannot be res" in capsys.readouterr().err

def test_the_default_job(checkpoint, text, tmp_path, monkeypatch, capsys):
    """Convert, and learn from the dense model. Cut off, it goes on to the same weights."""
    whole, cut, untrained = tmp_path / "whole", tmp_path / "cut", tmp_path / "untrained"
    monkeypatch.setattr(train, "load_model", lambda _, *rest: load_model(checkpoint, *rest))
    argv = [f"--text={text}", f"--eval={text}", "--eval-tokens=256", *FLAGS]
    argv += ["--samples=400", "--rate=1e-3", "--dropout=0", "--save-every=20"]
    assert train.main([*argv, f"--out={whole}"]) == 0
    assert capsys.readouterr().out.count("perplexity") == 3
    frozen = ["--rate=0", "--scale-rate=0", "--bias-step=0", "--samples=4"]
    assert train.main([*argv, *frozen, f"--out={untrained}"]) == 0
    dense, tokenizer = load_model(checkpoint)
    ids = read_ids(dense, tokenizer, str(text), "train")[:1024].view(-1, 16)
    p = dense(ids).double().log_softmax(-1)
    divergence = {}
    for out in (whole, untrained):
        q = load_model(out)[0](ids).double().log_softmax(-1)
        divergence[out] = (p.exp() * (p - q)).sum(-1).mean()
    assert divergence[whole] < 0.9 * divergence[untrained]
    fill_disk(monkeypatch)
    assert train.main([*argv, f"--out={cut}"]) == 2
    assert (tmp_path / "cut.state").exists() and not cut.exists()
    assert train.main([*argv, f"--out={cut}", "--resume", "--teacher=dense"]) == 0
    assert same(load_model(cut)[0], load_model(whole)[0]) and not list(tmp_path.glob("*state*"))
