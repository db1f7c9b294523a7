"""Measure what a conversion costs in quality and what it gains in time.

    python bench.py default     the job of the README's first command, for its table
    python bench.py quality     perplexity of every method and control
    python bench.py speed       FFN layers and the whole model against the dense ones
    python bench.py finetune    the fine-tune of train.py after each method
    python bench.py figures     pictures of what the method does to one model
    python bench.py all         all of these in order, then `readme`
    python bench.py readme      put the tables of results/ into README.md

Results go to a JSON file after each row, and a later run goes on from the rows in it. Tables and
plots are made from that file. Each row says which commit measured it, and where.
"""

import argparse
import copy
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: it would set the caller's backend
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

# isort: off
import ffn2moe
import kernels
import train
from ffn2moe import HIDDEN_RIDGE, SAMPLE_TOKENS, atopk_markers, best_bins, build_moe
from ffn2moe import contribution_energy, expert_norms, hidden, joint_layer, neuron_markers
from ffn2moe import neuron_weights, paper_layer, partition_and_router, partition_neurons, refit_down
from ffn2moe import refit_moe, representative_neurons, ridge_router, running_bins, sample_rows
from ffn2moe import unpredicted_energy
from model import DEFAULT_MODEL, FFN, Decoder, MoE, MoESpec, Split
from model import active_parameters, as_ids, check_writable, checkpoint_parts, cut_windows
from model import encode, has_bfloat16_units, load_model, load_text, make_ffn, perplexity, read_ids
from model import read_json, refusing, require, run_command, sha256_of, split_spec, warn_if_same
from model import write_json

RESULTS = Path(__file__).parent / "results"

# ------------------------------------------------------------------------------------ 1. Controls
#
# Each takes an FFN, its inputs x [T, D] and a split, and returns what stands for the FFN.

def static_layer(ffn: FFN, x: Tensor, split: Split, refit=True, ridge=HIDDEN_RIDGE) -> FFN:
    """Static pruning: the S + A slices of neurons with the most energy, the same for all tokens."""
    down, q = ffn.down_proj, ffn.down_proj.shape[1]
    blocks = x.split(ffn2moe.BLOCK)
    energy = sum(contribution_energy(hidden(ffn, block), down).sum(dim=0) for block in blocks)
    keep = energy.topk(round(split.share * q)).indices
    if refit:
        runs = torch.zeros(q, device=x.device).index_fill(0, keep, 1.0)
        down = refit_down(ffn, x, lambda block: runs, ridge).to(down)
    return FFN(torch.cat([ffn.gate_proj[keep], ffn.up_proj[keep]]), down[:, keep].contiguous())

# Three ways to group neurons, beside the joint one: bin_of [q]

def random_bins(ffn: FFN, x: Tensor, split: Split) -> Tensor:
    """LLaMA-MoE (Zhu et al., 2024): slices at random, the first S of them shared."""
    q = ffn.down_proj.shape[1]
    slices = torch.arange(split.total).repeat_interleave(split.slice_size(q))
    return sample_rows((slices - split.shared + 1).clamp_min(0), q).to(x.device)

def weight_bins(ffn: FFN, x: Tensor, split: Split) -> Tensor:
    """MoEfication (Zhang et al., 2022): balanced k-means on the rows of W_gate, of unit length.

    MoEfication has no shared expert. Here the S clusters with the most energy are shared.
    """
    rows, E = F.normalize(ffn.gate_proj.float(), dim=1), split.total
    capacity = [split.slice_size(len(rows))] * E
    centroids = sample_rows(rows, E)
    for _ in range(10):
        cluster = best_bins(-torch.cdist(rows, centroids).square(), capacity)
        centroids = torch.stack([rows[cluster == e].mean(dim=0) for e in range(E)])
    energy = contribution_energy(hidden(ffn, sample_rows(x, SAMPLE_TOKENS)), ffn.down_proj)
    of_cluster = torch.zeros(E, device=x.device).index_add_(0, cluster, energy.sum(dim=0))
    rank = of_cluster.argsort(descending=True).argsort()  # 0: the most energy
    return (rank[cluster] - split.shared + 1).clamp_min(0)

def paper_bins(ffn: FFN, x: Tensor, split: Split) -> Tensor:
    return partition_neurons(neuron_markers(ffn, x, 10), split)[0].to(x.device)

def joint_bins(ffn: FFN, x: Tensor, split: Split) -> Tensor:
    return partition_and_router(ffn, x, split)[0]

# Two routers, beside the ridge regression

def representative_router(ffn: FFN, x: Tensor, bin_of: Tensor, split: Split) -> dict[str, Tensor]:
    """The paper's router for any partition."""
    routed = (bin_of > 0).nonzero().flatten().cpu()
    expert = bin_of.cpu()[routed] - 1
    markers = neuron_markers(ffn, x, 10)[:, routed]
    representatives = representative_neurons(markers, expert, split.routed)
    return ffn2moe.analytical_router(ffn, routed[representatives])

@torch.enable_grad()
def mlp_scores(x: Tensor, norms: Tensor) -> nn.Module:
    """MoEfication's learned router: a small MLP that predicts each expert's norm from the token;
    its logarithm, because a few huge tokens would dominate the loss.
    x [T, D], norms [T, R] -> a module [t, D] -> [t, R]."""
    torch.manual_seed(0)
    x, target = x.float(), norms.clamp_min(1e-6 * norms.median()).log()
    target = (target - target.mean(dim=1, keepdim=True)) / target.std()
    mlp = nn.Sequential(nn.Linear(x.shape[1], 128), nn.Tanh(), nn.Linear(128, norms.shape[1]))
    mlp = mlp.to(x.device)
    mlp[0].weight.data /= x.square().mean().sqrt()  # inputs may be of any size
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-3)
    for epoch in range(20):
        for batch in sample_rows(torch.arange(len(x)), len(x), seed=epoch).split(256):
            loss = F.mse_loss(mlp(x[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():  # so small that experts run with nearly equal weights
        scale = ffn2moe.ROUTER_SCALE / mlp(x).abs().max()
        mlp[2].weight *= scale
        mlp[2].bias *= scale
    return mlp.requires_grad_(False)

def grid_layer(ffn: FFN, x: Tensor, split: Split, group: Callable, router: str, refit: bool) -> MoE:
    """One cell of the grid: a way to group neurons, a router, with or without refit."""
    bin_of, sample = group(ffn, x, split), sample_rows(x, SAMPLE_TOKENS)
    routed = bin_of[bin_of > 0]
    if router == "representative":
        tensors = representative_router(ffn, sample, bin_of, split)
    else:
        h = hidden(ffn, sample)
        if refit:  # which recovers what the shared neurons predict
            energy = unpredicted_energy(h, ffn.down_proj, bin_of)
        else:
            energy = contribution_energy(h, ffn.down_proj)[:, bin_of > 0]
        tensors = ridge_router(energy, sample, routed, split.routed)
    moe = build_moe(ffn, bin_of, tensors, split)
    if router == "MLP":  # in the place of the ridge router
        mlp = mlp_scores(sample, expert_norms(energy, routed, split.routed))
        moe.scores = lambda rows: mlp(rows.float())
        mlp_parameters = sum(p.numel() for p in mlp.parameters())
        moe.extra_parameters = mlp_parameters - moe.router_weight.numel()
    return refit_moe(ffn, moe, x) if refit else moe

def unified_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The paper's method without a shared expert."""
    return paper_layer(ffn, x, Split(0, split.shared + split.active, split.total))

def two_level_layer(ffn: FFN, x: Tensor, split: Split, inner: str) -> MoE:
    """Hierarchical sparsity: every expert is split once more."""
    convert_expert = partial(joint_layer, split=Split.parse(inner))
    return ffn2moe.convert_ffn(joint_layer(ffn, x, split), x, convert_expert)

class Masked(nn.Module):
    """An FFN of which, for each token, only some neurons count: y = W_down (h * weights(h, x)). It
    computes all of h: a reference, not a method. share: of the neurons that count."""

    def __init__(self, ffn: FFN, weights: Callable, share: float):
        super().__init__()
        self.ffn, self.weights, self.share = ffn, weights, share

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = hidden(self.ffn, rows)
        return F.linear((h * self.weights(h, rows)).to(x), self.ffn.down_proj).view(x.shape)

def oracle_router_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The joint partition under a router that knows how much energy each expert has, and refit."""
    moe = joint_layer(ffn, x, split, refit=False)

    def norms(rows):
        h = hidden(ffn, rows.to(ffn.down_proj))  # which calibration may have in another dtype
        return expert_norms(contribution_energy(h, ffn.down_proj), moe.bin_of, split.routed)

    # Of each token alike, because a few huge ones would leave others too little precision
    moe.scores = lambda rows: ffn2moe.ROUTER_SCALE * F.normalize(norms(rows), dim=1)
    return refit_moe(ffn, moe, x)

def oracle_neurons_layer(ffn: FFN, x: Tensor, split: Split) -> Masked:
    """For each token the neurons that contribute most: no experts, no refit."""
    n = round(split.share * ffn.down_proj.shape[1])

    def weights(h, rows):
        return atopk_markers(contribution_energy(h, ffn.down_proj), n)

    return Masked(ffn, weights, split.share)

def wina_layer(ffn: FFN, x: Tensor, split: Split, keep: float) -> Masked:
    """The joint method, and in the experts that run only the share `keep` of neurons with the
    largest |h_i| |W_down_i| (WINA, which the paper combines with). This saves arithmetic only on
    hardware that can skip single neurons."""
    moe = joint_layer(ffn, x, split, refit=False)
    down = refit_down(ffn, x, partial(neuron_weights, moe)).to(ffn.down_proj)
    n = round(keep * split.share * down.shape[1])

    def weights(h, rows):
        running = neuron_weights(moe, rows.to(moe.down_proj))
        return running * atopk_markers(contribution_energy(h * running, down), n)

    return Masked(FFN(ffn.gate_up_proj, down), weights, keep * split.share)

# ---------------------------------------------------------------------------- 2. Quality: the rows

@dataclass(frozen=True)
class Row:
    """One way to convert: layer(ffn, x [T, D], split) in all layers but those that stay dense.
    All fields are the key of a result: where one changes, the row is measured again."""

    name: str
    percent: float  # of the FFN that is meant to be active
    layer: Callable | None
    experts: str
    dense: str = "none"  # layers that stay so, or "auto": chosen by ffn2moe.choose_dense
    calib_windows: int = 16
    quoted: bool = False  # evaluated on all texts, and on all of the first
    timed: bool = False  # against the dense model
    seed: int = 0  # added to the seed of the calibration windows
    settings: dict = field(default_factory=dict)  # of train.py, where they differ

    @property
    def label(self) -> str:
        return label(self.name, self.percent)

    def key(self) -> dict:
        """What a result must agree in to stand for this row."""
        about = dict(vars(self))
        settings = about.pop("settings")
        return about | {"layer": describe_layer(self.layer)} | settings

def describe_layer(layer: Callable | None) -> str:
    """The function that makes a layer, and what it is given: "joint_layer, rounds=0"."""
    if not isinstance(layer, partial):
        return layer.__name__ if layer else "dense"
    given = [f"{name}={getattr(of, '__name__', of)}" for name, of in layer.keywords.items()]
    return ", ".join([layer.func.__name__, *given])

def label(name: str, percent: float) -> str:
    return f"{name}, {percent:g} %"

# Splits by percent of the FFN that runs. Joint rows leave some layers dense ("auto") and cut the
# others deeper, in slices for quality (E = 32) or for speed (16 and 8). ALIKE cuts all layers.
PAPER = {87.5: "S4A3E8", 75: "S3A3E8", 62.5: "S3A2E8", 50: "S2A2E8", 37.5: "S2A1E8", 25: "S2A2E16"}
JOINT = {87.5: "S10A10E32", 75: "S10A10E32", 62.5: "S8A8E32", 50: "S7A7E32", 37.5: "S5A5E32",
         25: "S4A3E32"}  # fmt: skip
ALIKE = {87.5: "S14A14E32", 75: "S12A12E32", 62.5: "S10A10E32", 50: "S8A8E32", 37.5: "S6A6E32",
         25: "S4A4E32"}  # fmt: skip
JOINT_E16 = {75: "S6A4E16", 50: "S3A3E16", 25: "S2A1E16"}
JOINT_E8 = {75: "S2A2E8", 50: "S1A2E8", 25: "S1A1E8"}
SIZES = (75, 50, 25)  # percent, of most tables
MAIN = ["paper", "static pruning, refit", "joint"]
OTHERS = ["LLaMA-MoE", "MoEfication"]  # systems, before the training that they end with
README_ROWS = [*OTHERS, *MAIN[:2], "static pruning, refit, same layers dense", "joint"]
GROUPINGS = {"random": random_bins, "weights": weight_bins, "paper": paper_bins,
             "joint": joint_bins}  # fmt: skip
ROUTERS = ("representative", "MLP", "ridge")
GRID = list(product(GROUPINGS, ROUTERS, (False, True)))  # True: with refit
# Cells of the grid that have a name of their own
SYSTEMS = {"random x MLP": "LLaMA-MoE", "weights x MLP": "MoEfication",
           "joint x ridge x refit": "joint"}  # fmt: skip
DENSE = Row("dense", 100, None, "")
UNIFIED = Row("paper, no shared expert", 50, unified_layer, "S2A2E8", calib_windows=8)

def main_rows(percent: float, seed: int = 0) -> list[Row]:
    """The three methods that everything else is compared with."""
    same = {"quoted": percent in SIZES and not seed, "timed": not seed, "seed": seed}
    return [
        Row("paper", percent, paper_layer, PAPER[percent], calib_windows=8, **same),
        Row("static pruning, refit", percent, static_layer, ALIKE[percent], **same),
        Row("joint", percent, joint_layer, JOINT[percent], "auto", **same),
    ]

def control_rows(percent: float) -> list[Row]:
    joint, alike = JOINT[percent], ALIKE[percent]
    own_ridge = partial(static_layer, ridge=0.03)  # its best on held-back text
    return [
        Row("static pruning", percent, partial(static_layer, refit=False), alike),
        Row("static pruning, own penalty", percent, own_ridge, alike, quoted=True),
        Row("static pruning, refit, same layers dense", percent, static_layer, joint, "auto"),
        Row("joint, all layers alike", percent, joint_layer, alike),
        Row("joint, no refit", percent, partial(joint_layer, refit=False), joint, "auto"),
        Row("joint, E = 16", percent, joint_layer, JOINT_E16[percent], "auto", timed=True),
        Row("joint, E = 8", percent, joint_layer, JOINT_E8[percent], "auto", timed=True),
        Row("oracle router", percent, oracle_router_layer, joint, "auto"),
        Row("oracle neurons", percent, oracle_neurons_layer, alike),
    ]

def grid_row(group: str, router: str, refit: bool, percent: float = 50) -> Row:
    """One grouping, router, and refit or not, all else equal; with the name of the system that it
    is (without the training that other systems end with), or of its parts."""
    layer = partial(grid_layer, group=GROUPINGS[group], router=router, refit=refit)
    parts = f"{group} x {router}" + (" x refit" if refit else "")
    return Row(SYSTEMS.get(parts, parts), percent, layer, JOINT[percent], "auto")

# From the paper's method to ours, one change at a time: the change, and the row that has it
WATERFALL = [
    ("paper", "paper"),
    ("more calibration text", "paper, 16 calibration windows"),
    ("layers stay dense", "paper, layers dense"),
    ("finer slices", "paper x representative"),
    ("refit", "paper x representative x refit"),
    ("ridge router", "paper x ridge x refit"),
    ("joint partition", "joint"),
]

ABLATIONS = [
    Row("paper, 16 calibration windows", 50, paper_layer, "S2A2E8"),
    Row("paper, layers dense", 50, paper_layer, "S1A2E8", "auto"),
    UNIFIED,
    Row("joint + WINA", 50, partial(wina_layer, keep=4 / 5), "S10A10E32"),
    Row("joint + WINA", 25, partial(wina_layer, keep=4 / 7), "S7A7E32"),
    Row("joint, E = 8", 70, joint_layer, "S3A1E8", "auto", timed=True),  # ffn2moe.py's default
    Row("joint, more shared", 50, joint_layer, "S11A3E32", "auto"),
    Row("joint, more routed", 50, joint_layer, "S3A11E32", "auto"),
    Row("joint, one level", 77.5, joint_layer, "S2A4E8", "0-2"),
    Row("joint, two levels", 60, partial(two_level_layer, inner="S3A3E8"), "S2A4E8", "0-2"),
    Row("joint, one level as sparse", 60, joint_layer, "S9A9E32", "0-2"),
    Row("paper, K_a = 50", 50, partial(paper_layer, k_act=50), "S2A2E8", calib_windows=8),
    Row("paper, K_a = 200", 50, partial(paper_layer, k_act=200), "S2A2E8", calib_windows=8),
    Row("joint, 0 rounds", 50, partial(joint_layer, rounds=0), JOINT[50], "auto"),
    Row("joint, 1 rounds", 50, partial(joint_layer, rounds=1), JOINT[50], "auto"),
    Row("joint, 8 calibration windows", 50, joint_layer, JOINT[50], "auto", 8),
    Row("joint, 32 calibration windows", 50, joint_layer, JOINT[50], "auto", 32),
    Row("joint, 64 calibration windows", 50, joint_layer, JOINT[50], "auto", 64),
]

def quality_rows() -> list[Row]:
    """All rows, the main ones first."""
    rows = [replace(DENSE, quoted=True)]
    for percent in (*SIZES, 87.5, 62.5, 37.5):
        rows += main_rows(percent)
    rows += [grid_row(group, "MLP", False, p) for p, group in product(SIZES, ("random", "weights"))]
    cells = [grid_row(*cell) for cell in GRID]
    rows += [row for row in cells if row.name not in SYSTEMS.values()] + ABLATIONS
    for percent in SIZES:
        rows += control_rows(percent)
    for percent, seed in product(SIZES, (1, 2)):
        rows += [replace(row, name=f"{row.name}, seed {seed}") for row in main_rows(percent, seed)]
    return rows

# --------------------------------------------------- Results: a file of rows, each with its origin

@cache
def origin(device: str) -> dict:
    """What a result comes from: the commit that last changed the code, and the machine."""

    def git(*command):
        command = ["git", "-C", Path(__file__).parent, *command, "--", ":(glob)*.py"]  # no tests
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h") if shutil.which("git") else ""
    return {
        "commit": commit or "unknown",
        "clean": bool(commit) and not git("status", "--porcelain"),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),  # whose manual is the default text
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }

def machine_name(device: str) -> str:
    if device != "cpu":
        with refusing(f"device {device!r} is not usable here"):
            return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    about = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", text, re.MULTILINE))
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {unit} " in text]
    # A virtual machine may have a name that several generations of processors share.
    kind = [f"{key} {about[key]}" for key in ("cpu family", "model") if key in about]
    name = about.get("model name", platform.machine())
    return f"{name} ({', '.join([*kind, *units[-1:]])})"

def describe_origin(rows: Iterable[dict]) -> str:
    """One line under a table that says where its rows come from."""
    commits = {}
    for row in rows:
        about = row["origin"]
        machine = f"{about['machine']}, {about['threads']} threads, torch {about['torch']}"
        commit = about["commit"] + ("" if about["clean"] else " with changes")
        commits.setdefault(machine, set()).add(commit)
    places = [f"{name}, commit {', '.join(sorted(commits[name]))}" for name in sorted(commits)]
    return f"Measured on {'; and on '.join(places)}.\n"

def read_results(file: Path, settings: dict) -> dict:
    """The rows that an earlier run with the same settings left in the file, or none yet."""
    done = read_json(file) if file.exists() else {"settings": settings, "rows": {}}
    has_rows = isinstance(done, dict) and {"settings", "rows"} <= done.keys()
    require(has_rows, f"{file} holds no rows of results")
    for name, value in settings.items():
        there = done["settings"].get(name)
        other = f"{file} was made with {name} = {there}, and not {value}"
        require(there == value, f"{other}: move it away, or name another file by --json")
    return done

def is_done(done: dict, name: str, key: dict, args: argparse.Namespace) -> bool:
    """Whether the results hold this row; with --again, measured by this very code, and here."""
    row = done["rows"].get(name)
    if row is None or row["key"] != key:
        return False
    here, there = origin(args.device) | {"date": ""}, row["origin"] | {"date": ""}
    return not args.again or (here == there and here["clean"])

def add_row(args: argparse.Namespace, done: dict, name: str, key: dict, row: dict):
    others = read_json(args.json)["rows"] if args.json.exists() else {}  # of a run beside this one
    done["rows"] |= others | {name: {"key": key, "origin": origin(args.device)} | row}
    write_json(args.json, done)

def chosen_rows(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows that --only names, or all."""
    names = {row.name for row in rows}
    require(set(only or ()) <= names, f"--only: no such row; there are {sorted(names)}")
    return [row for row in rows if not only or row.name in only]

def markdown(corner: str, lines: dict[str, dict[str, str]]) -> str:
    """A table: lines by their names, in each the cells by the names of the columns."""
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    table = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    for name, cells in lines.items():
        table.append([name, *(cells.get(column, "") for column in columns)])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in table)

def publish(file: Path, title: str, done: dict, tables: str):
    """Print the tables of a command under their origin, and write them beside the results."""
    text = f"# {title}\n\n{describe_origin(done['rows'].values())}\n{tables}"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)

# --------------------------------------------------------------------------- 3. Quality: measuring

HELD_BACK = "held-back"  # as a text: the end of the calibration text, on which settings are chosen

class Text(NamedTuple):
    name: str
    windows: Tensor  # [N, T]
    dense: list[Tensor]  # last hidden states of the dense model, for the first windows

def settings_of(args: argparse.Namespace, *more: str) -> dict:
    """What must be equal for rows to stand in one file; these names of flags too."""
    common = ("command", "device", "seed", "eval_tokens", "window")
    found = {name: getattr(args, name) for name in (*common, *more)}
    found |= {"model": args.model or DEFAULT_MODEL, "dtype": args.dtype[0]}
    found |= {"calib": Path(args.calib).stem, "eval": [Path(text).stem for text in args.eval]}
    texts = [load_text(text, "test") for text in args.eval if text != HELD_BACK]
    sha = hashlib.sha256("".join([load_text(args.calib, "train"), *texts]).encode())
    if args.model:  # the default one is verified at every use
        path = Path(args.model)
        files = [path] if path.is_file() else []
        for pattern in ("*.safetensors", "config.json", "tokenizer.json"):
            files += sorted(path.glob(pattern))
        for file in files:
            sha.update(sha256_of(file).encode())
    return found | {"inputs_sha256": sha.hexdigest()[:16]}

def load(args: argparse.Namespace) -> tuple[Decoder, Tokenizer, Tensor, dict[str, Tensor]]:
    """The model, its tokenizer, the token ids to calibrate or train on [T], and those of each
    evaluation text, by its name."""
    model, tokenizer = load_model(args.model, args.dtype[0], args.device)
    require(ffn2moe.describe(model.specs) == "dense", "the methods are compared on a dense model")
    calib, texts = read_ids(model, tokenizer, args.calib, "train"), {}
    for text in args.eval:
        warn_if_same(args.calib, text)
        if text == HELD_BACK:
            calib, texts[text] = hold_back(calib, args.window)
        else:
            texts[Path(text).stem] = read_ids(model, tokenizer, text, "test")
    require(len(texts) == len(args.eval), "two evaluation texts have the same name")
    return model, tokenizer, calib, texts

def hold_back(ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Token ids [T] -> those to calibrate on, and the last 8 windows. The 4 windows between are
    left out, so that no article is in both."""
    enough = len(ids) >= 13 * window
    require(enough, f"{len(ids)} tokens are too few to hold back 8 of 13 windows of {window}")
    return ids[: -12 * window], ids[-8 * window :]

def evaluate(model: Decoder, text: Text, whole: bool, title: str) -> dict:
    """Over the windows that the dense model has seen: perplexity, mean KL(dense || model) in nats,
    and the share of positions where both put the same token first. whole: perplexity of all."""
    nll, kl, same, first = [], 0.0, 0.0, len(text.dense)
    windows = text.windows if whole else text.windows[:first]
    for i, window in enumerate(tqdm(windows, desc=f"{title}: {text.name}", unit="window")):
        x, total = model.hidden_states(window[None])[0, :-1], 0.0
        for start in range(0, len(x), 256):  # float32 logits are large
            part = slice(start, start + 256)
            logp = model.logits(x[part]).float().log_softmax(dim=-1)
            total += F.nll_loss(logp, window[1:][part], reduction="sum").item()
            if i < first:
                dense = model.logits(text.dense[i][part]).float().log_softmax(dim=-1)
                kl += F.kl_div(logp, dense, reduction="sum", log_target=True).item()
                same += (logp.argmax(dim=-1) == dense.argmax(dim=-1)).sum().item()
        nll.append(total / len(x))
    positions = first * (text.windows.shape[1] - 1)
    result = {"perplexity": float(np.exp(np.mean(nll[:first])))}
    result |= {"kl": kl / positions, "same_top": same / positions}
    if whole:
        result["perplexity_whole"] = float(np.exp(np.mean(nll)))
    return result

def convert_by_row(model: Decoder, row: Row, calib: Tensor, seed: int, title: str) -> frozenset:
    """Convert the model as the row says, in place, on some of the windows calib [N, T] -> the
    layers that stayed dense."""
    split = Split.parse(row.experts)
    windows = sample_rows(calib, row.calib_windows, seed + row.seed)
    if len(windows) < row.calib_windows:
        print(f"warning: only {len(windows)} calibration windows", file=sys.stderr)
    active = row.percent / 100 if row.dense == "auto" else None
    # As for joint, whatever the method: rows may leave the layers dense that joint would
    dense = ffn2moe.kept_layers(model, windows, split, "joint", row.dense, active)
    bar = partial(tqdm, desc=f"{title}: convert", unit="layer")
    ffn2moe.replace_ffns(model, windows, lambda i, ffn, x: row.layer(ffn, x, split), dense, bar)
    return dense

def active_share(model: Decoder, dense_ffn: int) -> float:
    """Parameters of FFNs that one token uses, over those of the dense model; routers count, but not
    in `Masked` layers."""
    if any(isinstance(ffn, Masked) for ffn in model.ffns):
        return float(np.mean([getattr(ffn, "share", 1.0) for ffn in model.ffns]))
    extra = sum(getattr(ffn, "extra_parameters", 0) for ffn in model.ffns)
    return (active_parameters(model)[0] + extra) / dense_ffn

def is_evaluated(done: dict, row: Row, args: argparse.Namespace) -> bool:
    """Whether the results hold this row, and on the whole text if the README quotes it."""
    whole = perplexity_of(done, row.name, row.percent, key="perplexity_whole")
    complete = whole is not None or not row.quoted
    return complete and is_done(done, row.label, row.key(), args)

def quality(args: argparse.Namespace):
    file, done = args.json, read_results(args.json, settings_of(args))
    rows = chosen_rows(quality_rows(), args.only)
    if not all(is_evaluated(done, row, args) for row in rows):
        measure_rows(args, rows, done)
    plot_quality(done, file.with_suffix(".png"))
    plot_waterfall(done, file.with_name(f"{file.stem}-waterfall.png"))
    publish(file, "Quality", done, quality_tables(done))

def measure_rows(args: argparse.Namespace, rows: list[Row], done: dict):
    """Convert, evaluate and write each row that is not done."""
    model, _, calib, found = load(args)
    calib, texts = cut_windows(model, calib, args.window), []
    for name, ids in found.items():
        windows = cut_windows(model, ids, args.window)
        first = max(1, args.eval_tokens // windows.shape[1]) if args.eval_tokens else len(windows)
        bar = tqdm(windows[:first], desc=f"dense, {name}", unit="window")
        states = [model.hidden_states(one[None])[0, :-1] for one in bar]
        texts.append(Text(name, windows, states))
    dense_ffns, dense_ffn = model.ffns, active_parameters(model)[0]
    for n, row in enumerate(rows, start=1):
        if is_evaluated(done, row, args):
            continue
        title, model.ffns = f"{n}/{len(rows)} {row.label}", dense_ffns
        dense = convert_by_row(model, row, calib, args.seed, title) if row.layer else ()
        result = {"active_ffn": active_share(model, dense_ffn)}
        result["dense_layers"] = ffn2moe.format_layers(dense)
        if row.timed:
            versions, ids = {"dense_": dense_ffns, "": model.ffns}, texts[0].windows[:1]
            for what, steps in (("prefill", 0), ("decode", 16)):
                times = ffn2moe.time_model(model, versions, ids, steps, args.turns)
                result |= {f"{side}{what}_ms": float(np.median(ms)) for side, ms in times.items()}
        result["texts"] = {}
        for text in texts if row.quoted else texts[:1]:
            whole = row.quoted and text is texts[0]
            result["texts"][text.name] = evaluate(model, text, whole, title)
        add_row(args, done, row.label, row.key(), result)
        print(f"{title}: {result['texts'][texts[0].name]['perplexity']:.2f}", flush=True)

# -------------------------------------------------------------------- 4. Quality: tables and plots

def perplexity_of(done: dict, name: str, percent: float, text=None, key="perplexity"):
    """Of a row, on a text (None: the first), or None if it is not measured."""
    row = done["rows"].get(label(name, percent))
    return row["texts"].get(text or done["settings"]["eval"][0], {}).get(key) if row else None

def cell(done: dict, name: str, percent: float, text=None, key="perplexity") -> str:
    value = perplexity_of(done, name, percent, text, key)
    return "" if value is None else f"{value:.2f}"

def sizes_table(done: dict, cell_of: Callable, names: list[str], percents=SIZES) -> str:
    """Methods against sizes, with cell_of(done, name, percent). The dense model has one size."""
    lines = {}
    for name in ("dense", *names):
        cells = {f"{p:g} %": cell_of(done, name, 100 if name == "dense" else p) for p in percents}
        if any(cells.values()):
            lines[name] = cells
    return markdown("active FFN", lines) if lines else ""

def details_table(done: dict) -> str:
    """Every row: what runs, how fast, and how far from the dense model."""
    lines, text = {}, done["settings"]["eval"][0]
    for row in [row for row in quality_rows() if row.label in done["rows"]]:
        r = done["rows"][row.label]
        lines[row.label] = {
            "made by": r["key"]["layer"],
            "split": r["key"]["experts"],
            "dense layers": r["dense_layers"],
            "active FFN": f"{r['active_ffn']:.1%}",
            "KL to dense, nats": f"{r['texts'][text]['kl']:.3f}",
            "same top token": f"{r['texts'][text]['same_top']:.1%}",
            "perplexity": cell(done, row.name, row.percent),
            "whole text": cell(done, row.name, row.percent, key="perplexity_whole"),
            "commit": r["origin"]["commit"],
        }
        for what in ("prefill", "decode"):
            if f"{what}_ms" in r:
                lines[row.label][what] = f"{r[f'dense_{what}_ms'] / r[f'{what}_ms']:.2f}x"
    return markdown("", lines)

def grid_table(done: dict) -> str:
    lines = {}
    for group, router, refit in GRID:
        name = grid_row(group, router, refit).name
        found = cell(done, name, 50)
        system = f" ({name})" if found and name in SYSTEMS.values() else ""
        cells = lines.setdefault("random" if group == "random" else f"grouped by {group}", {})
        cells[f"{router}, refit" if refit else router] = found + system
    return markdown("at 50 %", lines)

def seeds_cell(done: dict, name: str, percent: float) -> str:
    """Mean and range over three draws of the calibration windows."""
    draws = [name, f"{name}, seed 1", f"{name}, seed 2"]
    values = [perplexity_of(done, draw, percent) for draw in draws]
    if None in values:
        return ""
    commits = {done["rows"][label(draw, percent)]["origin"]["commit"] for draw in draws}
    mixed = ", of several commits" if len(commits) > 1 else ""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}{mixed})"

def quality_tables(done: dict) -> str:
    (text, *others), tokens = done["settings"]["eval"], done["settings"]["eval_tokens"]
    much = f"at most the first {tokens:,} tokens" if tokens else "all"
    names = [*OTHERS, *MAIN, *(row.name for row in control_rows(50))]
    steps = {change: {"row": row, "perplexity": cell(done, row, 50)} for change, row in WATERFALL}
    parts = {
        f"Perplexity ({text}, {much})": sizes_table(done, cell, names),
        "How neurons are grouped x how tokens are routed x refit": grid_table(done),
        "One change at a time, at 50 %": markdown("", steps),
        "More sizes": sizes_table(done, cell, MAIN, PAPER),
        "Three seeds": sizes_table(done, seeds_cell, MAIN),
    }
    for other in others:
        title = f"Calibrated on {done['settings']['calib']}, evaluated on {other}"
        parts[title] = sizes_table(done, partial(cell, text=other), names)
    parts["All rows"] = details_table(done)
    return "\n".join(f"## {title}\n\n{table}" for title, table in parts.items() if table)

PLOTTED = {
    "paper": ("#b03a2e", "o-"),
    "static pruning": ("#999999", "s-"),
    "static pruning, refit": ("#555555", "D-"),
    "joint": ("#1f6fb4", "o-"),
    "joint, E = 16": ("#5aa0d8", "v-"),
    "joint, E = 8": ("#8ec6ee", "P-"),
    "oracle neurons": ("#6a9e5c", "^--"),
}

@contextmanager
def picture(file: Path, width: float, height: float, *grid: int, **options):
    """The axes of a new figure, which is saved at the end."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(*grid, **options)
    figure.savefig(file, dpi=120)

PERPLEXITIES = [20, 30, 50, 100, 200, 500, 1000]  # on axes

def plot_quality(done: dict, file: Path):
    """Perplexity on the first text: against the share of the FFN that runs, and against time, where
    all points are of one machine, that of the first timed row."""
    timed = [row for row in done["rows"].values() if "prefill_ms" in row]
    machine = timed[0]["origin"]["machine"] if timed else ""
    with picture(file, 6.4, 7.6, 2, 1) as (above, below):
        by_size = sorted(done["rows"].values(), key=lambda r: r["key"]["percent"])
        for name, (colour, style) in PLOTTED.items():
            shares, times = [], []  # the points of each panel
            for r in by_size:
                if r["key"]["name"] == name:
                    value = perplexity_of(done, name, r["key"]["percent"])
                    shares.append((r["active_ffn"], value))
                    if "prefill_ms" in r and r["origin"]["machine"] == machine:
                        times.append((r["prefill_ms"] / r["dense_prefill_ms"], value))
            for ax, points in ((above, shares), (below, times)):
                if points:
                    ax.plot(*zip(*points), style, color=colour, label=name)
        dense = perplexity_of(done, "dense", 100)
        for ax in (above, below):
            if dense:
                ax.axhline(dense, color="black", linewidth=0.8, label="dense")
            ax.set(yscale="log", yticks=PERPLEXITIES, yticklabels=PERPLEXITIES)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.set_ylabel(f"perplexity, {done['settings']['eval'][0]}")
        below.axvline(1, color="black", linewidth=0.8)
        above.set_xlabel("active FFN parameters / dense")
        below.set_xlabel("time of a prefill / dense")
        above.legend(fontsize=9)

def plot_waterfall(done: dict, file: Path):
    """From the paper's method to ours at 50 %, one change at a time."""
    values = [perplexity_of(done, name, 50) for _, name in WATERFALL]
    dense = perplexity_of(done, "dense", 100)
    if None in (dense, *values):
        return
    with picture(file, 6.4, 3.6) as ax:
        for i, (before, value) in enumerate(zip([dense, *values[:-1]], values, strict=True)):
            colour = "#999999" if i == 0 else "#b03a2e" if value > before else "#1f6fb4"
            ax.barh(i, value - before, left=before, color=colour)
            ax.text(max(value, before) * 1.03, i, f"{value:.1f}", va="center", fontsize=9)
        ax.set_yticks(range(len(values)), [change for change, _ in WATERFALL])
        ax.invert_yaxis()
        ax.axvline(dense, color="black", linewidth=0.8)
        ax.set(xscale="log", xticks=PERPLEXITIES, xticklabels=PERPLEXITIES)
        ax.set_xlim(dense * 0.9, max(values) * 1.4)
        ax.minorticks_off()
        text = done["settings"]["eval"][0]
        ax.set_xlabel(f"perplexity, {text}, half of the FFN active (line: dense)")

# ---------------------------------------------------------------------------------------- 5. Speed

def faster(times: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where something was timed compiled too, the faster of the two, for dense and MoE alike."""
    best = {}
    for name, ms in times.items():
        stem = name.removesuffix(", compiled")
        if stem not in best or np.median(ms) < np.median(best[stem]):
            best[stem] = ms
    return best

def parse_spec(text: str, q: int) -> MoESpec:
    """What an FFN of q neurons becomes: "S3A3E8", or in two levels "S2A4E8+S3A3E8"."""
    outer, plus, inner = text.partition("+")
    spec = split_spec(q, Split.parse(outer))
    return split_spec(spec, Split.parse(inner)) if plus else spec

def random_ffn(hidden_size: int, spec: int | MoESpec, dtype: torch.dtype, device: str) -> nn.Module:
    ffn = make_ffn(hidden_size, spec).to(device, dtype).eval().requires_grad_(False)
    for weight in ffn.parameters():
        weight.normal_().div_(weight.shape[-1] ** 0.5)
    return ffn

# Peers: the same layer by other means

def plain_ffn(ffn: FFN, x: Tensor) -> Tensor:
    """The dense FFN as it is usually written."""
    return F.linear(F.silu(F.linear(x, ffn.gate_proj)) * F.linear(x, ffn.up_proj), ffn.down_proj)

def moe_by_grouped_mm(moe: MoE, x: Tensor) -> Tensor:
    """PyTorch's own grouped product. x [T, D] -> [T, D]."""
    chosen, weights = moe.route(x)
    slots, counts = kernels.sort_by_expert(chosen, moe.spec.num_experts)
    tokens, ends = slots // chosen.shape[1], counts.cumsum(0).to(torch.int32)
    rows = x.index_select(0, tokens)
    h = kernels.swiglu(F.grouped_mm(rows, moe.gate_up_proj.transpose(1, 2), offs=ends))
    h = h * weights.flatten()[slots, None]
    y = F.grouped_mm(h, moe.down_proj.transpose(1, 2), offs=ends)
    return moe.shared_expert(x).index_add_(0, tokens, y)

def transformers_layer(moe: MoE) -> nn.Module | None:
    """transformers' Qwen2-MoE layer, where version 5 is installed. Its gate of 0 halves the shared
    expert."""
    try:
        from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe
    except ImportError:
        return None
    D, spec = moe.down_proj.shape[1], moe.spec
    config = configuration_qwen2_moe.Qwen2MoeConfig(
        hidden_size=D, num_experts=spec.num_experts, num_experts_per_tok=spec.active,
        moe_intermediate_size=spec.expert_size, shared_expert_intermediate_size=spec.shared_size,
        norm_topk_prob=True,
    )  # fmt: skip
    layer = modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config)
    layer = layer.to(moe.down_proj).requires_grad_(False).eval()
    weights = {"shared_expert_gate.weight": torch.zeros(1, D)}
    for name, weight in moe.state_dict(prefix="mlp.").items():
        for part, view in checkpoint_parts(name, weight, stacked=weight.dim() == 3).items():
            weights[part.removeprefix("mlp.")] = view
    if layer.state_dict().keys() != weights.keys():  # version 4 has a tensor for each expert
        return None
    layer.load_state_dict(weights)
    return layer

def neurons_read(spec: int | MoESpec, batch: float, chance: float = 1.0) -> float:
    """The neurons whose weights a batch of B single tokens reads, on average: those of the shared
    expert, and of R (1 - (1 - A / R)^B) routed ones. So B = 1 counts the neurons that run for a
    token, B = inf all. chance: that a token comes to this FFN."""
    if isinstance(spec, int):
        return spec * (1 - (1 - chance) ** batch)
    shared = neurons_read(spec.expert_spec(spec.shared_size), batch, chance)
    chance *= spec.active / spec.num_experts
    expert = neurons_read(spec.expert_spec(spec.expert_size), batch, chance)
    return shared + spec.num_experts * expert

def in_turn(calls: list[Callable]) -> Callable:
    """A function that calls the next of these each time."""
    turn = cycle(calls)
    return lambda: next(turn)()

def workload(key: dict) -> str:
    if key["what"] == "ffn":
        tokens = "1 token" if key["tokens"] == 1 else f"{key['tokens']:,} tokens"
        return f"FFN {key['shape']}, {tokens}, {key['dtype']}"
    return f"SmolLM2 {key['what']}, batch {key['batch']}, {key['dtype']}"

def speed_row(key: dict, times: dict, specs: list, parameters: list) -> dict:
    """Medians in milliseconds, and what to compare the speedup with.

    times: milliseconds of each turn ("bare": of the model without FFNs); specs: the FFN of each
    layer; parameters: those that one token uses in the dense model and in the MoE.

    spread      of the speedup over turns: interquartile range / median
    ideal       neurons / neurons that run
    bound       the speedup of the whole if its FFNs were ideal
    read_bound  the same if each expert that a token of the batch chose is read once
    """
    medians = {name: float(np.median(ms)) for name, ms in times.items()}
    dense, moe, bare = medians["dense"], medians["MoE"], medians.get("bare", 0.0)
    low, middle, high = np.quantile(times["dense"] / times["MoE"], [0.25, 0.5, 0.75])
    tokens = key["batch"] * (1 if key["what"] == "decode" else key["tokens"])
    neurons = sum(neurons_read(spec, np.inf) for spec in specs)
    ideal = neurons / sum(neurons_read(spec, 1) for spec in specs)
    by_reading = neurons / sum(neurons_read(spec, tokens) for spec in specs)
    return {
        "tokens_at_once": tokens,
        "dense_ms": dense,
        "moe_ms": moe,
        "speedup": dense / moe,
        "spread": (high - low) / middle,
        "ideal": ideal,
        "bound": dense / (bare + (dense - bare) / ideal),
        "read_bound": dense / (bare + (dense - bare) / by_reading),
        "parameters": parameters,
        "peers_ms": {n: ms for n, ms in medians.items() if n not in ("dense", "MoE", "bare")},
    }

@torch.inference_mode()
def ffn_speed(key: dict, turns: int) -> dict:
    """An FFN alone -> a row. For one token, as many copies as a large cache does not hold take
    turns, as the layers of a model do."""
    D, q = map(int, key["shape"].split("x"))
    dtype, spec = getattr(torch, key["dtype"]), parse_spec(key["experts"], q)
    tokens, device = key["tokens"], key["device"]
    num_copies = max(1, min(60, 2**28 // (3 * D * q * dtype.itemsize))) if tokens == 1 else 1
    x = torch.randn(tokens, D).to(device, dtype)
    width = round(neurons_read(spec, 1))
    layers, calls = {}, {}
    for name, its_spec in {"dense": q, "MoE": spec, "static": width}.items():
        layers[name] = [random_ffn(D, its_spec, dtype, device) for _ in range(num_copies)]
        calls[name] = [partial(layer, x) for layer in layers[name]]
    if tokens == 1 and kernels.can_compile(device) and not spec.inner:
        torch.compiler.reset()
        compiled = torch.compile(lambda layer: layer(x))
        for name, copies in layers.items():
            calls[f"{name}, compiled"] = [partial(compiled, layer) for layer in copies]
    calls["plain"] = [partial(plain_ffn, ffn, x) for ffn in layers["dense"]]
    if not spec.inner:
        if spec.expert_size * dtype.itemsize % 16 == 0:  # what grouped_mm can do
            calls["grouped_mm"] = [partial(moe_by_grouped_mm, moe, x) for moe in layers["MoE"]]
        peers = [transformers_layer(moe) for moe in layers["MoE"]]
        if peers[0]:
            calls["transformers"] = [partial(peer, x[None]) for peer in peers]
    functions = {name: in_turn(copies) for name, copies in calls.items()}
    times = faster(ffn2moe.time_in_turns(functions, turns, device))
    return speed_row(key, times, [spec], [3 * D * q, 3 * D * width])

@lru_cache(maxsize=1)
def model_versions(dtype: str, device: str, experts: str):
    """The default model, its FFNs as they were, converted, and left out, the parameters that one
    token uses before and after, and a text [T]."""
    model, tokenizer = load_model(None, dtype, device)
    versions = {"dense": model.ffns, "bare": [nn.Identity() for _ in model.layers]}
    before = active_parameters(model)[1]
    calib_ids = read_ids(model, tokenizer, "manual", "train")[:2048]
    ffn2moe.convert(model, calib_ids, experts, dense="none")
    versions["MoE"], parameters = model.ffns, [before, active_parameters(model)[1]]
    return model, versions, parameters, read_ids(model, tokenizer, "manual", "test")

def model_speed(key: dict, turns: int) -> dict:
    """The default model -> a row. prefill: to the logits of the last token; decode: the last
    32 tokens, one at a time with a KV cache."""
    batch, device = key["batch"], key["device"]
    model, versions, parameters, text = model_versions(key["dtype"], device, key["experts"])
    needed = batch * key["tokens"]
    require(len(text) >= needed, f"--batch {batch} needs {needed} tokens of text")
    ids = text[:needed].view(batch, -1)
    steps = 32 if key["what"] == "decode" else 0
    compiled = 0 < steps and batch <= kernels.FEW_TOKENS and kernels.can_compile(device)
    times = faster(ffn2moe.time_model(model, versions, ids, steps, turns, compiled))
    return speed_row(key, times, model.specs, parameters)

def speed_keys(args: argparse.Namespace) -> list[dict]:
    """All workloads: what (ffn, prefill or decode), shape, tokens of a sequence, sequences, split,
    dtype and device of each, and a name for it."""
    keys = []
    for dtype, shape in product(args.dtype, args.shape):
        if shape == "smollm2-135m":
            cases = []
            for experts, batch in product(args.experts, args.batch):
                cases.append(("prefill", 2048 // batch, batch, experts))
                cases.append(("decode", 128, batch, experts))
        else:
            splits = args.experts + ["S2A4E8+S3A3E8"] * (shape == "2048x8192")  # in two levels
            cases = [("ffn", tokens, 1, split) for tokens, split in product(args.tokens, splits)]
        for what, tokens, batch, experts in cases:
            key = {"shape": shape, "dtype": dtype, "device": args.device, "what": what}
            key |= {"tokens": tokens, "batch": batch, "experts": experts}
            keys.append({"name": f"{workload(key)}, {experts}, {args.device}", **key})
    return keys

def speed(args: argparse.Namespace):
    done = read_results(args.json, {"command": "speed"})
    torch.manual_seed(0)
    for key in speed_keys(args):
        if not is_done(done, key["name"], key, args):
            measure = ffn_speed if key["what"] == "ffn" else model_speed
            row = measure(key, args.turns)
            add_row(args, done, key["name"], key, row)
            print(f"{key['name']}: {row['speedup']:.2f}x of {row['bound']:.2f}x", flush=True)
    publish(args.json, "Speed", done, speed_tables(done))

def milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"

def in_readme(row: dict) -> bool:
    """Whether a row of results stands in a table of the README. Of speed, to be short, these do
    not: FFNs with one token, prefills of several sequences, and two levels."""
    key = row["key"]
    if "percent" in key:
        return key["name"] == "dense" or (key["name"] in README_ROWS and key["percent"] in SIZES)
    several = key["what"] == "prefill" and key["batch"] > 1
    return key["tokens"] > 1 and not several and "+" not in key["experts"]

def speed_overview(done: dict) -> str:
    """The table of the README: a line for each workload, a column for each split."""
    lines = {}
    for row in filter(in_readme, done["rows"].values()):
        key, line = row["key"], workload(row["key"])
        if key["device"] != "cpu":
            line += f", {row['origin']['machine']}"
        speedup = f"{row['speedup']:.2f}x of {row['bound']:.2f}x"
        lines.setdefault(line, {})[key["experts"]] = speedup
    return markdown("speedup", lines)

def speed_tables(done: dict) -> str:
    """The overview, then all rows. Peers are given as speedups over dense too."""
    lines = {}
    for name, r in done["rows"].items():
        dense, moe, tokens = r["dense_ms"], r["moe_ms"], r["tokens_at_once"]
        before, after = r["parameters"]
        lines[name] = {
            "dense, ms": milliseconds(dense),
            "MoE, ms": milliseconds(moe),
            "speedup": f"{r['speedup']:.2f}x",
            "spread": f"{r['spread']:.1%}",
            "ideal": f"{r['ideal']:.2f}x",
            "of ideal": f"{r['speedup'] / r['ideal']:.1%}",
            "bound": f"{r['bound']:.2f}x",
            "bound by reading": f"{r['read_bound']:.2f}x" if tokens <= kernels.FEW_TOKENS else "",
            "GFLOP per token": f"{2e-9 * before:.3f} → {2e-9 * after:.3f}",
            "tokens/s": f"{1e3 * tokens / dense:,.0f} → {1e3 * tokens / moe:,.0f}",
        }
        lines[name] |= {peer: f"{dense / ms:.2f}x" for peer, ms in r["peers_ms"].items()}
    return f"{speed_overview(done)}\n## All rows\n\n{markdown('', lines)}"

# ---------------------------------------------------------------------------------- 6. Fine-tuning

RECIPE = ("samples", "length", "rate", "distill", "dropout", "scale_rate", "bias_step")
FACTORS = (2, 4, 8)  # how far more training tokens get; from 4 on, the README's text is repeated

def recipe_of(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in (*RECIPE, "seed")}

def longer_run(name: str, factor: int) -> str:
    return f"{name}, {factor} x the samples"

def blank_router_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The joint method's experts under a router with random weights."""
    moe = joint_layer(ffn, x, split)
    weight = torch.randn(moe.router_weight.shape, generator=torch.Generator().manual_seed(0))
    moe.router_weight.copy_(ffn2moe.ROUTER_SCALE * weight / x.shape[1] ** 0.5)
    return moe

def finetune_rows(samples: int) -> list[Row]:
    """The dense model learns the text, is converted as the row says, and teaches the converted one.

    Rows without a teacher (distill = 0) are in the paper's order: the dense model is converted, and
    the result learns the text.
    """
    paper, static, joint = main_rows(50)
    rows = [DENSE, paper, static, joint, *main_rows(75), *main_rows(25)]
    change = partial(Row, percent=50, layer=joint_layer, experts=JOINT[50], dense="auto")
    trained = {"router": True}
    rows += [
        change("joint, with balancing", settings={"bias_step": 0.02}),
        change("joint, with gate scales", settings={"scale_rate": 1e-3}),
        change("joint, with dropout", settings={"dropout": 0.1}),
        change("joint, router trained too", settings=trained),
        change("joint, in the paper's order", settings={"distill": 0.0}),
        change("joint, router learned from nothing", layer=blank_router_layer, settings=trained),
        UNIFIED,
    ]
    for factor, row in product(FACTORS, (DENSE, paper, joint)):
        longer = {"samples": factor * samples}
        rows.append(replace(row, name=longer_run(row.name, factor), settings=longer))
    return rows

def finetune(args: argparse.Namespace):
    args.eval = args.eval[:1]  # the others are for the quality of conversions
    file, recipe = args.json, recipe_of(args)
    done = read_results(file, settings_of(args, *RECIPE))
    rows = chosen_rows(finetune_rows(args.samples), args.only)
    dense, _, ids, texts = load(args)
    eval_ids = next(iter(texts.values()))[: args.eval_tokens or None]
    windows = cut_windows(dense, ids, args.window)

    def tune(model: Decoder, settings, teacher: Decoder | None) -> dict:
        """Fine-tune in place -> results."""
        result = {"before": perplexity(model, eval_ids, args.window)}
        log = train.finetune(model, ids, settings, teacher=teacher)
        result["after"] = perplexity(model, eval_ids, args.window)
        result["tokens"] = len(log["loss"]) * settings.batch * settings.length
        tenth = len(log["loss"]) // 10 + 1
        for name in ("loss", "imbalance"):  # at first and at last
            result[name] = [float(np.mean(log[name][:tenth])), float(np.mean(log[name][-tenth:]))]
        return result

    @cache
    def tuned_dense(samples: int) -> tuple[Decoder, dict]:
        """The dense model after a fine-tune on so many samples, which is the teacher of the MoEs
        that learn from as many."""
        model = copy.deepcopy(dense)
        return model, tune(model, train.make_settings(**recipe | {"samples": samples}), None)

    for row in rows:
        if is_done(done, row.label, row.key(), args):
            continue
        settings = train.make_settings(**recipe | row.settings)
        if not row.layer:
            model, result = tuned_dense(settings.samples)
        else:
            teacher = tuned_dense(settings.samples)[0] if settings.distill else None
            model = copy.deepcopy(teacher or dense)
            convert_by_row(model, row, windows, args.seed, row.label)
            result = tune(model, settings, teacher)
        add_row(args, done, row.label, row.key(), result)
        print(f"{row.label}: {result['before']:.2f} -> {result['after']:.2f}", flush=True)
    plot_tokens(done, file.with_suffix(".png"))
    publish(file, "Fine-tuning", done, finetune_tables(done))

def finetune_cell(done: dict, name: str, percent: float) -> str:
    """Perplexity before → after, in brackets over the dense model's after as many tokens."""
    row, rows = done["rows"].get(label(name, percent)), done["rows"].values()
    if not row:
        return ""
    dense = {r["tokens"]: r["after"] for r in rows if r["key"]["percent"] == 100}
    ratio = f" ({row['after'] / dense[row['tokens']]:.2f})" if row["tokens"] in dense else ""
    return f"{row['before']:.2f} → {row['after']:.2f}{ratio}"

def finetune_tables(done: dict) -> str:
    lines = {}
    for name, row in done["rows"].items():
        lines[name] = {
            "tokens": f"{row['tokens']:,}",
            "perplexity": finetune_cell(done, row["key"]["name"], row["key"]["percent"]),
            "load, max / mean": " → ".join(f"{value:.2f}" for value in row["imbalance"] if value),
            "commit": row["origin"]["commit"],
        }
    recipe = {name: done["settings"][name] for name in RECIPE}
    table = sizes_table(done, finetune_cell, MAIN)
    return f"Recipe: {recipe}\n\n{table}\n## All rows\n\n{markdown('', lines)}"

def plot_tokens(done: dict, file: Path):
    """Perplexity after the fine-tune against training tokens, at 50 %, beside the dense model."""
    with picture(file, 5.6, 3.8) as ax:
        for method, colour in (("dense", "black"), ("paper", "#b03a2e"), ("joint", "#1f6fb4")):
            names = [method, *(longer_run(method, factor) for factor in FACTORS)]
            labels = [label(name, 100 if method == "dense" else 50) for name in names]
            rows = [done["rows"][one] for one in labels if one in done["rows"]]
            points = [(row["tokens"], row["after"]) for row in rows]
            if points:
                ax.plot(*zip(*points), "o-", color=colour, label=method)
        ax.axvline(4.2e6, color="#999999", linewidth=0.8, linestyle="--", label="the paper's 4.2 M")
        ax.set(xscale="log", yscale="log", xlabel="training tokens")
        ax.set_ylabel(f"perplexity, {done['settings']['eval'][0]}")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:.0f}")
        ax.yaxis.set_minor_formatter("{x:.0f}")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)

# ------------------------------------------------------------------------- 7. Figures of one model

FIGURES = Path(__file__).parent / "figures"
SHOWN = "The river rose in 1913, and the old bridge was carried away. She sings better than he."

def plot_rates(rates: dict[tuple[int, int], Tensor], file: Path):
    """Activation rates as in the paper's Figure 2: a row per K_a, a column per layer, linear axes.
    rates: layer, K_a -> [q], by layers."""
    rows, columns = len({k for _, k in rates}), len({layer for layer, _ in rates})
    size = (2.6 * columns + 0.6, 2.0 * rows + 0.4)
    with picture(file, *size, rows, columns, squeeze=False) as axes:
        for ax, ((layer, k), rate) in zip(axes.T.flat, rates.items()):
            ax.hist(rate.numpy(), np.linspace(0, 1, 51), color="#4878a8")
            often = (rate > 0.5).float().mean()
            ax.set_title(f"layer {layer}, K_a = {k}: {often:.1%} above 0.5", fontsize=8)
            ax.tick_params(labelsize=7)
        figure = axes[0, 0].figure
        figure.supxlabel("activation rate: share of tokens for which a neuron fires", fontsize=9)
        figure.supylabel("neurons", fontsize=9)

def plot_partition(ffn: FFN, x: Tensor, split: Split, file: Path):
    """Where a token's energy is, by the router's first choice, for two partitions."""
    R, x = split.routed, sample_rows(x, SAMPLE_TOKENS)
    energy = contribution_energy(hidden(ffn, x), ffn.down_proj)
    with picture(file, 7.6, 3.7, 1, 2) as axes:
        for ax, name in zip(axes, ("random", "joint")):
            bin_of = GROUPINGS[name](ffn, x, split)
            norms = expert_norms(energy, bin_of, R)
            scores = x @ ridge_router(energy, x, bin_of, R)["router_weight"].T
            chosen = scores.topk(split.active, dim=-1).indices
            runs = running_bins(chosen, R)[:, bin_of]  # [T, q]
            captured = (energy * runs).sum() / energy.sum()
            first = F.one_hot(chosen[:, 0], R).float()  # [T, R]
            mean = first.T @ norms.square() / first.sum(dim=0)[:, None]  # nan: never first
            mean = mean / norms.square().mean(dim=0)
            order = mean.diagonal().nan_to_num().argsort(descending=True)
            shown = mean[order][:, order].log2().clamp(-2, 2).cpu().numpy()
            image = ax.imshow(shown, cmap="RdBu_r", vmin=-2, vmax=2)
            ax.set_facecolor("#bbbbbb")  # of nan
            ax.set_title(f"{name}: {captured:.0%} of the energy runs", fontsize=9)
            ax.set(xlabel="expert", xticks=[], yticks=[])
        axes[0].set_ylabel("tokens whose first choice is this expert")
        bar = axes[0].figure.colorbar(image, ax=axes, label="expert's energy / its mean")
        bar.set_ticks(range(-2, 3), labels=["1/4", "1/2", "1", "2", "4"])

def plot_words(model: Decoder, tokenizer, shown: Tensor, words: list[list[str]], layer: int, file):
    """Which routed experts run for the tokens of a text [T], and which words each is for."""
    R = len(words)
    chosen = ffn2moe.chosen_experts(model, shown[None], layer)
    ran = F.one_hot(chosen, R).sum(dim=1).T.cpu()  # [R, T]
    with picture(file, 3.4 + 0.24 * len(shown), 1.2 + 0.19 * R) as ax:
        ax.imshow(ran.numpy(), cmap="Blues", aspect="auto", vmax=1.4)
        tokens = [ffn2moe.token_text(tokenizer, i) for i in shown.tolist()]
        ax.set_xticks(range(len(shown)), tokens, rotation=90, fontsize=8)
        ax.set_yticks(range(R), [", ".join(favourites[:5]) for favourites in words], fontsize=7)
        ax.set_ylabel("routed expert: the words that it is for", fontsize=9)

def figures(args: argparse.Namespace):
    """The pictures of the README, from one conversion."""
    FIGURES.mkdir(exist_ok=True)
    model, tokenizer, calib, texts = load(args)
    calib = cut_windows(model, calib, args.window)
    test = cut_windows(model, next(iter(texts.values())), args.window)[:20]
    split, q = Split.parse(JOINT[50]), model.config.intermediate_size
    last, rates = len(model.layers) - 1, {}

    def replacement(i, ffn, x):
        if i in (0, last // 2, last):
            sample = sample_rows(x, SAMPLE_TOKENS)
            for k in (10, round(q / 11)):  # the paper draws 1,000 of 11,008 neurons
                rates[i, k] = ffn2moe.activation_rates(neuron_markers(ffn, sample, k))
        if i == last // 2:
            plot_partition(ffn, x, split, FIGURES / "partition.png")
        return joint_layer(ffn, x, split)

    windows, bar = sample_rows(calib, 32, args.seed), partial(tqdm, desc="converting", unit="layer")
    ffn2moe.replace_ffns(model, windows, replacement, progress=bar)
    plot_rates(rates, FIGURES / "activation_rates.png")
    words = ffn2moe.words_of_experts(model, tokenizer, test, last // 2)
    shown = as_ids(model, encode(tokenizer, SHOWN))
    plot_words(model, tokenizer, shown, words, last // 2, FIGURES / "words.png")

# ---------------------------------------------------------------------- 8. README and command line

def readme_tables() -> dict[str, str]:
    """The tables of the README, by the names in its markers, from the files in results/."""
    makers = {"default": lambda done: f"```\n{done['table']}\n```\n", "speed": speed_overview,
              "quality": partial(sizes_table, cell_of=cell, names=README_ROWS),
              "finetune": partial(sizes_table, cell_of=finetune_cell, names=MAIN)}  # fmt: skip
    tables = {}
    for name, make in makers.items():
        if (RESULTS / f"{name}.json").exists():
            done = read_json(RESULTS / f"{name}.json")
            rows = filter(in_readme, done["rows"].values()) if "rows" in done else [done]
            tables[name] = f"{make(done)}\n{describe_origin(rows)}"
    return tables

def with_tables(text: str, tables: dict[str, str]) -> str:
    """The README's text with what stands between <!-- name --> and <!-- end --> made anew."""
    for name, table in tables.items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        if marker:
            text = before + marker + table + rest[rest.index("<!-- end -->") :]
    return text

def readme(args: argparse.Namespace):
    file = Path(__file__).parent / "README.md"
    text = with_tables(file.read_text(encoding="utf-8"), readme_tables())
    file.write_text(text, encoding="utf-8")

def default(args: argparse.Namespace):
    if args.json.exists() and not args.again:
        print(f"{args.json} is there already; --again measures it again")
        return
    result = ffn2moe.run(ffn2moe.parse_args(["--device", args.device]))
    write_json(args.json, result | {"origin": origin(args.device)})

def everything(args: argparse.Namespace):
    """All measurements of the README, in order. Rows that are done are not measured again."""
    for name in [name for name in COMMANDS if name != "all"]:
        print(f"--- {name}", flush=True)
        change = {"command": name, "json": RESULTS / f"{name}.json"}
        COMMANDS[name](argparse.Namespace(**vars(args) | change))

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """One set of flags; each command uses those that concern it."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" or has_bfloat16_units() else "float32"
    tokens = [1, 1024, 2048, 4096, 8192, 16384] if device == "cuda" else [1, 2048]
    shapes = ["576x1536", "2048x8192", "smollm2-135m"] + ["4096x11008"] * (device == "cuda")
    splits = ["S7A7E32", "S10A10E32", "S6A4E16", "S3A3E8", "S2A2E8", "S3A1E8"]
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--model", metavar="SOURCE", help="for quality, finetune, figures; as for ffn2moe.py")
    add("--calib", default="manual", metavar="TEXT", help="to calibrate or fine-tune on")
    add("--eval", nargs="+", default=["manual"], metavar="TEXT",
        help=f"evaluation texts; {HELD_BACK}: the end of the calibration text")  # fmt: skip
    add("--eval-tokens", type=int, default=20480, metavar="N", help="first N of each; 0: all")
    add("--window", type=int, default=2048, metavar="N", help="tokens per sequence")
    add("--only", nargs="+", metavar="ROW", help="only the rows of these names")
    add("--again", action="store_true", help="measure rows of other commits and machines again")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=[dtype], help="of weights")
    add("--device", default=device, help="where to run")
    add("--seed", type=int, default=0, help="picks the calibration windows")
    add("--turns", type=int, default=5, help="of timing, of which the median is taken")
    add("--json", type=Path, metavar="FILE", help="results, with tables and plots beside "
        "(results/COMMAND.json)")  # fmt: skip
    add("--shape", nargs="+", default=shapes, help="speed: FFNs of DxQ, or the whole model")
    add("--tokens", nargs="+", type=int, default=tokens, help="speed: of FFNs")
    add("--batch", nargs="+", type=int, default=[1, 8], help="speed: sequences, for the model")
    add("--experts", nargs="+", metavar="SnAnEn", default=splits, help="speed: splits")
    train.add_settings(add, RECIPE)
    parser.set_defaults(samples=1024)  # 65,536 tokens: the rows with more of them take hours
    args = parser.parse_args(argv)
    if args.command == "all" and args.json:
        parser.error("--json is for one command")
    args.json = args.json or RESULTS / f"{args.command}.json"
    return args

def check_args(args: argparse.Namespace):
    """Refuse what is known to be impossible before anything is loaded."""
    check_writable(args.json)
    least = min(args.turns, *args.tokens, *args.batch)
    require(least > 0, "--turns, --tokens and --batch must be at least 1")
    require(max(args.batch) <= 2048, "--batch must be at most 2048")
    require(args.eval_tokens >= 0, "expected --eval-tokens at least 0")
    has_rows = args.command in ("quality", "finetune")
    require(has_rows or not args.only, "--only is for quality and finetune")
    require(len(args.dtype) == 1 or not has_rows, "only speed can take more than one --dtype")
    train.check_settings(train.make_settings(**recipe_of(args)))
    for shape, split in product(args.shape, args.experts):
        known = re.fullmatch(r"smollm2-135m|[1-9]\d*x[1-9]\d*", shape)
        require(known, f"--shape {shape!r}: expected, for example, 576x1536 or smollm2-135m")
        parse_spec(split, int(shape.partition("x")[2] or 1536))  # refuses what cannot be cut
        one_level = "splits in two levels are for FFNs alone: name no smollm2-135m in --shape"
        require("x" in shape or "+" not in split, one_level)

COMMANDS = {one.__name__: one for one in (default, quality, speed, finetune, figures, readme)}
COMMANDS["all"] = everything

def run(args: argparse.Namespace):
    check_args(args)
    origin(args.device)  # remembered now: the code may be changed while it runs
    COMMANDS[args.command](args)

def main(argv: list[str] | None = None) -> int:
    return run_command("bench", lambda: run(parse_args(argv)))

if __name__ == "__main__":
    sys.exit(main())
