"""Fine-tune a model on a few thousand samples: a converted model, or a dense one to compare with.

    python train.py                                  convert SmolLM2; the dense model teaches it
    python train.py --model DIR [--teacher DENSE]    fine-tune the checkpoint in DIR

Fine-tuning mostly adapts to the text, and helps a dense model too. So it is best to fine-tune the
dense model, convert it, and let it teach the result. As in the README's table, at 50 %:

    python train.py --model DENSE --text TEXT --samples 1024 --out my-dense
    python ffn2moe.py --model my-dense --calib TEXT --experts S7A7E32 --active 0.5 --out my-moe
    python train.py --model my-moe --teacher my-dense --text TEXT --samples 1024 --out my-tuned

The table has --dtype bfloat16 in all three. DENSE may be a GGUF file, such as that of the default
model in ~/.cache/ffn2moe.

By default the paper's gate scales and balance are off: they did not help on held-back text, and no
Qwen2-MoE checkpoint holds them.
"""

import argparse
import copy
import hashlib
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

# isort: off
import ffn2moe
from model import TRAINED, Decoder, InputError, Linear, MoE, Split, check_output, check_writable
from model import cut_windows, finite_or_none, load_model, perplexity, read_ids, refusing
from model import replace_file, require, run_command, save_model, split_spec, warn_if_same
from model import write_json

SETTINGS = {  # each is a flag of the command line: name -> (default, help)
    "samples": (2048, "training sequences, in whole batches; a short text is used several times"),
    "length": (64, "tokens per sequence"),
    "batch": (8, "sequences per step"),
    "rate": (1e-3, "learning rate of LoRA"),
    "distill": (1.0, "weight of the divergence from the teacher; the rest is the loss on text"),
    "scale_rate": (0.0, "learning rate of the gate scales; 0: not trained; the paper's is 1e-3"),
    "bias_step": (0.0, "step of the balancing bias, in standard deviations of p; 0: no balancing"),
    "dropout": (0.0, "dropout of LoRA; the paper's is 0.1"),
    "rank": (8, "rank of LoRA"),
    "router": (False, "train the router too, by LoRA (if weights are 1, through gate scales)"),
    "seed": (0, "random seed of the sample order, LoRA and dropout"),
}
ALPHA = 32.0  # LoRA multiplies B A by ALPHA / rank
WARMUP = 0.05  # share of the steps in which learning rates rise
CLIP = 1.0  # a gradient with a larger norm is scaled down to it
LOGITS_ROWS = 64  # tokens whose logits exist at a time
NO_GRADIENT = "--router: all experts run with weight 1; train gate scales too, by --scale-rate"

def make_settings(**changes) -> SimpleNamespace:
    defaults = {name: default for name, (default, _) in SETTINGS.items()}
    unknown = sorted(changes.keys() - defaults.keys())
    require(not unknown, f"no such settings: {unknown}; there are {[*defaults]}")
    return SimpleNamespace(**(defaults | changes))

# ----------------------------------------------------------------------------------------- 1. LoRA

class LoRA(nn.Module):
    """W -> W + scale B A, with W [..., n, d], A [..., rank, d], B [..., n, rank]; B starts at zero.

    Stacked experts [R, n, d] have an A and a B each. PyTorch calls `forward` when a layer uses W.
    Dropout zeroes elements of A, the same ones for all tokens of a batch.
    """

    def __init__(self, weight: Tensor, rank: int, dropout: float, size: float = 1.0):
        super().__init__()
        *experts, n, d = weight.shape
        self.a = nn.Parameter(torch.randn(*experts, rank, d, device=weight.device) / d**0.5)
        self.b = nn.Parameter(torch.zeros(*experts, n, rank, device=weight.device))
        self.scale = size * ALPHA / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * self.b @ self.dropout(self.a)).to(weight.dtype)

def moe_layers(model: Decoder) -> list[MoE]:
    """All of them, in two levels also those inside experts."""
    return [module for module in model.modules() if isinstance(module, MoE)]

def prepare(model: Decoder, settings: SimpleNamespace) -> tuple[list, list]:
    """Freeze the model and add what is trained -> the parameters of LoRA, and gate scales.

    LoRA goes on the matrices of attention, FFNs and experts, and on request on those of routers.
    The scores of a router can have any size, so its scale is relative to the norm of W's rows.
    A gate scale u weights expert e by w_e(x) (1 + p_e(x) u_e): section 4.2, and `MoE.route`.
    Raises InputError if routers are to be trained that change nothing.
    """
    torch.manual_seed(settings.seed)
    for moe in moe_layers(model):
        if settings.scale_rate and moe.router_scale is None:
            moe.make_trained("router_scale")
        if settings.bias_step and moe.router_bias is None:
            moe.make_trained("router_bias")
        useless = settings.router and moe.spec.weights_are_one and moe.router_scale is None
        require(not useless, NO_GRADIENT)
    model.requires_grad_(False)
    matrices, lora_weights, scales = ["gate_up_proj", "down_proj"], [], []
    if settings.router:
        matrices += ["router_weight", "router_gate", "router_up"]
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if name in matrices or (name == "weight" and isinstance(module, Linear)):
                size = weight.float().norm(dim=1).mean().item() if "router" in name else 1.0
                lora = LoRA(weight, settings.rank, settings.dropout, size)
                parametrize.register_parametrization(module, name, lora)
                lora_weights += lora.parameters()
            elif name in TRAINED:
                weight.data = weight.data.float()  # bfloat16 would lose small steps
                if name == "router_scale" and settings.scale_rate:
                    scales.append(weight.requires_grad_())
    return lora_weights, scales

def merge(model: Decoder):
    """Merge LoRA into the weights: W += scale B A."""
    model.eval()  # no dropout in the merged weights
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name)  # W keeps its present value
    model.to(model.embed_tokens.weight.dtype).requires_grad_(False)

# -------------------------------------------------------------------------------------- 2. Balance

@torch.no_grad()
def balance(moes: list[MoE], step: float) -> float:
    """Balance experts without an auxiliary loss (section 4.3). The bias b [R] of an MoE moves by

        b_e <- b_e - step std(p) sign(n_e - mean(n)),    n_e: tokens of expert e in this batch,

    which is in moe.last: its tokens x [T, D], and the experts [T, A] that ran for them. std(p),
    not in the paper, fits the step to the router. Returns the average max(n) / mean(n).
    """
    imbalance = []
    for moe in moes:
        if "last" not in vars(moe):  # an MoE inside an expert that no token selected
            continue
        x, chosen = vars(moe).pop("last")
        tokens = chosen.flatten().bincount(minlength=moe.spec.num_experts).float()  # [R]
        if step:
            p = moe.scores(x).float().softmax(dim=-1)  # [T, R]
            moe.router_bias -= step * p.std(correction=0) * (tokens - tokens.mean()).sign()
        imbalance.append((tokens.max() / tokens.mean()).item())
    return sum(imbalance) / max(1, len(imbalance))

# ----------------------------------------------------------------------------------------- 3. Loss

def backpropagate(model: Decoder, ids: Tensor, teacher: Decoder | None, share: float) -> Tensor:
    """Add the gradients of the loss to the trained weights -> the loss, over the tokens ids [B, T]:

        L = mean_t ( (1 - share) (-log p(label_t)) + share KL(p_teacher || p) ).

    Its gradient in the logits of a token is p - (1 - share) onehot(label) - share p_teacher. So
    logits exist for a few tokens at a time: of all tokens they would be the largest buffers by far,
    and take a quarter of the time of a step. Without a teacher, share counts as 0.
    """

    def last_states(model: Decoder) -> Tensor:  # [N, D], N = B (T - 1)
        return model.hidden_states(ids)[:, :-1].flatten(0, 1)

    share = share if teacher else 0.0
    x, labels = last_states(model), ids[:, 1:].flatten()
    total, gradients = x.new_zeros((), dtype=torch.float32), []
    with torch.no_grad():
        taught = last_states(teacher) if share else x
        blocks = zip(x.split(LOGITS_ROWS), taught.split(LOGITS_ROWS), labels.split(LOGITS_ROWS))
        for own, other, label in blocks:
            logp = model.logits(own).float().log_softmax(dim=-1)
            gradient = logp.exp()  # [n, vocab_size]
            gradient[torch.arange(len(label)), label] -= 1 - share
            total += (1 - share) * nn.functional.nll_loss(logp, label, reduction="sum")
            if share:
                teacher_logp = teacher.logits(other).float().log_softmax(dim=-1)
                teacher_p = teacher_logp.exp()
                gradient.sub_(teacher_p, alpha=share)
                total += share * (teacher_p * teacher_logp.sub_(logp)).sum()
            gradients.append(gradient.to(x) @ model.head)
    x.backward(torch.cat(gradients) / len(x))
    return total / len(x)

# ----------------------------------------------------------------------------------------- 4. Loop

def rate_factor(step: int, steps: int) -> float:
    """Learning rates rise in the first steps, and fall along a cosine to a tenth."""
    rise = min(1.0, (step + 1) / (WARMUP * steps))
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))

def make_batches(model: Decoder, ids: Tensor, settings: SimpleNamespace) -> Tensor:
    """-> [steps, batch, length]: windows in random order, anew each time the text runs out."""
    model.rope(0, settings.length)  # raises InputError if the model cannot run so many tokens
    windows = cut_windows(model, ids, settings.length)
    count = math.ceil(settings.samples / settings.batch) * settings.batch
    random = torch.Generator().manual_seed(settings.seed)
    rounds = range(math.ceil(count / len(windows)))
    order = torch.cat([torch.randperm(len(windows), generator=random) for _ in rounds])
    return windows[order[:count]].view(-1, settings.batch, settings.length)

def finetune(model: Decoder, ids: Tensor, settings: SimpleNamespace, state_file: Path | None = None,
             save_every: int = 50, resume: bool = False, teacher: Decoder | None = None) -> dict:
    """Fine-tune in place on token ids [T] -> {"loss": [...], "imbalance": [...]}, one per step.

    With a state_file, the state is saved every `save_every` steps, and `resume` goes on from it to
    the same weights (on a GPU, up to rounding). Raises InputError if a loss or a weight is not
    finite; `resume` may then have a smaller rate. However it ends, the model is an ordinary one
    again (`merge`).
    """
    batches = make_batches(model, ids, settings)
    identity = identify(settings, ids, [model, teacher])
    start, log = 0, {"loss": [], "imbalance": []}
    moes = moe_layers(model)
    try:
        lora_weights, scales = prepare(model, settings)
        trained, rates = lora_weights + scales, (settings.rate, settings.scale_rate)
        adam = torch.optim.Adam([{"params": lora_weights}, {"params": scales}], betas=(0.9, 0.95))
        tensors = trained + [moe.router_bias for moe in moes if moe.router_bias is not None]
        if resume:
            start, log = load_state(state_file, identity, tensors, adam)
        model.train()
        progress = tqdm(range(start, len(batches)), "fine-tuning", len(batches), initial=start)
        for step in progress:
            torch.manual_seed(settings.seed + 1 + step)  # the same dropout in a resumed run
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(step, len(batches))
            loss = backpropagate(model, batches[step], teacher, settings.distill)
            norm = nn.utils.clip_grad_norm_(trained, CLIP)
            finite = loss.isfinite() and norm.isfinite()
            require(finite, f"step {step}: loss {loss}, gradient {norm}; try a smaller --rate")
            if state_file and (step % save_every == 0 or step == len(batches) - 1):
                save_state(state_file, identity, step, log, tensors, adam)  # before its update
            log["loss"].append(loss.item())
            log["imbalance"].append(balance(moes, settings.bias_step))
            adam.step()
            adam.zero_grad()
            progress.set_postfix_str(f"loss {log['loss'][-1]:.3f}")
    finally:
        for moe in moes:
            vars(moe).pop("last", None)
        merge(model)
    finite = all(weight.isfinite().all() for weight in model.state_dict().values())
    require(finite, "the last step made weights that are not finite; try a smaller --rate")
    return log

def identify(settings: SimpleNamespace, ids: Tensor, models: list[Decoder | None]) -> dict:
    """What must be equal in a resumed run: settings other than the rate, the text, all weights."""
    sha = hashlib.sha256()
    for tensors in ([ids], *(model.state_dict().values() for model in models if model)):
        for tensor in tensors:
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return vars(settings) | {"rate": None, "sha256": sha.hexdigest()}

def save_state(file: Path, identity: dict, step: int, log: dict, tensors: list[Tensor], adam):
    state = {"run": identity, "step": step, "log": log, "tensors": tensors}
    state["adam"] = adam.state_dict()
    with refusing(f"could not write {file}"):
        replace_file(file, partial(torch.save, state))

def load_state(file: Path, identity: dict, tensors: list[Tensor], adam) -> tuple[int, dict]:
    """Restore tensors and optimizer -> the step to go on with, and the log so far."""
    other = f"{file} is of a run with other settings, another model or another text"
    with refusing(f"{file} cannot be resumed from"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        require(state["run"] == identity, other)
        for tensor, value in zip(tensors, state["tensors"], strict=True):
            tensor.data.copy_(value.data)
        adam.load_state_dict(state["adam"])
        return state["step"], state["log"]

# --------------------------------------------------------------------------------- 5. Command line

def add_settings(add, names):
    """Add a flag for each of these SETTINGS; `add` is the add_argument of a parser."""
    for name in names:
        default, help = SETTINGS[name]
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        add("--" + name.replace("_", "-"), default=default, help=help, **kind)

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("--model", metavar="SOURCE", help="converted or dense checkpoint (none: convert SmolLM2)")
    add("--teacher", metavar="SOURCE", help="dense model that --model was converted from")
    add("--text", default="manual", help="training text: file, wikitext2 or manual")
    add("--eval", default="manual", metavar="TEXT", help="evaluation text")
    add("--eval-tokens", type=int, default=6 * 2048, help="first N; 0: all")
    add("--out", metavar="DIR", default="tuned", help="where to write the result")
    add("--force", action="store_true", help="replace the checkpoint in --out")
    add("--save-every", type=int, default=50, help="steps between saves")
    add("--resume", action="store_true", help="go on from the state saved in OUT.state")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--json", metavar="FILE", help="write results and settings to this file")
    add_settings(add, SETTINGS)
    return parser.parse_args(argv)

def check_settings(s: SimpleNamespace):
    if min(s.samples, s.length - 1, s.batch, s.rank) < 1:
        raise InputError("--length must be at least 2, other counts at least 1")
    if not (0 <= s.distill <= 1 and 0 <= s.dropout < 1 and s.seed < 2**63):
        raise InputError("--distill must be from 0 to 1, --dropout below 1, --seed below 2**63")
    if not all(0 <= step < math.inf for step in (s.rate, s.scale_rate, s.bias_step, s.seed)):
        raise InputError("rates, --bias-step and --seed must be finite, and not negative")

def check_args(args: argparse.Namespace, state_file: Path):
    """Refuse what cannot work before anything is loaded."""
    check_settings(args)
    if args.save_every < 1 or args.eval_tokens < 0:
        raise InputError("--save-every must be at least 1, --eval-tokens at least 0")
    if args.json is not None:
        check_writable(args.json)
    check_output(args.out, args.force)
    split = Split.parse(ffn2moe.METHODS["joint"].experts)  # where the model is converted here
    useless = args.router and not args.scale_rate and split_spec(split.total, split).weights_are_one
    require(args.model or not useless, NO_GRADIENT)
    warn_if_same(args.text, args.eval)
    require(state_file.exists() or not args.resume, f"there is no {state_file} to resume from")
    if state_file.exists() and not args.resume and not args.force:
        raise InputError(f"{state_file} exists: --resume continues that run, --force starts over")

def run(args: argparse.Namespace):
    settings = make_settings(**{name: getattr(args, name) for name in SETTINGS})
    state_file = Path(f"{Path(args.out)}.state")
    check_args(args, state_file)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    teacher = None
    if args.teacher:
        teacher, its_tokenizer = load_model(args.teacher, args.dtype, args.device)
        same = its_tokenizer.get_vocab() == tokenizer.get_vocab()
        same = same and teacher.config.vocab_size == model.config.vocab_size
        require(same, "--teacher has another tokenizer or vocabulary than the model")
    ids = read_ids(model, tokenizer, args.text, "train")
    eval_ids = read_ids(model, tokenizer, args.eval, "test")[: args.eval_tokens or None]
    make_batches(model, ids, settings)  # refuses bad input before the long work
    measure = partial(perplexity, ids=eval_ids, window=2048, progress=tqdm)
    result = {}
    if args.model is None:
        result["dense"] = measure(model)
        teacher = teacher or copy.deepcopy(model)
        about = ffn2moe.parse_args([f"--calib={args.text}", f"--seed={args.seed}"])
        calib = ffn2moe.calibration_windows(model, ids, about)
        ffn2moe.convert(model, calib, progress=partial(tqdm, desc="converting", unit="layer"))
    result["before"] = measure(model)
    log = finetune(model, ids, settings, state_file, args.save_every, args.resume, teacher)
    save_model(model, tokenizer, args.out, args.force)
    state_file.unlink(missing_ok=True)
    result["after"] = measure(model)
    for name, value in result.items():
        print(f"perplexity {name:<20}{value:>10.2f}")
    print(f"wrote {args.out}")
    if args.json is not None:
        found = {name: finite_or_none(value) for name, value in result.items()}
        write_json(Path(args.json), vars(args) | {"perplexity": found, "log": log})

def main(argv: list[str] | None = None) -> int:
    return run_command("train", lambda: run(parse_args(argv)))

if __name__ == "__main__":
    sys.exit(main())
