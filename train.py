"""Fine-tune a model on a few thousand samples: a converted one, or a dense one to compare with.

    python train.py                                              convert SmolLM2-135M and let the dense model teach the result
    python train.py --model DIR --out OTHER                      fine-tune a checkpoint that ffn2moe.py --out wrote on text
    python train.py --model DIR --teacher DENSE --out OTHER      let the dense model that it was made of teach it

What is trained:

1. `LoRA` on all matrices of attention, experts and dense FFNs: W + (alpha / rank) B A, merged into W at the end.
2. With --scale-rate, the **gate scale** u of each expert, which weighs its output by 1 + p u (`model.MoE.route`).
3. With --bias-step, the **selection bias** b, without gradient: after each step it moves by a small constant against experts
   that got more than their share of the tokens (`balance`).

The paper has 2 and 3. Here balancing costs perplexity (README), and gate scales gained nothing in trials on held-back text;
without them, what is written stays a Qwen2-MoE.

The loss is that of the text (the paper's), or the divergence from a teacher, or both (`backward`). Training on text mostly
teaches the text, to a dense model as well. So an order other than the paper's does better: fine-tune the dense model, convert it,
and let it teach the converted one (three commands, which the README has).

The rest is frozen, but for the router (--router, with its own rate), or everything is trained (--full). Trained weights are
float32, and are cast to the model's dtype for products. The loop is `finetune`.
"""

import argparse
import copy
import hashlib
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ffn2moe
import model as lm
from kernels import widened
from model import InputError, MoE

# Settings, each a flag of the command line
SETTINGS = {
    "samples": (2048, "sequences in all; a text that is shorter is gone through again"),
    "length": (64, "tokens per sequence"),
    "batch": (8, "sequences at a time"),
    "distill": (1.0, "share of the loss that is the divergence from the teacher, if there is one; the rest is that of the text"),
    "accumulate": (1, "batches per step"),
    "rate": (1e-3, "learning rate of LoRA, or of all weights"),
    "scale_rate": (0.0, "learning rate of the gate scale u; the paper's is 1e-3"),
    "router_rate": (1e-2, "learning rate of a router that is trained (--router, --full), over the root mean square of its weights"),
    "bias_step": (0.0, "by which the selection bias b moves after a step, in standard deviations of p; 0, or e.g. 0.02"),
    "warmup": (0.05, "share of the steps in which the rates rise"),
    "schedule": ("cosine", "of the rates after that: cosine, to a tenth, or constant"),
    "clip": (1.0, "norm that gradients are cut down to"),
    "rank": (8, "of LoRA"),
    "alpha": (32.0, "of LoRA, whose product is scaled by alpha / rank"),
    "dropout": (0.0, "of LoRA; the paper's is 0.1"),
    "router": (False, "train the router too"),
    "full": (False, "train all weights, without LoRA"),
    "checkpointing": (False, "compute activations again in the backward pass rather than keep them"),
    "seed": (0, "of the order of the samples, of LoRA and of dropout"),
}
RATES = ("rate", "scale_rate", "router_rate")  # which a run that is resumed may change


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{name: default for name, (default, _) in SETTINGS.items()} | changes)


# ----------------------------------------------------------------------------------------------------------------------
# 1. What is trained


class LoRA(nn.Module):
    """W -> W + (alpha / rank) B A: W [..., n, d], A [..., rank, d], B [..., n, rank], zero at first.

    Gate and up lie in one W and have an A and a B each (`parts` = 2). W + ... is made anew for each batch, so that all else
    works as ever; that costs the time of training W and a second copy of it, but no optimizer state. Dropout falls on A, anew for
    each batch, rather than on the input of each token.
    """

    def __init__(self, weight: Tensor, parts: int, s: SimpleNamespace):
        super().__init__()
        *stack, n, d = weight.shape
        self.a = nn.Parameter(torch.randn(*stack, parts, s.rank, d, device=weight.device) / d**0.5)
        self.b = nn.Parameter(torch.zeros(*stack, parts, n // parts, s.rank, device=weight.device))
        self.scale, self.dropout = s.alpha / s.rank, s.dropout

    def forward(self, weight):
        a, b = (t.flatten(0, -3).to(weight.dtype) for t in (F.dropout(self.a, self.dropout, self.training), self.scale * self.b))
        return torch.baddbmm(weight.view(len(b), -1, weight.shape[-1]), b, a).view(weight.shape)  # [parts, n / parts, d]


class Master(nn.Module):
    """float32 weights -> the dtype that products are in."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, weight):
        return weight.to(self.dtype)


def prepare(model: lm.Decoder, s: SimpleNamespace) -> list[dict]:
    """Put LoRA, or float32 masters, before the weights that are trained -> the parameter groups of the optimizer."""
    torch.manual_seed(s.seed)
    model.requires_grad_(False)
    dtype = model.embed_tokens.weight.dtype
    masters, routers = [], []
    every = [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]
    for module, name in every:
        weight = getattr(module, name)
        if name in ("router_scale", "router_bias"):
            weight.data = weight.data.float()
        elif s.full or (s.router and name.startswith("router")):
            weight.data = weight.data.float()
            parametrize.register_parametrization(module, name, Master(dtype), unsafe=True)
            master = module.parametrizations[name].original.requires_grad_()
            if name.startswith("router"):  # whose scores may be of any size
                routers.append({"params": [master], "lr": s.router_rate * master.detach().square().mean().sqrt().item()})
            else:
                masters.append(master)
        elif name in ("gate_up_proj", "down_proj") or (isinstance(module, lm.Linear) and name == "weight"):
            parametrize.register_parametrization(module, name, LoRA(weight, 2 if name == "gate_up_proj" else 1, s))
            masters += module.parametrizations[name][0].parameters()
    scales = [moe.router_scale.requires_grad_() for moe in moes_of(model)] if s.scale_rate else []
    return [{"params": masters, "lr": s.rate}, {"params": scales, "lr": s.scale_rate}, *routers]


@torch.no_grad()
def merge(model: lm.Decoder):
    """Turn the model back into an ordinary one, with what was learned in its weights."""
    model.eval()  # no dropout in what becomes the weights
    dtype = model.embed_tokens.weight.dtype
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            weight = getattr(module, name).detach().clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    model.to(dtype).requires_grad_(False)


def moes_of(model: lm.Decoder) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Balance without an auxiliary loss


class Load:
    """What an MoE layer's router did since the last `balance`: tokens per routed expert [R], and how far apart its p are."""

    def __init__(self, moe: MoE):
        self.counts = torch.zeros(len(moe.spec.experts), device=moe.router_bias.device)
        self.tokens, self.squares = 0, 0.0

    @torch.no_grad()
    def __call__(self, moe, inputs):  # a forward pre-hook; with checkpointing it counts twice, which changes no ratio
        x, R = inputs[0].flatten(0, -2), len(self.counts)
        self.counts += moe.route(x)[0].flatten().bincount(minlength=R)
        p = widened(moe.scores(x)).softmax(dim=-1)
        self.squares += (p - 1 / R).square().mean(dim=-1).sum()
        self.tokens += len(x)

    def deviation(self) -> Tensor:
        """The standard deviation of p."""
        return (self.squares / self.tokens).sqrt()


@torch.no_grad()
def balance(loads: dict[MoE, Load], step: float) -> float:
    """b_e -= step for experts with more tokens than the mean, += step for those with fewer; counts start again.

    The step is in standard deviations of p, since those of a router may be far apart or close together (the paper's is 1e-3).
    Returns the largest load over the mean load, averaged over layers: 1 is perfect balance, 0 that there are no experts.
    """
    imbalance = []
    for moe, load in loads.items():
        counts = load.counts
        if not load.tokens:  # an expert's own router, and no token came
            continue
        moe.router_bias -= step * load.deviation() * (counts - counts.mean()).sign()
        imbalance.append((counts.max() / counts.mean()).item())
        counts.zero_()
        load.tokens, load.squares = 0, 0.0
    return sum(imbalance) / max(1, len(imbalance))


# ----------------------------------------------------------------------------------------------------------------------
# 3. The loop


def rate_factor(step: int, steps: int, s: SimpleNamespace) -> float:
    """Of the learning rates: up to 1 in a line, then down to a tenth along half a cosine, or constant."""
    warmup = max(1, round(s.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if s.schedule == "constant":
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def sample_order(num_windows: int, s: SimpleNamespace) -> Tensor:
    """Which window each sample is, [samples]: all in random order, then all in another one."""
    random = torch.Generator().manual_seed(s.seed)
    return torch.cat([torch.randperm(num_windows, generator=random) for _ in range(-(-s.samples // num_windows))])[: s.samples]


def backward(model: lm.Decoder, ids: Tensor, scale: float = 1.0, teacher: lm.Decoder | None = None, share: float = 0.0) -> float:
    """Add the gradients of scale * loss to those of the weights, and return scale * loss. ids [B, T]; the loss, averaged over all
    next tokens, is

        (1 - share) * -log p(token) + share * KL(p_teacher || p),    without a teacher -log p(token).

    Logits are made in blocks of tokens, with a backward pass each, since they are many: [B * T, vocab_size].
    """
    share = share if teacher else 0.0
    x, targets = model.hidden_states(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    with torch.no_grad():
        theirs = teacher.hidden_states(ids)[:, :-1].flatten(0, 1) if teacher else x
    blocks, total = [block.detach().requires_grad_() for block in x.split(128)], 0.0
    for block, target, their in zip(blocks, targets.split(128), theirs.split(128)):
        logp = widened(model.logits(block)).log_softmax(dim=-1)  # [t, vocab_size]
        loss = (1 - share) * F.nll_loss(logp, target, reduction="sum")
        if teacher:
            with torch.no_grad():
                wanted = widened(teacher.logits(their)).log_softmax(dim=-1)
            loss = loss + share * F.kl_div(logp, wanted, reduction="sum", log_target=True)
        loss = loss * scale / len(targets)
        loss.backward()
        total += loss.item()
    x.backward(torch.cat([block.grad for block in blocks]))
    return total


def plan(model: lm.Decoder, ids: Tensor, s: SimpleNamespace) -> tuple[Tensor, int, int]:
    """The samples to draw from [N, length], how many a step takes, and how many steps; InputError if there is nothing to do."""
    per_step = s.batch * s.accumulate
    if s.samples < per_step:
        raise InputError(f"{s.samples} samples are too few for steps of {per_step}")
    if s.length > model.config.max_position_embeddings:
        raise InputError(f"--length {s.length} is more than the {model.config.max_position_embeddings} tokens this model can run")
    return lm.cut_windows(ids, s.length), per_step, s.samples // per_step


def fingerprint(model: lm.Decoder, ids: Tensor) -> str:
    """Of a model and a text, to tell whether a saved state is of the same run."""
    sha = hashlib.sha256(repr(model.embed_tokens.weight.dtype).encode())
    for t in (ids, *model.state_dict().values()):
        sha.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def finetune(
    model: lm.Decoder,
    ids: Tensor,
    s: SimpleNamespace,
    state_file: Path | None = None,
    save_every: int = 50,
    resume: bool = False,
    teacher: lm.Decoder | None = None,
) -> dict:
    """Fine-tune the model on token ids [N], in place -> {"loss": of each step, "imbalance": max / mean load of each step}.

    With a state_file, the state is saved every `save_every` steps, and a run can go on from it: to the same weights, on the
    same machine (a GPU may add up in another order). What is saved is the state before a step, once its loss is known to be
    finite. Raises InputError if a loss is not; the run can then go on from that state with other RATES. However it ends, the
    model is an ordinary one again. teacher: the dense model, for the share s.distill of the loss.
    """
    windows, per_step, steps = plan(model, ids, s)
    teacher = teacher if s.distill else None
    order = sample_order(len(windows), s)
    run = {"settings": vars(s), "of": [fingerprint(m, ids) for m in (model, teacher) if m]}
    start, log, hooks = 0, {"loss": [], "imbalance": []}, []
    try:
        optimizer = torch.optim.AdamW(prepare(model, s), betas=(0.9, 0.95), weight_decay=0.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = trained + [moe.router_bias for moe in moes_of(model)]
        loads = {moe: Load(moe) for moe in moes_of(model)}
        hooks = [moe.register_forward_pre_hook(load) for moe, load in loads.items()]
        if s.checkpointing:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.train()
        if resume:
            start, log = load_state(state_file, run, optimizer, tensors)
        bar = tqdm(range(start, steps), desc="fine-tuning", unit="step", initial=start, total=steps)
        for step in bar:
            random, total = random_state(), 0.0
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * rate_factor(step, steps, s)
            for batch in order[step * per_step :][:per_step].split(s.batch):
                total += backward(model, windows[batch], 1 / s.accumulate, teacher, s.distill)
            norm = nn.utils.clip_grad_norm_(trained, s.clip).item()
            if not math.isfinite(total) or not math.isfinite(norm):
                last = f"; --resume with a smaller --rate goes on from {state_file}" if state_file and state_file.exists() else ""
                raise InputError(f"step {step}: the loss is {total}, its gradient {norm}; the learning rate may be too high{last}")
            if state_file and step > start and step % save_every == 0:
                save_state(state_file, run, step, log, optimizer, tensors, random)
            optimizer.step()
            optimizer.zero_grad()
            log["loss"].append(total)
            log["imbalance"].append(balance(loads, s.bias_step))
            speed = s.length * per_step * (bar.format_dict["rate"] or 0)
            load = f", load max/mean {log['imbalance'][-1]:.2f}" if loads else ""
            bar.set_postfix_str(f"loss {total:.3f}, {speed:.0f} tokens/s{load}")
        if state_file:
            save_state(state_file, run, steps, log, optimizer, tensors, random_state())
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.layers:
            layer.__dict__.pop("forward", None)
        merge(model)
    return log


def random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def save_state(file: Path, run: dict, step: int, log: dict, optimizer: torch.optim.Optimizer, tensors: list[Tensor], random: list):
    """All of the file or nothing."""
    state = {**run, "step": step, "log": log, "optimizer": optimizer.state_dict(), "random": random}
    state["tensors"] = [t.detach() for t in tensors]
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, file)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # the latter from PyTorch, if the disk is full
            raise InputError(f"could not write {file}: {lm.first_line(error)}") from None
        raise


def what_stays(run: dict) -> tuple:
    """Of a run, when it is resumed: all but the learning rates."""
    return {name: value for name, value in run["settings"].items() if name not in RATES}, run["of"]


def load_state(file: Path, run: dict, optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> tuple[int, dict]:
    """-> the step to go on with, and the log so far."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        same = what_stays(state) == what_stays(run)
        if same:
            for tensor, saved in zip(tensors, state["tensors"], strict=True):
                tensor.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"][0])
            if state["random"][1:]:
                torch.cuda.set_rng_state_all(state["random"][1:])
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{file} cannot be resumed from: {lm.first_line(error)}") from None
    if not same:
        raise InputError(f"{file} is of a run with other settings, another model or another text: {state['settings']}")
    return state["step"], state["log"]


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def add_settings(add: Callable, names: Iterable[str]):
    """A flag for each of these settings; bench.py has some of them."""
    for name in names:
        default, what = SETTINGS[name]
        flag = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        add("--" + name.replace("_", "-"), **flag, help=what if default is False else f"{what} ({default})")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a checkpoint that ffn2moe.py wrote, and compare perplexity before and after. Without "
        "arguments: convert SmolLM2-135M-Instruct and let the dense model teach the result, on text that every Python carries.",
    )
    add = parser.add_argument
    add("--model", metavar="SOURCE", help="a converted checkpoint, or a dense one, which is fine-tuned as it is; if not given, SmolLM2 is converted")
    add("--teacher", metavar="SOURCE", help="the dense model that --model was made of; without it, all of the loss is that of the text")
    add("--text", default="manual", help="training text: a file, 'wikitext2' or 'manual', as for ffn2moe.py (%(default)s)")
    add("--eval", default="manual", metavar="TEXT", help="evaluation text (%(default)s)")
    add("--eval-tokens", type=int, default=6 * 2048, metavar="N", help="first N of them; 0: all (%(default)s)")
    add("--out", metavar="DIR", default="tuned", help="where to write the checkpoint (%(default)s)")
    add("--format", choices=["standard", "native"], help="of --out: Qwen2-MoE, if possible, or our own")
    add("--force", action="store_true", help="replace the checkpoint in an --out that is not empty")
    add("--save-every", type=int, default=50, metavar="N", help="steps between saves of the state, to OUT.state (%(default)s)")
    add("--resume", action="store_true", help="go on from the saved state")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of frozen weights and products; bfloat16 is faster where the hardware has it (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    add("--json", metavar="FILE", help="write results and settings")
    add_settings(add, SETTINGS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace):
    s = settings(**{name: getattr(args, name) for name in SETTINGS})
    if min(s.samples, s.length - 1, s.batch, s.accumulate, s.rank, args.save_every) < 1:
        raise InputError("--samples, --batch, --accumulate, --rank and --save-every must be at least 1, --length at least 2")
    if s.schedule not in ("cosine", "constant") or not (0 <= s.distill <= 1 and 0 <= s.warmup <= 1 and 0 <= s.dropout < 1):
        raise InputError("--schedule must be cosine or constant, --distill and --warmup from 0 to 1, --dropout below 1")
    if min(s.rate, s.scale_rate, s.router_rate, s.bias_step, args.eval_tokens) < 0 or s.clip <= 0:
        raise InputError("rates, --bias-step and --eval-tokens must be at least 0, --clip more")
    if args.json:
        lm.check_writable(args.json)
    if args.text == args.eval and Path(args.text).exists():
        print("warning: training and evaluating on the same file", file=sys.stderr)
    out = Path(args.out).absolute()
    state = out.with_name(f"{out.name}.state")
    lm.check_output(out, args.force)
    if args.resume and not state.exists():
        raise InputError(f"there is no {state} to resume from")
    if state.exists() and not args.resume and not args.force:
        raise InputError(f"{state} is of a run that was cut off: --resume goes on with it, --force starts over")
    model, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    if args.format == "standard" and (s.scale_rate or s.bias_step) and (args.model is None or moes_of(model)):
        raise InputError("--format standard has no place for gate scales and selection biases: leave out --scale-rate and --bias-step")
    if args.format == "standard" and args.model:
        lm.standard_form(model)  # or refuse
    window = min(2048, model.config.max_position_embeddings)
    ids, eval_ids = (lm.read_ids(model, tokenizer, text, split) for text, split in ((args.text, "train"), (args.eval, "test")))
    eval_ids = lm.cut_windows(eval_ids[: args.eval_tokens or None], window).flatten()
    plan(model, ids, s)  # refuses before the long work
    measure = lambda name: lm.perplexity(model, eval_ids, window, partial(tqdm, desc=f"{name}: perplexity", unit="window"))
    if not args.resume:
        state.unlink(missing_ok=True)
    result, teacher = {}, None
    if args.teacher:
        teacher, _ = lm.load_model(args.teacher, args.dtype, args.device)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise InputError("--teacher has another vocabulary than the model")
    if args.model is None:
        result["dense"] = measure("dense")
        teacher = teacher or (copy.deepcopy(model) if s.distill else None)
        calib = ffn2moe.draw(lm.cut_windows(ids, window), ffn2moe.METHODS["joint"].calib_tokens // window, s.seed)
        ffn2moe.convert(model, calib, progress=partial(tqdm, desc="converting", unit="layer"))
    result["before"] = measure("before")
    log = finetune(model, ids, s, state, args.save_every, args.resume, teacher)
    model = lm.in_format(model, args.format)
    lm.save_model(model, tokenizer, out, args.force)
    state.unlink(missing_ok=True)
    result["after"] = measure("after")
    print()
    for name, value in result.items():
        print(f"perplexity {name:<20}{value:>10.2f}")
    print(f"\nwrote {args.out}")
    if args.json:
        lm.write_json(Path(args.json), vars(args) | {"perplexity": result, "log": log})


def main(argv: list[str] | None = None) -> int:
    return lm.run_command("train", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
