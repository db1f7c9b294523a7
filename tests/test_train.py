"""The fine-tuning loop: what it trains, that it can be cut off anywhere, and that it leaves an ordinary model."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, LLAMA, random_model

import ffn2moe
import model as lm
import train
from model import InputError

SMALL = {"samples": 24, "length": 16, "batch": 4, "rate": 1e-2, "rank": 2, "alpha": 4.0, "dropout": 0.1, "scale_rate": 1e-3, "bias_step": 0.02}


def as_flags(settings: dict) -> list[str]:
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def moe_model(dtype=torch.float32, seed=0, raw=LLAMA, method="joint") -> lm.Decoder:
    ids = torch.randint(300, (512,), generator=torch.Generator().manual_seed(seed))
    return ffn2moe.convert(random_model(raw, seed, dtype), ids, "S1A2E8", method, dense=[0], window=128)


def text_ids(n=600):
    return torch.randint(40, (n,), generator=torch.Generator().manual_seed(5))  # 40 of 300 tokens: there is something to learn


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_lora_starts_as_nothing_and_merges_into_what_it_was():
    model, ids = moe_model(), torch.arange(40)[None]
    before, logits = weights(model), model(ids)
    train.prepare(model, train.settings(**SMALL))
    assert torch.allclose(model.eval()(ids), logits, atol=1e-5)  # B is zero
    expected = {}
    for name, module in model.named_modules():
        for weight in getattr(module, "parametrizations", ()):
            lora = module.parametrizations[weight][0].requires_grad_(False)
            torch.nn.init.normal_(lora.b, std=0.1)
            parts = [lora.b[..., i, :, :] @ lora.a[..., i, :, :] for i in range(2 if weight == "gate_up_proj" else 1)]
            expected[f"{name}.{weight}"] = before[f"{name}.{weight}"] + 4.0 / 2 * torch.cat(parts, dim=-2)
    assert len(expected) == 3 * 4 + 2 + 2 * 4  # attention; a dense FFN; shared and routed experts of two layers
    logits = model(ids)
    train.merge(model)
    after = weights(model)
    assert after.keys() == before.keys() and not any(p.requires_grad for p in model.parameters())
    for name, t in after.items():
        assert torch.allclose(t, expected.get(name, before[name]), atol=1e-6), name
    assert torch.allclose(model(ids), logits, atol=1e-5)


@pytest.mark.parametrize("method", ["joint", "paper"])
def test_gradients_are_exact(method):
    """Of an MoE by its input, its router, its scales and the LoRA of its experts, against finite differences in float64."""
    moe = moe_model(torch.float64, method=method).layers[1].mlp
    moe.router_scale.data.normal_()
    router = [name for name, _ in moe.named_parameters() if name.startswith("router_") and name != "router_bias"]
    names = ["down_proj", "gate_up_proj", *router]
    loras = [train.LoRA(getattr(moe, name), parts, train.settings(rank=2)).double() for name, parts in (("down_proj", 1), ("gate_up_proj", 2))]
    for lora in loras:
        torch.nn.init.normal_(lora.b, std=0.1)

    def forward(x, *tensors):
        weights = dict(zip(names, tensors))
        for lora, name, ab in zip(loras, names, (tensors[-4:-2], tensors[-2:])):
            weights[name] = torch.func.functional_call(lora, dict(zip("ab", ab)), (weights[name],))
        return torch.func.functional_call(moe, weights, (x,))

    tensors = [torch.randn(5, 32, dtype=torch.float64), *(getattr(moe, name) for name in names), *(t for lora in loras for t in (lora.a, lora.b))]
    assert torch.autograd.gradcheck(forward, [t.detach().clone().requires_grad_() for t in tensors], fast_mode=True)


def test_the_merged_weights_are_those_without_dropout(monkeypatch):
    model, ids, seen = moe_model(), text_ids(40)[None], []
    merge = train.merge
    monkeypatch.setattr(train, "merge", lambda model: (seen.append(model.eval()(ids)), model.train(), merge(model)))
    train.finetune(model, text_ids(), train.settings(**SMALL | {"dropout": 0.5}))
    assert torch.allclose(model(ids), seen[0], atol=1e-5)


def test_a_dense_model_is_trained_as_well():
    model = random_model(LLAMA)
    before = weights(model)
    log = train.finetune(model, text_ids(), train.settings(**SMALL))
    moved = {name for name, t in weights(model).items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "_proj" in name} and log["imbalance"] == [0.0] * 6


def test_what_is_trained():
    for changes, moved in (
        ({}, ("_proj", "router_scale", "router_bias")),
        ({"router": True}, ("_proj", "router")),
        ({"bias_step": 0.0}, ("_proj", "router_scale")),
        ({"full": True, "rate": 1e-3}, ("",)),
    ):
        model = moe_model()
        before = weights(model)
        train.finetune(model, text_ids(), train.settings(**SMALL | changes))
        for name, t in weights(model).items():
            wanted = any(part in name for part in moved)
            assert torch.equal(t, before[name]) != wanted, (changes, name)
    assert not train.prepare(moe_model(), train.settings(**SMALL | {"scale_rate": 0.0}))[1]["params"]  # nor has it a part in the gradient's norm


@pytest.mark.parametrize("how", ["router", "full"])
def test_a_router_moves_by_a_share_of_its_own_size(how):
    """Adam's first step is as long as the rate, whatever the gradient."""
    model = moe_model()
    for moe, size in zip(train.moes_of(model), (1e-3, 10.0)):
        moe.router_weight *= size / moe.router_weight.square().mean().sqrt()
    before = [moe.router_weight.clone() for moe in train.moes_of(model)]
    train.finetune(model, text_ids(), train.settings(**SMALL | {how: True, "samples": 4, "warmup": 1.0, "clip": 1e9, "router_rate": 0.1}))
    for moe, weight, size in zip(train.moes_of(model), before, (1e-3, 10.0)):
        assert (moe.router_weight - weight).abs().median().item() == pytest.approx(0.1 * size, rel=0.05)


@pytest.mark.parametrize("raw", [LLAMA, CONFIGS["llama-tied"]], ids=["", "tied"])
@pytest.mark.parametrize("changes", [{}, {"full": True, "rate": 1e-3}])
def test_loss_falls(changes, raw):
    model = moe_model(raw=raw)
    log = train.finetune(model, text_ids(), train.settings(**SMALL | changes | {"samples": 240}))
    assert len(log["loss"]) == 60 and sum(log["loss"][-5:]) < 0.8 * sum(log["loss"][:5])
    ids = text_ids()
    assert math.log(lm.perplexity(model, ids, 16)) < sum(log["loss"][:5]) / 5


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"full": True}, {"checkpointing": True, "accumulate": 2, "router": True}])
def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(changes, every, tmp_path, monkeypatch):
    s, ids, state = train.settings(**SMALL | changes), text_ids(), tmp_path / "state"
    whole = moe_model()
    expected = train.finetune(whole, ids, s)
    cut, calls, balance = moe_model(), [], train.balance

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # after two steps and a half
        return balance(*args)

    monkeypatch.setattr(train, "balance", stop)
    with pytest.raises(KeyboardInterrupt):
        train.finetune(cut, ids, s, state, save_every=every)
    assert weights(cut).keys() == weights(moe_model()).keys()  # an ordinary model again
    monkeypatch.setattr(train, "balance", balance)
    torch.manual_seed(99)  # whatever happened in between
    again = moe_model()
    assert train.finetune(again, ids, s, state, save_every=every, resume=True) == expected
    assert same(weights(again), weights(whole))
    others = (moe_model(), ids, train.settings(**SMALL | changes | {"seed": 1})), (moe_model(), ids + 1, s), (moe_model(seed=1), ids, s)
    for other in others:
        with pytest.raises(InputError, match="other settings, another model or another text"):
            train.finetune(*other, state, resume=True)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be resumed"):
        train.finetune(moe_model(), ids, s, state, resume=True)


def test_checkpointing_and_accumulation_change_nothing_but_memory():
    plain = SMALL | {"dropout": 0.0}
    results = []
    for changes in ({}, {"checkpointing": True}, {"batch": 2, "accumulate": 2}):
        model = moe_model(torch.float64)
        log = train.finetune(model, text_ids(), train.settings(**plain | changes))
        results.append((weights(model), log["imbalance"]))
    for other, imbalance in results[1:]:
        for name, t in results[0][0].items():
            assert torch.allclose(t, other[name], atol=1e-7 if name.endswith("router_bias") else 1e-4), name
        assert imbalance == pytest.approx(results[0][1])


def test_the_loss_in_blocks_has_the_gradients_of_the_whole():
    ids = text_ids()[:400].view(4, 100)  # 396 predictions: three blocks and a rest
    model, plain = moe_model(torch.float64).requires_grad_(True), moe_model(torch.float64).requires_grad_(True)
    loss = F.cross_entropy(plain(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss / 3).backward()
    assert train.backward(model, ids, 1 / 3) == pytest.approx(loss.item() / 3, rel=1e-12)
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    s, ids, state = train.settings(**SMALL), text_ids(), tmp_path / "state"
    whole = moe_model()
    expected = train.finetune(whole, ids, s)
    calls, backward = [], train.backward
    monkeypatch.setattr(train, "backward", lambda *a: calls.append(1) or backward(*a) * (torch.inf if len(calls) > 3 else 1))
    with pytest.raises(InputError, match="step 3: the loss is inf.*--resume with a smaller --rate goes on from"):
        train.finetune(moe_model(), ids, s, state, save_every=1)
    assert torch.load(state, weights_only=True)["step"] == 2
    monkeypatch.setattr(train, "backward", backward)
    smaller = moe_model()
    log = train.finetune(smaller, ids, train.settings(**SMALL | {"rate": 1e-3}), shutil.copy(state, tmp_path / "copy"), resume=True)
    assert log["loss"][:2] == expected["loss"][:2] and len(log["loss"]) == 6 and not same(weights(smaller), weights(whole))
    again = moe_model()
    assert train.finetune(again, ids, s, state, resume=True) == expected and same(weights(again), weights(whole))
    with pytest.raises(InputError, match="rate may be too high"):
        train.finetune(moe_model(), ids, train.settings(**SMALL | {"rate": 1e30, "warmup": 0.0, "clip": 1e30}))


def test_float32_masters_add_up_what_bfloat16_would_lose():
    model = moe_model(torch.bfloat16)
    before = weights(model)
    s = train.settings(**SMALL | {"full": True, "rate": 2e-4, "samples": 160, "schedule": "constant"})
    train.finetune(model, text_ids(), s)
    after = weights(model)
    assert all(t.dtype == torch.bfloat16 for t in after.values())
    name = "layers.0.self_attn.q_proj.weight"  # steps of 2e-4 on weights of about 0.3, whose bfloat16 neighbours are 1e-3 away
    assert (after[name] - before[name]).abs().float().median() > 1e-3


def test_balance_by_hand():
    moe = moe_model().layers[1].mlp
    load = train.Load(moe)
    x = torch.randn(50, 32)
    load(moe, (x,))
    assert load.counts.tolist() == [(moe.route(x)[0] == e).sum().item() for e in range(7)]
    assert load.deviation().item() == pytest.approx((x @ moe.router_weight.T).softmax(-1).std(correction=0).item(), rel=1e-5)
    load.counts, load.tokens, load.squares = torch.tensor([4.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 7, torch.tensor(0.25 * 7)
    assert train.balance({moe: load}, 0.5) == pytest.approx(2.0)  # 4 over a mean of 2
    assert moe.router_bias.tolist() == [-0.25, 0.25, 0.25, 0, 0, 0, 0] and not load.counts.any()


def test_balancing_balances():
    imbalance = {}
    for step in (0.0, 0.05):
        changes = {"batch": 24, "samples": 24 * 40, "rate": 0.0, "bias_step": step}
        log = train.finetune(moe_model(), text_ids(), train.settings(**SMALL | changes))
        imbalance[step] = sum(log["imbalance"][-10:]) / 10
    assert imbalance[0.0] > 1.5 and imbalance[0.05] < 1.3, imbalance


def test_rates_and_order():
    s = train.settings(warmup=0.1)
    factors = [train.rate_factor(step, 100, s) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and factors[10] == 1
    assert factors[55] == pytest.approx(0.55) and 0.1 < factors[99] < 0.11 and sorted(factors[10:], reverse=True) == factors[10:]
    assert train.rate_factor(70, 100, train.settings(schedule="constant")) == 1
    order = train.sample_order(10, train.settings(samples=25)).tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20] and len(set(order[20:])) == 5


def test_command_line(checkpoint, text, tmp_path, capsys):
    moe, out, result = tmp_path / "moe", tmp_path / "tuned", tmp_path / "result.json"
    common = ["--window", "128", "--calib-tokens", "1024", "--eval-tokens", "256", "--dense", "0"]
    argv = ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), "--experts", "S1A2E8", "--format", "native", "--out", str(moe), *common]
    assert ffn2moe.main(argv) == 0
    argv = ["--model", str(moe), "--text", str(text), "--eval", str(text), "--eval-tokens", "256", "--dtype", "float32", "--out", str(out)]
    argv += ["--json", str(result)]
    argv += as_flags(SMALL | {"samples": 200})
    assert train.main(argv) == 0
    found = json.loads(result.read_text())
    assert found["perplexity"]["after"] < 0.9 * found["perplexity"]["before"] and len(found["log"]["loss"]) == 50
    tuned, tokenizer = lm.load_model(out)
    assert lm.perplexity(tuned, torch.tensor(tokenizer.encode(text.read_text()).ids)[:256], 128) == pytest.approx(found["perplexity"]["after"], rel=1e-5)
    assert not (tmp_path / "tuned.state").exists() and tuned.layers[1].mlp.router_scale.any()
    capsys.readouterr()
    assert train.main([*argv, "--resume", "--force"]) == 2 and "to resume from" in capsys.readouterr().err
    (tmp_path / "fresh.state").write_text("of a run that was cut off")
    assert train.main([*argv, "--out", str(tmp_path / "fresh")]) == 2 and "--resume goes on" in capsys.readouterr().err
    assert train.main([*argv, "--out", str(tmp_path / "fresh"), "--resume"]) == 2 and "cannot be resumed" in capsys.readouterr().err
    for flags in (["--schedule", "linear"], ["--warmup", "100"], ["--dropout", "1"], ["--rate", "-1"], ["--clip", "0"]):
        assert train.main([*argv, "--force", *flags]) == 2
    assert train.main([*argv, "--force", "--json", str(tmp_path)]) == 2 and "of another kind" in capsys.readouterr().err
    for flags, message in ((["--samples", "2"], "too few"), (["--length", "9999"], "more than the"), (["--length", "100"], "less than one window")):
        short = ["--text", str(tmp_path / "short.txt")]
        (tmp_path / "short.txt").write_text("a few words")
        assert train.main([*argv, "--force", *flags, *(short if "100" in flags else [])]) == 2
        err = capsys.readouterr().err
        assert message in err and "perplexity" not in err  # refused before the long work
    assert train.main([*argv]) == 2 and "not empty" in capsys.readouterr().err


def test_the_default_job(checkpoint, text, tmp_path, monkeypatch, capsys):
    """Convert, and learn from the dense model; cut off, it goes on to the same weights."""
    load = lm.load_model
    monkeypatch.setattr(lm, "load_model", lambda source, *rest: load(source or checkpoint, *rest))
    argv = ["--text", str(text), "--eval", str(text), "--eval-tokens", "256", "--format", "native", "--save-every", "1"]
    argv += as_flags(SMALL | {"samples": 40, "rate": 1e-3})
    assert train.main([*argv, "--out", str(tmp_path / "whole"), "--json", str(tmp_path / "result.json")]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity")]
    found = json.loads((tmp_path / "result.json").read_text())["perplexity"]
    assert list(found) == ["dense", "before", "after"] and len(printed) == 3
    assert abs(found["after"] - found["dense"]) < 0.9 * abs(found["before"] - found["dense"])
    balance, calls, out = train.balance, [], tmp_path / "cut"
    monkeypatch.setattr(train, "balance", lambda *a: calls.append(1) or balance(*a) if len(calls) < 5 else 1 / 0)  # of 10 steps
    with pytest.raises(ZeroDivisionError):
        train.main([*argv, "--out", str(out)])
    assert (tmp_path / "cut.state").exists()
    monkeypatch.setattr(train, "balance", balance)
    assert train.main([*argv, "--out", str(out)]) == 2
    assert train.main([*argv, "--out", str(out), "--resume"]) == 0
    assert same(weights(load(out)[0]), weights(load(tmp_path / "whole")[0])) and not list(tmp_path.glob("*state"))


def test_a_standard_checkpoint_stays_one_where_it_can(tmp_path, tokenizer, text, capsys):
    model = moe_model()
    lm.save_model(lm.standard_form(model), tokenizer, tmp_path / "moe")
    argv = ["--model", str(tmp_path / "moe"), "--text", str(text), "--eval", str(text), "--eval-tokens", "256", "--dtype", "float32"]
    argv += as_flags(SMALL)
    plain = ["--scale-rate", "0", "--bias-step", "0"]
    for out, flags, kind in (("a", plain, "qwen2_moe"), ("b", [], "ffn2moe"), ("c", [*plain, "--format", "native"], "ffn2moe")):
        assert train.main([*argv, *flags, "--out", str(tmp_path / out), "--json", str(tmp_path / "result.json")]) == 0
        assert json.loads((tmp_path / out / "config.json").read_text())["model_type"] == kind
        tuned, ids = lm.load_model(tmp_path / out)[0], lm.read_ids(model, tokenizer, str(text), "test")[:256]
        after = json.loads((tmp_path / "result.json").read_text())["perplexity"]["after"]
        assert lm.perplexity(tuned, ids, 128) == pytest.approx(after, rel=1e-5)
    assert "trained (by --scale-rate, --bias-step)" in capsys.readouterr().err
    assert train.main([*argv, "--out", str(tmp_path / "d"), "--format", "standard"]) == 2
    refused = capsys.readouterr().err
    assert "leave out --scale-rate and --bias-step" in refused and "fine-tuning" not in refused  # before the work


def test_two_levels_are_trained():
    """Also where an expert's own router gets no tokens."""
    ids = torch.randint(300, (512,), generator=torch.Generator().manual_seed(0))
    model = ffn2moe.convert(moe_model(), ids, "S1A1E4", dense=[0], window=128)
    model.layers[1].mlp.router_bias[0] = -1.0  # expert 0 is never chosen
    log = train.finetune(model, text_ids(), train.settings(**SMALL | {"samples": 80}))
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert not model.layers[1].mlp.experts[0].router_bias.any() and model.layers[1].mlp.experts[1].router_bias.any()
    assert log["loss"][-1] < log["loss"][0]


def test_the_loss_is_what_it_says():
    """Cross-entropy and divergence from a teacher, against a float64 count, and their gradients."""
    model, teacher, ids = moe_model(torch.float64), random_model(LLAMA, 1, torch.float64), text_ids(60).view(3, 20)
    logp, theirs = (m(ids)[:, :-1].log_softmax(-1) for m in (model, teacher))
    nll = -logp.gather(-1, ids[:, 1:, None]).mean()
    kl = (theirs.exp() * (theirs - logp)).sum(-1).mean()
    for share, loss in ((0.0, nll), (0.3, 0.7 * nll + 0.3 * kl), (1.0, kl)):
        assert train.backward(model.requires_grad_(), ids, 0.5, teacher, share) == pytest.approx(loss.item() / 2, rel=1e-12)
        assert all(p.grad is None for p in teacher.parameters())
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        logp = model(ids)[:, :-1].log_softmax(-1)
        again = (1 - share) * -logp.gather(-1, ids[:, 1:, None]).mean() + share * (theirs.exp() * (theirs - logp)).sum(-1).mean()
        (again / 2).backward()
        for a, b in zip(found, [p.grad for p in model.parameters() if p.grad is not None]):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        model.zero_grad()
    assert train.backward(model, ids) == pytest.approx(nll.item(), rel=1e-12)


def test_a_teacher_pulls_the_model_back():
    """Without a word of text: towards the model that it was made of."""
    teacher, ids = random_model(LLAMA), text_ids(592).view(-1, 16)
    divergence = lambda m: F.kl_div(m(ids).log_softmax(-1), teacher(ids).log_softmax(-1), log_target=True, reduction="sum").item()
    model = moe_model()
    before = divergence(model)
    train.finetune(model, text_ids(), train.settings(**SMALL | {"samples": 400, "distill": 1.0}), teacher=teacher)
    assert divergence(model) < 0.7 * before
