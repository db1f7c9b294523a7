"""Fine-tuning: what is trained, that a run can be cut off anywhere, and what is left at the end."""

import itertools
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from conftest import CONFIGS, LLAMA, random_model
from torch import nn

# isort: off
import ffn2moe
import train
from model import Decoder, InputError, MoE, for_export, load_model, perplexity, read_ids, save_model

SLOW = bool(os.environ.get("FFN2MOE_SLOW"))
SMALL = {"samples": 24, "length": 16, "batch": 4, "rate": 2e-3, "rank": 4, "dropout": 0.1}
SMALL |= {"scale_rate": 1e-3, "bias_step": 0.02}


def small(**changes):
    return train.settings(**(SMALL | changes))


def as_flags(settings: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def moe_model(dtype=torch.float32, seed=0, raw=LLAMA, method="joint") -> Decoder:
    ids = torch.randint(300, (512,), generator=torch.Generator().manual_seed(seed))
    model = random_model(raw, seed, dtype)
    return ffn2moe.convert(model, ids, "S1A2E8", method, dense=[0], window=128)


def moes_of(model) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def text_ids(n=600):
    """40 of 300 tokens, so that there is something to learn."""
    return torch.randint(40, (n,), generator=torch.Generator().manual_seed(5))


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Cut(Exception):
    """Whatever ends a run."""


def cut_at(monkeypatch, step):
    """Let runs end in the middle of a step."""
    calls, balance = itertools.count(), train.balance

    def stop(*args):
        if next(calls) == step:
            raise Cut
        return balance(*args)

    monkeypatch.setattr(train, "balance", stop)


# --- What is trained


def test_lora_starts_at_zero_and_merges_into_w_plus_scale_b_a():
    model, ids = moe_model(), torch.arange(40)[None]
    before, logits = weights(model), model(ids)
    train.prepare(model, small(dropout=0.5))
    assert torch.allclose(model.eval()(ids), logits, atol=1e-5)
    expected = dict(before)
    for name, module in model.named_modules():
        for weight in getattr(module, "parametrizations", ()):
            lora = module.parametrizations[weight][0].requires_grad_(False)
            nn.init.normal_(lora.b, std=0.1)
            expected[f"{name}.{weight}"] = before[f"{name}.{weight}"] + 8 * lora.b.matmul(lora.a)
    # attention of three layers; a dense FFN; shared and routed experts of two layers
    assert sum(not torch.equal(expected[name], before[name]) for name in before) == 3 * 4 + 2 + 8
    logits = model(ids)
    train.merge(model.train())  # no dropout in what is merged
    after = weights(model)
    assert after.keys() == before.keys() and not any(p.requires_grad for p in model.parameters())
    assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in after)
    assert torch.allclose(model(ids), logits, atol=1e-4)


@pytest.mark.parametrize("method", ["joint", "paper"])
def test_gradients_are_exact(method):
    """Those of an MoE by input, router, gate scales, experts and LoRA, by finite differences."""
    moe = moe_model(torch.float64, method=method).layers[1].mlp
    moe.router_scale.data.normal_()
    routers = [n for n, _ in moe.named_parameters() if n.startswith("router_") and "bias" not in n]
    tensors = {name: getattr(moe, name) for name in ["down_proj", "gate_up_proj", *routers]}
    loras = {name: train.LoRA(tensors[name], 2, 0.0).double() for name in tensors if "proj" in name}
    for name, lora in loras.items():
        tensors[f"{name}.a"], tensors[f"{name}.b"] = lora.a, torch.randn_like(lora.b) / 10

    def forward(x, *values):
        given = dict(zip(tensors, values, strict=True))
        moe_weights = {name: given[name] for name in given if "." not in name}
        for name, lora in loras.items():
            a_and_b = {"a": given[f"{name}.a"], "b": given[f"{name}.b"]}
            moe_weights[name] = torch.func.functional_call(lora, a_and_b, (given[name],))
        return torch.func.functional_call(moe, moe_weights, (x,))

    values = [torch.randn(5, 32, dtype=torch.float64), *tensors.values()]
    values = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(forward, values, fast_mode=True)


@pytest.mark.parametrize(
    "changes, moved",
    [
        ({}, ("_proj", "router_scale", "router_bias")),
        ({"router": True}, ("_proj", "router")),
        ({"bias_step": 0.0}, ("_proj", "router_scale")),
        ({"scale_rate": 0.0, "bias_step": 0.0}, ("_proj",)),
    ],
)
def test_what_moves(changes, moved):
    for model in (moe_model(), moe_model(method="paper"), random_model(LLAMA)):
        before = weights(model)
        log = train.finetune(model, text_ids(), small(**changes))
        for name, t in weights(model).items():
            assert torch.equal(t, before[name]) != any(part in name for part in moved), name
        assert len(log["loss"]) == 6 and (min(log["imbalance"]) >= 1) == bool(moes_of(model))


def test_a_router_moves_in_proportion_to_its_size():
    relative = []
    for size in (1e-3, 10.0):
        model = moe_model()
        for moe in moes_of(model):
            moe.router_weight *= size / moe.router_weight.norm(dim=1).mean()
        before = moes_of(model)[0].router_weight.clone()
        train.finetune(model, text_ids(), small(router=True, samples=8))
        relative.append(((moes_of(model)[0].router_weight - before).norm() / before.norm()).item())
    assert 0.001 < relative[0] < 0.5 and relative[1] == pytest.approx(relative[0], rel=0.5)


@pytest.mark.parametrize("raw", [LLAMA, CONFIGS["llama-tied"]], ids=["untied", "tied"])
def test_loss_falls(raw):
    log = train.finetune(moe_model(raw=raw), text_ids(), small(samples=240))
    assert len(log["loss"]) == 60 and sum(log["loss"][-5:]) < 0.8 * sum(log["loss"][:5])


def test_small_steps_of_a_bfloat16_model_are_not_lost():
    model = moe_model(torch.bfloat16)
    for moe in moes_of(model):
        moe.router_scale.fill_(1.0)  # bfloat16 has no other number within 3e-3 of it
    train.finetune(model, text_ids(), small(samples=80))  # 20 steps of up to 1e-3
    assert all(t.dtype == torch.bfloat16 for t in model.state_dict().values())
    assert all((moe.router_scale != 1).float().mean() > 0.5 for moe in moes_of(model))


def test_two_levels_are_trained():
    """Also where no token comes to the router inside an expert."""
    ids = torch.randint(300, (512,), generator=torch.Generator().manual_seed(0))
    model = ffn2moe.convert(moe_model(), ids, "S1A1E4", dense=[0], window=128)
    outer = model.layers[1].mlp
    outer.router_bias[0] = -1.0  # expert 0 is never selected
    log = train.finetune(model, text_ids(), small(samples=80))
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert not outer.experts[0].router_bias.any() and outer.experts[1].router_bias.any()
    assert log["loss"][-1] < log["loss"][0]


# --- Balance, loss, learning rates, samples


def test_balance_by_hand():
    moe = moe_model().layers[1].mlp
    x = torch.randn(50, 32)
    tokens = torch.zeros(7)
    for e in moe.route(x)[0].flatten().tolist():
        tokens[e] += 1
    p = (x @ moe.router_weight.T).softmax(-1)
    expected = -0.5 * p.std(correction=0) * (tokens - 100 / 7).sign()
    train.keep_input(moe, (x.view(5, 10, 32),))
    assert train.balance([moe], 0.5) == pytest.approx(tokens.max().item() / (100 / 7))
    assert torch.allclose(moe.router_bias, expected) and moe.router_bias.any()
    assert train.balance([moe], 0.5) == 0.0  # the input is used once
    assert torch.allclose(moe.router_bias, expected)


def test_balancing_balances():
    imbalance = {}
    for step in (0.0, 0.05):
        settings = small(batch=24, samples=24 * 40, rate=0.0, bias_step=step)
        log = train.finetune(moe_model(), text_ids(), settings)
        imbalance[step] = sum(log["imbalance"][-10:]) / 10
    assert imbalance[0.0] > 1.5 and imbalance[0.05] < 1.3, imbalance


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_what_it_says(share):
    """Cross-entropy and divergence from a teacher, in float64."""
    model, teacher = moe_model(torch.float64), random_model(LLAMA, 1, torch.float64)
    ids = text_ids(60).view(3, 20)
    logp, teacher_logp = (m(ids)[:, :-1].log_softmax(-1) for m in (model, teacher))
    text = -logp.gather(-1, ids[:, 1:, None]).mean()
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1).mean()
    loss = train.loss_of(model.requires_grad_(), ids, teacher, share)
    assert loss.item() == pytest.approx(((1 - share) * text + share * kl).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert train.loss_of(model, ids, None, share).item() == pytest.approx(text.item(), rel=1e-5)


def test_learning_rates_rise_and_fall():
    factors = [train.rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == factors[4] > 0.99
    assert factors[50] == pytest.approx(0.55) and 0.1 < factors[99] < 0.11
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_batches_use_all_of_the_text_before_any_comes_again():
    model, ids = random_model(LLAMA), torch.arange(100)
    batches = train.make_batches(model, ids, small(samples=25, length=10, batch=5))
    assert batches.shape == (5, 5, 10)
    order = batches.view(25, 10)[:, 0].tolist()  # how each window begins
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(set(order))
    assert order[:10] != order[10:20] and len(set(order[20:])) == 5


# --- Runs that are cut off


@pytest.mark.parametrize("changes, every", [({}, 1), ({"router": True}, 2)])
def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(changes, every, tmp_path, monkeypatch):
    settings, ids, state = small(**changes), text_ids(), tmp_path / "new" / "state"
    whole = moe_model()
    expected = train.finetune(whole, ids, settings)
    cut = moe_model()
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 3)
        train.finetune(cut, ids, settings, state, every)
    assert weights(cut).keys() == weights(whole).keys()  # an ordinary model again
    for _ in range(2):  # the second time from the state at the end
        torch.manual_seed(99)  # whatever happened in between
        again = moe_model()
        assert train.finetune(again, ids, settings, state, every, resume=True) == expected
        assert same(weights(again), weights(whole))
    other_runs = [
        (moe_model(), ids, small(**(changes | {"seed": 1}))),
        (moe_model(), ids + 1, settings),
        (moe_model(seed=1), ids, settings),
    ]
    for other in other_runs:
        with pytest.raises(InputError, match="other settings, another model or another text"):
            train.finetune(*other, state, resume=True)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be resumed from"):
        train.finetune(moe_model(), ids, settings, state, resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_process_killed_at_any_access_to_files_goes_on(tmp_path):
    """kill -9 at the n-th time that files are touched, then --resume; for all n if SLOW is set."""
    ids, settings, state = text_ids(), small(dropout=0.5), tmp_path / "state"
    whole = moe_model()
    expected = train.finetune(whole, ids, settings)
    cut = moe_model()  # the same in each fork
    for kill_at in range(1, 100, 1 if SLOW else 5):
        state.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            touched = itertools.count()

            def kill(event, _, kill_at=kill_at, touched=touched):
                if event in ("open", "os.rename", "os.remove") and next(touched) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            train.finetune(cut, ids, settings, state, save_every=1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        again = moe_model()
        assert train.finetune(again, ids, settings, state, 1, resume=state.exists()) == expected
        assert same(weights(again), weights(whole))
        assert list(tmp_path.iterdir()) == [state]
        if code == 0:
            break
    assert code == 0 and kill_at > 10


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    weight, file = nn.Parameter(torch.zeros(1000)), tmp_path / "state"
    optimizer = torch.optim.Adam([weight])
    train.save_state(file, {}, 1, {}, [weight], optimizer)
    monkeypatch.setattr(train, "open", lambda _, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(InputError, match="could not write"):
        train.save_state(file, {}, 2, {}, [weight], optimizer)
    assert list(tmp_path.iterdir()) == [file]
    assert train.load_state(file, {}, [weight], optimizer)[0] == 1


def test_a_loss_that_is_not_finite_leaves_a_state_to_go_on_from(tmp_path, monkeypatch):
    settings, ids, state = small(), text_ids(), tmp_path / "state"
    expected = train.finetune(moe_model(), ids, settings)
    calls, loss_of = itertools.count(), train.loss_of

    def broken(*args):
        return loss_of(*args) * (torch.inf if next(calls) == 3 else 1)

    monkeypatch.setattr(train, "loss_of", broken)
    with pytest.raises(InputError, match="step 3: loss inf"):
        train.finetune(moe_model(), ids, settings, state, save_every=1)
    for rate in (SMALL["rate"] / 10, SMALL["rate"]):  # from step 2, before which a loss was finite
        copy = shutil.copy(state, tmp_path / "copy")
        log = train.finetune(moe_model(), ids, small(rate=rate), copy, resume=True)
        assert log["loss"][:3] == expected["loss"][:3] and len(log["loss"]) == 6
        assert (log == expected) == (rate == SMALL["rate"])


# --- Command line


@pytest.fixture
def argv(tokenizer, text, tmp_path):
    save_model(for_export(moe_model()), tokenizer, tmp_path / "moe")
    argv = ["--text", str(text), "--eval", str(text), "--eval-tokens=256", *as_flags(SMALL)]
    return [*argv, f"--model={tmp_path / 'moe'}", f"--out={tmp_path / 'tuned'}"]


@pytest.mark.parametrize("extras, kind", [(0.0, "qwen2_moe"), (0.02, "ffn2moe")])
def test_command_line(extras, kind, argv, text, tmp_path):
    """A Qwen2-MoE stays one, unless there are gate scales and selection biases."""
    result, changes = tmp_path / "result", {"scale_rate": extras, "bias_step": extras}
    flags = as_flags(changes | {"samples": 200, "json": result})
    assert train.main([*argv, *flags]) == 0
    found = json.loads(result.read_text())
    assert found["perplexity"]["after"] < 0.9 * found["perplexity"]["before"]
    assert len(found["log"]["loss"]) == 50 and not (tmp_path / "tuned.state").exists()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["model_type"] == kind
    tuned, tokenizer = load_model(tmp_path / "tuned")
    ids = read_ids(tuned, tokenizer, str(text), "test")[:256]
    assert perplexity(tuned, ids, 128) == pytest.approx(found["perplexity"]["after"], rel=1e-5)


def test_what_cannot_work_is_refused_before_the_long_work(argv, tmp_path, capsys):
    def refused(message, *flags):
        assert train.main([*argv, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and "fine-tuning" not in error, error

    refused("to resume from", "--resume")
    refused("--dropout below 1", "--dropout=1")
    refused("--seed below", "--seed=99999999999999999999")
    refused("rates", "--rate=-1")
    refused("at least 1", "--samples=0")
    refused("of another kind", f"--json={tmp_path}")
    refused("9999 tokens are more than", "--length=9999")
    (tmp_path / "short.txt").write_text("a few words")
    refused("window", f"--text={tmp_path / 'short.txt'}")
    refused("not empty", f"--out={tmp_path / 'moe'}")
    (tmp_path / "tuned.state").write_text("not a state")
    refused("--resume continues")
    assert train.main([*argv, "--resume"]) == 2
    assert "cannot be resumed from" in capsys.readouterr().err


def test_the_default_job(checkpoint, text, tmp_path, monkeypatch, capsys):
    """Convert, and learn from the dense model. Cut off, it goes on to the same weights."""

    def load(source, *rest):
        return load_model(source or checkpoint, *rest)

    monkeypatch.setattr(train, "load_model", load)
    argv = ["--text", str(text), "--eval", str(text), "--eval-tokens=256", "--save-every=1"]
    argv += as_flags(SMALL | {"samples": 40, "rate": 2e-4})
    whole, cut, result = tmp_path / "whole", tmp_path / "cut", tmp_path / "result"
    assert train.main([*argv, f"--out={whole}", f"--json={result}"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = json.loads(result.read_text())["perplexity"]
    assert [line[1] for line in printed[:3]] == list(found) == ["dense", "before", "after"]
    assert abs(found["after"] - found["dense"]) < 0.9 * abs(found["before"] - found["dense"])
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 5)
        train.main([*argv, f"--out={cut}"])
    assert (tmp_path / "cut.state").exists() and not cut.exists()
    assert train.main([*argv, f"--out={cut}", "--resume"]) == 0
    assert same(weights(load_model(cut)[0]), weights(load_model(whole)[0]))
    assert not list(tmp_path.glob("*state*"))
