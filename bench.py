"""Measure what a conversion costs in quality and what it gains in time, beside the controls that it has to beat.

    python bench.py quality --calib wikitext2 --eval wikitext2 manual
    python bench.py speed --json speed.json --plot speed.png

1. `quality`   Each row converts the model anew in one way and evaluates it: `quality_rows` lists them, and the functions
               above it are the controls that ffn2moe.py has no use for. Raw results go to a JSON file after each row,
               and a run goes on from those that are in it; table and plot are made from that file.
2. `speed`     FFN layers alone, and the whole model in prefill and decode, in turns with the dense one.
3. `finetune`  The same fine-tune (train.py) after each way to convert, and of the dense model.
4. `levels`    A conversion of a conversion, beside one in one level that is as sparse.
5. `memory`    What a conversion needs at its peak.
6. `figures`   Pictures of what the method does to one model.
"""

import argparse
import copy
import ctypes
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import ffn2moe
import kernels
import model as lm
import train
from ffn2moe import joint_layer, paper_layer, partition_and_router
from model import FFN, InputError, MoE, Split

# ----------------------------------------------------------------------------------------------------------------------
# 1. Quality
#
# Controls. Each takes an FFN, its inputs x [T, D] and a split, and returns what stands for the FFN.


def active_width(q: int, split: Split) -> int:
    """Neurons that run, (S + A) m."""
    return (split.shared + split.active) * lm.expert_size(q, split)


def total_energy(ffn: FFN, x: Tensor) -> Tensor:
    """Squared contribution of each neuron, summed over all tokens: [q]."""
    blocks = x.split(ffn2moe.BLOCK)
    return sum(ffn2moe.contribution_energy(ffn2moe.hidden(ffn, block), ffn.down_proj).sum(dim=0) for block in blocks)


def static_layer(ffn: FFN, x: Tensor, split: Split, refit: bool) -> FFN:
    """Static pruning: the S + A slices of neurons of largest mean squared contribution, for every token the same."""
    keep = total_energy(ffn, x).topk(active_width(ffn.gate_proj.shape[0], split)).indices
    down = ffn.down_proj
    if refit:
        # As an MoE of two bins, of which one always runs and the other never.
        bin_of = torch.ones_like(down[0], dtype=torch.long).index_fill_(0, keep, 0)
        always = lambda block: torch.tensor([1.0, 0.0], device=x.device).expand(len(block), 2)
        down = ffn2moe.refit_down(ffn, x, always, bin_of).to(down)
    return narrow_ffn(ffn, keep, down[:, keep])


def narrow_ffn(ffn: FFN, keep: Tensor, down: Tensor) -> FFN:
    """The FFN of the neurons `keep` [n] alone, with down [D, n]."""
    return FFN.of(torch.cat([ffn.gate_proj[keep], ffn.up_proj[keep]]), down.to(ffn.down_proj).contiguous())


def paper_refit_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The paper's method with the joint method's refit."""
    moe = paper_layer(ffn, x, split)
    ffn2moe.refit_moe(ffn, moe, x)
    return moe


def random_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The joint method's router and refit on a partition that is drawn by lot."""
    bins = bins_in_order(ffn.gate_proj.shape[0], split)
    bin_of, down = ffn2moe.draw(bins, len(bins)).to(x.device), ffn.down_proj
    sample = ffn2moe.draw(x, ffn2moe.SAMPLE_TOKENS)
    h = ffn2moe.in_blocks(partial(ffn2moe.hidden, ffn), sample, len(bins))
    router = ffn2moe.ridge_router(ffn2moe.unpredicted_energy(h, down, bin_of), sample, bin_of[bin_of > 0], split.routed)
    moe = ffn2moe.build_moe(ffn, bin_of, router, split)
    ffn2moe.refit_moe(ffn, moe, x)
    return moe


def bins_in_order(q: int, split: Split) -> Tensor:
    """The first neurons are shared, and the others go to the experts in turn: [q]."""
    return torch.arange(split.total).sub(split.shared - 1).clamp_min(0).repeat_interleave(lm.expert_size(q, split))


class Oracle(nn.Module):
    """An FFN of which those neurons run that `active` says, given all of the hidden h: [T, q] -> [T, q].

    It computes all of h first: something to compare with, not to use.
    """

    def __init__(self, ffn: FFN, active: Callable, down: Tensor | None = None):
        super().__init__()
        self.ffn, self.active, self.down = ffn, active, ffn.down_proj if down is None else down

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        h = ffn2moe.hidden(self.ffn, x)
        return F.linear((h * self.active(h)).to(x), self.down).view(shape)


def oracle_router_layer(ffn: FFN, x: Tensor, split: Split) -> Oracle:
    """The joint partition under a router that knows how much energy each expert has, refitted under its choices."""
    bin_of, _ = partition_and_router(ffn, x, split)

    def active(h):
        norms = ffn2moe.expert_norms(ffn2moe.contribution_energy(h, ffn.down_proj), bin_of, split.routed)
        return ffn2moe.active_bins(norms.topk(split.active, dim=-1).indices, split.routed)

    down = ffn2moe.refit_down(ffn, x, lambda block: active(ffn2moe.hidden(ffn, block)), bin_of)
    return Oracle(ffn, lambda h: active(h)[:, bin_of], down.to(x))


def oracle_neurons_layer(ffn: FFN, x: Tensor, split: Split) -> Oracle:
    """For each token the neurons that contribute most, no experts, no refit."""
    width = active_width(ffn.gate_proj.shape[0], split)
    top = lambda h: ffn2moe.contribution_energy(h, ffn.down_proj).topk(width, dim=-1).indices
    return Oracle(ffn, lambda h: torch.zeros_like(h).scatter_(1, top(h), 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# The rows


class Row(NamedTuple):
    """One way to convert: layer(ffn, x [T, D], split) in all layers but those that stay dense."""

    name: str
    percent: int  # of the FFN that is meant to be active
    layer: Callable
    experts: str
    dense: str = "none"  # layers that stay so, or "auto": chosen by ffn2moe.choose_dense
    calib_windows: int = 32
    all_texts: bool = False  # evaluated on every text, not on the first only
    main: bool = False  # and, with --whole, on the whole of the first

    def key(self, texts: list[str], whole: bool) -> dict:
        """What a result must agree in to stand for this row."""
        key = {"name": self.name, "percent": self.percent, "experts": self.experts, "dense": self.dense}
        texts = texts if self.all_texts or self.main else texts[:1]
        return key | {"calib_windows": self.calib_windows, "texts": texts, "whole": whole and self.main}


def quality_rows() -> list[Row]:
    """The controls at three sizes, then the ablations at one of them.

    Splits of the joint rows: E = 32 for quality, 16 and 8 for speed. Which layers stay dense is chosen on the calibration
    text, so that no more parameters are active than in the paper's rows.
    """
    unified = lambda ffn, x, split: paper_layer(ffn, x, Split(0, split.shared + split.active, split.total))
    rows = [Row("dense", 100, None, "S1A1E2", main=True)]
    for percent, paper_split, even, split, coarse, coarser in (
        (75, "S3A3E8", "S12A12E32", "S10A10E32", "S6A4E16", "S2A2E8"),
        (50, "S2A2E8", "S8A8E32", "S7A7E32", "S3A3E16", "S1A2E8"),
        (25, "S2A2E16", "S4A4E32", "S4A3E32", "S2A1E16", "S1A1E8"),
    ):
        rows += [
            Row("paper", percent, paper_layer, paper_split, calib_windows=8, main=True),
            Row("static pruning", percent, partial(static_layer, refit=False), even, all_texts=True),
            Row("static pruning, refit", percent, partial(static_layer, refit=True), even, main=True),
            Row("static pruning, refit, same layers dense", percent, partial(static_layer, refit=True), split, "auto"),
            Row("paper, refit, same layers dense", percent, paper_refit_layer, split, "auto"),
            Row("random partition, ridge router, refit", percent, random_layer, split, "auto"),
            Row("joint, all layers alike", percent, joint_layer, even),
            Row("joint, no refit", percent, partial(joint_layer, refit=False), split, "auto", all_texts=True),
            Row("joint", percent, joint_layer, split, "auto", main=True),
            Row("joint, E = 16", percent, joint_layer, coarse, "auto"),
            Row("joint, E = 8", percent, joint_layer, coarser, "auto"),
            Row("oracle router", percent, oracle_router_layer, split, "auto"),
            Row("oracle neurons", percent, oracle_neurons_layer, even),
        ]
    return rows + [
        Row("paper, no shared expert", 50, unified, "S2A2E8", calib_windows=8),
        Row("paper, K_a = 50", 50, partial(paper_layer, k_act=50), "S2A2E8", calib_windows=8),
        Row("paper, K_a = 200", 50, partial(paper_layer, k_act=200), "S2A2E8", calib_windows=8),
        Row("paper, 4 assignment rounds", 50, partial(paper_layer, rounds=4), "S2A2E8", calib_windows=8),
        Row("paper, 32 calibration windows", 50, paper_layer, "S2A2E8", calib_windows=32),
        Row("joint, no alternation", 50, partial(joint_layer, rounds=0), "S7A7E32", "auto"),
        Row("joint, 1 round", 50, partial(joint_layer, rounds=1), "S7A7E32", "auto"),
        Row("joint, 8 calibration windows", 50, joint_layer, "S7A7E32", "auto", calib_windows=8),
        Row("joint, 64 calibration windows", 50, joint_layer, "S7A7E32", "auto", calib_windows=64),
        Row("joint, all layers alike, E = 16", 50, joint_layer, "S4A4E16"),
        Row("joint, all layers alike, E = 8", 50, joint_layer, "S2A2E8"),
        Row("joint, more shared", 50, joint_layer, "S11A3E32", "auto"),
        Row("joint, more routed", 50, joint_layer, "S3A11E32", "auto"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


HELD_BACK = "held-back"  # the name of the last windows of the calibration text, on which settings are chosen


def hold_back(ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Token ids [T] -> those to calibrate on, and the last 8 windows. The 4 between are left out, so that no article is in both."""
    if len(ids) < 13 * window:
        raise InputError(f"{len(ids)} tokens of calibration text are too few to hold back 8 of at least 13 windows of {window}")
    return ids[: -12 * window], ids[-8 * window :]


class Text(NamedTuple):
    name: str
    windows: Tensor  # [N, T]
    dense: list[Tensor]  # what the dense model puts out before its unembedding, [T, D] for the first windows


@torch.no_grad()
def evaluate(model: lm.Decoder, text: Text, first: int, whole: bool, bar: Callable) -> dict:
    """Over the first windows: perplexity, mean KL(dense || model) in nats, and the share of positions where both put the
    same token first. Over the whole text, if asked: perplexity."""
    first = min(first, len(text.windows))
    nll, kl, same = [], 0.0, 0.0
    for i, window in enumerate(bar(text.windows if whole else text.windows[:first])):
        x = model.hidden_states(window[None])[0, :-1]
        total = 0.0
        for start in range(0, len(x), 256):  # float32 logits are large
            part = slice(start, start + 256)
            logp = model.logits(x[part]).float().log_softmax(dim=-1)
            total += F.nll_loss(logp, window[1:][part], reduction="sum").item()
            if i < first:
                reference = model.logits(text.dense[i][part]).float().log_softmax(dim=-1)  # the unembedding is the same
                kl += F.kl_div(logp, reference, reduction="sum", log_target=True).item()
                same += (logp.argmax(dim=-1) == reference.argmax(dim=-1)).sum().item()
        nll.append(total / len(x))
    positions = first * (text.windows.shape[1] - 1)
    mean = lambda values: float(torch.tensor(values, dtype=torch.float64).mean().exp())
    result = {"perplexity": mean(nll[:first]), "kl": kl / positions, "same_top": same / positions}
    return result | ({"perplexity_whole": mean(nll)} if whole else {})


def read_results(file: Path, settings: dict) -> dict:
    """The rows that an earlier run with the same settings left in the file, or none yet."""
    done = lm.read_json(file) if file.exists() else {"settings": settings, "rows": []}
    if done["settings"] != settings:
        raise InputError(f"{file} was made with other settings, {done['settings']}: choose another --json")
    return done


def add_row(file: Path, done: dict, result: dict):
    """Put a row into the results and their file, in place of one of its name and size."""
    name = lambda r: (r["key"]["name"], r["key"]["percent"])
    done["rows"] = [r for r in done["rows"] if name(r) != name(result)] + [result]
    lm.write_json(file, done)


def publish(file: Path, table: str):
    """Print a table, and write it beside the results."""
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def check_only(only: list[str] | None, names: set[str]):
    if only and set(only) - names:
        raise InputError(f"--only: no such row; there are {sorted(names)}")


def quality(args: argparse.Namespace):
    rows = [row for row in quality_rows() if args.only is None or row.name in args.only]
    check_only(args.only, {row.name for row in quality_rows()})
    file, names = Path(args.json), [Path(text).stem for text in args.eval]
    if len(set(names)) < len(names):
        raise InputError("two evaluation texts have the same name")
    settings = {"model": args.model or Path(lm.WHEEL_MEMBER).name, "dtype": args.dtype, "device": args.device, "seed": args.seed}
    settings |= {"calib": Path(args.calib).stem, "eval": names, "first_tokens": args.eval_tokens, "window": args.window}
    done = read_results(file, settings)
    keys = [r["key"] for r in done["rows"]]
    pending = [row for row in rows if row.key(names, args.whole) not in keys]
    if pending:
        measure_rows(args, pending, done, file)
    plot_quality(done, file.with_suffix(".png"))
    publish(file, quality_table(done))


def replace_by_row(model: lm.Decoder, row: Row, windows: Tensor, title: str) -> frozenset[int]:
    """Convert the model as the row says, in place -> the layers that stayed dense."""
    split = Split.parse(row.experts)
    if row.dense == "auto":
        dense = ffn2moe.choose_dense(model, windows, split, row.percent / 100)
    else:
        dense = ffn2moe.parse_layers(row.dense)
    replacement = lambda i, ffn, x: row.layer(ffn, x, split)
    ffn2moe.replace_ffns(model, windows, replacement, dense, partial(tqdm, desc=f"{title}: convert", unit="layer"))
    return dense


def measure_rows(args: argparse.Namespace, rows: list[Row], done: dict, file: Path):
    """Convert and evaluate once for each row; add the results to `done` and write it to the file after each."""
    model, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    window = min(args.window, model.config.max_position_embeddings)
    read = lambda text, split: lm.read_ids(model, tokenizer, text, split)
    calib = read(args.calib, "train")
    if HELD_BACK in args.eval:
        calib, held_back = hold_back(calib, window)
    calib = lm.cut_windows(calib, window)
    calib = ffn2moe.draw(calib, len(calib), args.seed)
    layers, dense_ffn = model.config.num_layers, lm.active_parameters(model)[0]
    first = max(1, args.eval_tokens // window) if args.eval_tokens else sys.maxsize
    ids = {text: held_back if text == HELD_BACK else read(text, "test") for text in args.eval}
    texts = [Text(Path(text).stem, lm.cut_windows(ids[text], window), []) for text in args.eval]
    for text in texts:
        for one in tqdm(text.windows[:first], desc=f"dense, {text.name}", unit="window"):
            text.dense.append(model.hidden_states(one[None])[0, :-1])
    for n, row in enumerate(sorted(rows, key=lambda row: not row.main)):  # what matters most first
        title = f"{n + 1}/{len(rows)} {row.name}, {row.percent} %"
        model, _ = lm.load_model(args.model, args.dtype, args.device)
        dense_ffns = [layer.mlp for layer in model.layers]
        split, start, dense = Split.parse(row.experts), time.perf_counter(), frozenset()
        windows = calib[: row.calib_windows]
        if row.layer:
            if len(windows) < row.calib_windows:
                print(f"warning: {args.calib} has {len(windows)} calibration windows, not {row.calib_windows}", file=sys.stderr)
            dense = replace_by_row(model, row, windows, title)
        seconds = time.perf_counter() - start
        is_oracle = any(isinstance(layer.mlp, Oracle) for layer in model.layers)
        if is_oracle:  # it computes everything; what it stands for is this
            sparse = (split.shared + split.active) / split.total
            active = (len(dense) + (layers - len(dense)) * sparse) / layers
        else:
            active = lm.active_parameters(model)[0] / dense_ffn
        key = row.key([text.name for text in texts], args.whole)
        result = {"key": key, "active_ffn": active, "calib_tokens": windows.numel(), "seconds": seconds}
        result["dense_layers"] = ffn2moe.format_layers(dense)
        if row.layer and not is_oracle:
            versions = {"dense": dense_ffns, "row": [layer.mlp for layer in model.layers]}
            speeds = ffn2moe.time_in_turns(model, texts[0].windows.flatten(), versions, args.turns)
            for i, what in enumerate(("prefill", "decode")):
                result[f"dense_{what}_ms"], result[f"{what}_ms"] = speeds["dense"][i], speeds["row"][i]
        result["texts"] = {}
        for text in texts[: len(key["texts"])]:
            bar = partial(tqdm, desc=f"{title}: {text.name}", unit="window")
            result["texts"][text.name] = evaluate(model, text, first, key["whole"] and text is texts[0], bar)
        add_row(file, done, result)
        print(f"{title}: {result['texts'][texts[0].name]['perplexity']:.2f}", flush=True)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, ["---"] + ["---:"] * (len(head) - 1), *lines])


def describe_split(result: dict) -> str:
    """Of a row: "S2A2E8, 0-8,25-29 dense"."""
    key, dense = result["key"], result.get("dense_layers", "none")
    if key["name"] == "dense":
        return ""
    return key["experts"] if dense == "none" else f"{key['experts']}, {dense} dense"


def speedup(result: dict, what: str) -> str:
    """Of a row over the dense model, where it was timed; what: prefill or decode."""
    return f"{result[f'dense_{what}_ms'] / result[f'{what}_ms']:.2f}x" if f"{what}_ms" in result else ""


def quality_table(done: dict) -> str:
    """Markdown: methods against sizes, the main methods in detail and on the other texts, the ablations."""
    results = {(r["key"]["name"], r["key"]["percent"]): r for r in done["rows"]}
    dense = results.get(("dense", 100))
    text, *others = done["settings"]["eval"]
    everything = quality_rows()
    order = [row for row in everything if (row.name, row.percent) in results]
    sizes = sorted({row.percent for row in order} - {100}, reverse=True)
    ppl = lambda r, text=text, key="perplexity": f"{r['texts'][text][key]:.2f}" if r and key in r["texts"].get(text, {}) else ""

    def pivot(names, text):
        lines = [["dense", *[ppl(dense, text)] * len(sizes)]] if dense else []
        lines += [[name, *(ppl(results.get((name, size)), text) for size in sizes)] for name in names]
        return markdown(["active FFN", *(f"{size} %" for size in sizes)], lines)

    timed = [[row.name, describe_split(r), f"{r['active_ffn']:.1%}", speedup(r, "prefill"), speedup(r, "decode"), ppl(r)]
             for row in order if (r := results[row.name, row.percent]).get("prefill_ms")]  # fmt: skip
    at_all_sizes = {row.name for row in everything if row.percent == 75}
    controls = list(dict.fromkeys(row.name for row in order if row.name in at_all_sizes))
    elsewhere = list(dict.fromkeys(row.name for row in order if (row.main or row.all_texts) and row.layer))
    tokens = done["settings"]["first_tokens"]
    parts = [f"Perplexity, {f'first {tokens:,}' if tokens else 'all'} tokens of {text}:\n\n" + pivot(controls, text)]
    lines = []
    for row in order:
        if row.main:
            r = results[row.name, row.percent]
            t = r["texts"][text]
            details = [f"{t['kl']:.3f}", f"{t['same_top']:.1%}", ppl(r), ppl(r, key="perplexity_whole")]
            lines.append([row.name, describe_split(r), f"{r['active_ffn']:.1%}", speedup(r, "prefill"), *details])
    head = ["", "split", "active FFN", "prefill", "KL to dense, nats", "same top token", "perplexity", "whole text"]
    parts.append(f"In detail ({text}):\n\n" + markdown(head, lines))
    for other in others:
        parts.append(f"Calibrated on {done['settings']['calib']}, evaluated on {other}:\n\n" + pivot(elsewhere, other))
    if timed:
        head = ["", "split", "active FFN", "prefill", "decode", "perplexity"]
        parts.append("Measured speed over the dense model, in turns with it:\n\n" + markdown(head, timed))
    ablations = []
    for row in order:
        if row.name not in ["dense", *controls]:
            r = results[row.name, row.percent]
            ablations.append([row.name, describe_split(r), f"{r['active_ffn']:.1%}", ppl(r)])
    if ablations:
        parts.append("Ablations:\n\n" + markdown(["", "split", "active FFN", "perplexity"], ablations))
    return "\n".join(parts)


PLOTTED = {
    "paper": ("#b03a2e", "o"),
    "static pruning": ("#999999", "s"),
    "static pruning, refit": ("#555555", "D"),
    "joint": ("#1f6fb4", "o"),
    "joint, E = 16": ("#5aa0d8", "v"),
    "joint, E = 8": ("#8ec6ee", "P"),
    "oracle router": ("#1f6fb4", "^"),
    "oracle neurons": ("#6a9e5c", "^"),
}


def plot_quality(done: dict, file: Path):
    """Perplexity against active FFN, a line per method and a panel per text; and on the first text against measured time."""
    texts = list(done["settings"]["eval"])
    figure = Figure(figsize=(4.6 * (1 + len(texts)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(texts), squeeze=False)[0]
    active = lambda r: r["active_ffn"]
    prefill = lambda r: r["prefill_ms"] / r["dense_prefill_ms"] if "prefill_ms" in r else None
    panels = [(text, active, "active FFN parameters / dense") for text in texts]
    panels.append((texts[0], prefill, "time of a prefill / dense"))
    for ax, (text, share, label) in zip(axes, panels):
        for name, (colour, marker) in PLOTTED.items():
            rows = [r for r in done["rows"] if r["key"]["name"] == name and text in r["texts"] and share(r)]
            points = sorted((share(r), r["texts"][text]["perplexity"]) for r in rows)
            dashes = "--" if name.startswith("oracle") else "-"
            if points:
                ax.plot(*zip(*points), dashes, marker=marker, color=colour, label=name, markersize=5)
        for r in done["rows"]:
            if r["key"]["name"] == "dense" and text in r["texts"]:
                ax.axhline(r["texts"][text]["perplexity"], color="black", linewidth=0.8, label="dense")
        ax.set(yscale="log", xlabel=label, ylabel="perplexity", title=text)
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Speed
#
# What is compared runs in turns, A B A B, so that whatever slows the machine down slows all of it alike.


def interleave(functions: dict[str, Callable], device: str, turns: int) -> dict[str, np.ndarray]:
    """Call the functions in turns, each for at least 20 ms -> the milliseconds per call in each turn. Of turns that take
    longer than 30 seconds there are three at most."""

    def run(function, calls=1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    ms = {name: run(function) for name, function in functions.items()}  # warm up
    ms = {name: first if device == "cpu" and first > 1000 else run(functions[name]) for name, first in ms.items()}
    calls = {name: max(1, round(20 / each)) for name, each in ms.items()}
    turns = min(turns, 3) if sum(ms.values()) > 30e3 else turns
    times = [[run(function, calls[name]) for name, function in functions.items()] for _ in range(turns)]
    return dict(zip(functions, np.array(times).T))


def peak_memory(function: Callable, device: str) -> float | None:
    """Bytes that a call needs at its peak beyond what was held before it; None where this cannot be told."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:  # Linux: the process gives back what it does not use, and its high-water mark is reset
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = lambda key: int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        before = status("VmRSS")
        function()
        return max(0, status("VmHWM") - before)
    except (OSError, AttributeError, TypeError):
        return None


def machine_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def random_ffn(hidden_size: int, spec: int | lm.MoESpec, like: Tensor) -> FFN | MoE:
    ffn = lm.make_ffn(hidden_size, spec).to(like).requires_grad_(False)
    for name, p in ffn.named_parameters():
        if not name.endswith(("router_scale", "router_bias")):
            p.normal_().div_(p.shape[-1] ** 0.5)
    return ffn


def random_layers(hidden_size: int, intermediate_size: int, split: Split, like: Tensor) -> tuple[FFN, MoE, FFN]:
    """A dense FFN of random weights, the same neurons in experts under a random router, and a static slice as wide as what
    runs of them."""
    ffn = random_ffn(hidden_size, intermediate_size, like)
    weight = torch.randn(split.routed, hidden_size).to(like)
    moe = ffn2moe.build_moe(ffn, bins_in_order(intermediate_size, split), {"router_weight": weight}, split)
    width = active_width(intermediate_size, split)
    return ffn, moe, narrow_ffn(ffn, torch.arange(width), ffn.down_proj[:, :width])


def plain_ffn(ffn: FFN, x: Tensor) -> Tensor:
    """A peer: the dense FFN as it is usually written."""
    return F.linear(F.silu(F.linear(x, ffn.gate_proj)) * F.linear(x, ffn.up_proj), ffn.down_proj)


def moe_by_grouped_mm(moe: MoE, x: Tensor) -> Tensor:
    """A peer: the same layer with PyTorch's own grouped product. x [T, D] -> [T, D]."""
    chosen, weights = moe.route(x)
    slots, counts = kernels.sort_by_expert(chosen, len(moe.spec.experts))
    tokens, ends = slots // chosen.shape[1], counts.cumsum(0).to(torch.int32)
    product = lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    h = kernels.swiglu(product(x.index_select(0, tokens), moe.gate_up_proj))
    return moe.shared_expert(x).index_add_(0, tokens, product(h * weights.flatten()[slots, None], moe.down_proj))


def transformers_layer(moe: MoE) -> nn.Module | None:
    """A peer, where it is installed: transformers' Qwen2-MoE layer with the same weights (its gate of 0 halves the shared expert)."""
    try:
        from transformers.models.qwen2_moe import (
            configuration_qwen2_moe,
            modeling_qwen2_moe,
        )
    except ImportError:
        return None
    (R, D, m), spec = moe.down_proj.shape, moe.spec
    sizes = {"hidden_size": D, "moe_intermediate_size": m, "shared_expert_intermediate_size": spec.shared}
    config = configuration_qwen2_moe.Qwen2MoeConfig(**sizes, num_experts=R, num_experts_per_tok=spec.active, norm_topk_prob=True)
    layer = modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config).to(moe.down_proj).requires_grad_(False).eval()
    state = {"gate.weight": moe.router_weight, "shared_expert_gate.weight": torch.zeros(1, D)}
    shared = moe.shared_expert
    state |= {"shared_expert.gate_proj.weight": shared.gate_proj, "shared_expert.up_proj.weight": shared.up_proj}
    state |= {"shared_expert.down_proj.weight": shared.down_proj}
    state |= {"experts.gate_up_proj": moe.gate_up_proj, "experts.down_proj": moe.down_proj}
    layer.load_state_dict(state)
    return layer


def faster(times: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where something was timed compiled too, the faster of the two, so that the dense model has its best as well."""
    best = lambda name: min(times[name], times.get(f"{name}, compiled", times[name]), key=np.median)
    return {name: best(name) for name in times if not name.endswith(", compiled")}


def speed_row(what, shape, tokens, batch, like, experts, ffns, times, peaks, weight_bytes) -> dict:
    """One row of the table from what the layers are (`ffns`, specs of model.py), the times of "dense", "MoE" and their peers,
    their peak memory and the bytes of weights that one token reads."""
    device, ms = str(like.device), {name: float(np.median(t)) for name, t in times.items()}
    low, mid, high = np.quantile(times["dense"] / times["MoE"], [0.25, 0.5, 0.75])
    speedup = ms["dense"] / ms["MoE"]
    ideal = sum(map(lm.neurons_of, ffns)) / sum(map(lm.active_neurons, ffns))
    machine = machine_name() if device == "cpu" else torch.cuda.get_device_name()
    row = {"what": what, "shape": shape, "tokens": tokens, "batch": batch, "dtype": str(like.dtype).removeprefix("torch.")}
    row |= {"experts": experts, "dense_layers": sum(isinstance(ffn, int) for ffn in ffns), "device": device}
    row |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0]}
    row |= {"dense_ms": ms["dense"], "moe_ms": ms["MoE"], "speedup": speedup}
    row |= {"ideal": ideal, "of_ideal": speedup / ideal, "spread": (high - low) / mid}
    for name in ("dense", "MoE"):
        row[f"{name.lower()}_peak_bytes"] = peaks[name]
        row[f"{name.lower()}_weight_bytes_per_token"] = weight_bytes[name]
    return row | {f"{name}_ms": ms[name] for name in ms if name in ("static", "plain_dense", "grouped_mm", "transformers")}


def ffn_speed(shape: str, tokens: int, split: Split, like: Tensor, turns: int) -> dict:
    """An FFN alone. For one token, as many copies as a large cache does not hold take turns, as the layers of a model do."""
    hidden_size, intermediate_size = map(int, shape.split("x"))
    bytes_of = lambda module: sum(p.numel() for p in module.parameters()) * like.element_size()
    x = torch.randn(tokens, hidden_size).to(like)
    layers = [random_layers(hidden_size, intermediate_size, split, like)]
    while tokens == 1 and len(layers) < 60 and len(layers) * bytes_of(layers[0][0]) < 2**28:
        layers.append(random_layers(hidden_size, intermediate_size, split, like))
    dense, moes, static = zip(*layers)
    copies = {name: [partial(ffn, x) for ffn in ffns] for name, ffns in (("dense", dense), ("MoE", moes), ("static", static))}
    copies["plain_dense"] = [partial(plain_ffn, ffn, x) for ffn in dense]
    if moes[0].down_proj.shape[-1] * like.element_size() % 16 == 0:  # what grouped_mm can do
        copies["grouped_mm"] = [partial(moe_by_grouped_mm, moe, x) for moe in moes]
    if peers := list(filter(None, map(transformers_layer, moes))):
        copies["transformers"] = [partial(peer, x[None]) for peer in peers]
    if tokens == 1 and kernels.can_compile(like.device.type):
        torch.compiler.reset()
        run = torch.compile(lambda ffn: ffn())
        for name in ("dense", "MoE", "static"):
            copies[f"{name}, compiled"] = [partial(run, ffn) for ffn in copies[name]]
            copies[f"{name}, compiled"][0]()  # the first takes as long as compiling does
    one_of = lambda turn: lambda: next(turn)()
    functions = {name: one_of(cycle(same)) for name, same in copies.items()}
    times = faster(interleave(functions, like.device.type, turns))
    moe = moes[0]
    idle = (split.routed - split.active) * (moe.gate_up_proj[0].numel() + moe.down_proj[0].numel()) * like.element_size()
    read = {"dense": bytes_of(layers[0][0]), "MoE": bytes_of(moe) - idle}
    peaks = {name: peak_memory(functions[name], like.device.type) for name in ("dense", "MoE")}
    return speed_row("ffn", shape, tokens, 1, like, str(split), [moe.spec], times, peaks, read)


def model_speed(models: dict[str, lm.Decoder], what: str, ids: Tensor, turns: int) -> list[dict]:
    """The whole model on ids [B, T], a row for each split: what = "prefill", to the logits of the last token; or "decode",
    a token at a time with a KV cache, the second half of ids after the first."""
    like, half = models["dense"].embed_tokens.weight, ids.shape[1] // 2

    def prefill(model):
        return model.logits(model.hidden_states(ids)[:, -1])

    def decode(model, cache, compiled=False):
        model.compiled = compiled
        for t in range(half, 2 * half):
            model(ids[:, t : t + 1], cache, t)

    bare = copy.deepcopy(models["dense"])  # without FFNs: what no conversion can make faster
    for layer in bare.layers:
        layer.mlp = nn.Identity()
    functions = {}
    for name, model in {**models, "bare": bare}.items():
        functions[name] = partial(prefill, model)
        if what == "decode":
            cache = model.new_cache(len(ids), 2 * half)
            model(ids[:, :half], cache)
            functions[name] = partial(decode, model, cache)
            if len(ids) <= kernels.FEW_TOKENS and kernels.can_compile(like.device.type):
                functions[f"{name}, compiled"] = partial(decode, model, cache, True)
                decode(model, cache, True)  # the first tokens take as long as compiling does
    times = faster(interleave(functions, like.device.type, turns))
    steps = half if what == "decode" else 1
    read = {name: lm.active_parameters(model)[1] * like.element_size() for name, model in models.items()}
    peaks = {name: peak_memory(functions[name], like.device.type) for name in models}
    rows = []
    for name, model in models.items():
        if name != "dense":
            pair = lambda of, name=name: {"dense": of["dense"], "MoE": of[name]}
            tokens = ids.shape[1] if what == "prefill" else half
            timed = pair({key: t / steps for key, t in times.items()})
            row = speed_row(what, "smollm2-135m", tokens, len(ids), like, name, model.config.ffns, timed, pair(peaks), pair(read))
            without = float(np.median(times["bare"])) / steps
            rows.append(row | {"bound": row["dense_ms"] / (without + (row["dense_ms"] - without) / row["ideal"])})
    return rows


@torch.no_grad()
def speed(args: argparse.Namespace):
    splits = [Split.parse(text) for text in args.experts]
    file = args.json and Path(args.json)
    found = lm.read_json(file) if file and file.exists() else []  # of other shapes or another machine, say
    key = lambda r: tuple(r[k] for k in ("what", "shape", "tokens", "batch", "dtype", "experts", "dense_layers", "machine"))
    rows = {key(r): r for r in found}

    def add(row):
        rows[key(row)] = row
        print(speed_table([row]).splitlines()[-1], flush=True)
        if file:
            lm.write_json(file, list(rows.values()))
            file.with_suffix(".md").write_text(f"{speed_overview(rows.values())}\n{speed_table(rows.values())}", encoding="utf-8")

    print(*speed_table([]).splitlines(), sep="\n")
    torch.manual_seed(0)
    for dtype in args.dtype:
        like = torch.empty(0, dtype=getattr(torch, dtype), device=args.device)
        for shape, tokens, experts in product(args.shape, args.tokens, splits):
            if "ffn" in args.what and shape != "smollm2-135m" and int(shape.split("x")[1]) % experts.total == 0:
                add(ffn_speed(shape, tokens, experts, like, args.turns))
        whole = [what for what in ("prefill", "decode") if what in args.what]
        if "smollm2-135m" in args.shape and whole:
            models = {"dense": lm.load_model(None, dtype, args.device)[0]}
            for experts in splits:
                model, tokenizer = lm.load_model(None, dtype, args.device)
                ids = lm.read_ids(model, tokenizer, "manual", "train")[:2048]
                models[str(experts)] = ffn2moe.convert(model, ids, experts, dense=args.dense)
            text = lm.read_ids(model, tokenizer, "manual", "test")
            for batch, what in product(args.batch, whole):
                length = 2048 if what == "prefill" else 256
                for row in model_speed(models, what, text[: batch * length].view(batch, length), args.turns):
                    add(row)
    if args.plot:
        plot_speed(list(rows.values()), Path(args.plot))


def milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def tokens_of(row: dict) -> str:
    return "1 token" if row["tokens"] == 1 else f"{row['tokens']:,} tokens"


def speed_overview(rows: Iterable[dict]) -> str:
    """Markdown: a line for each workload, a column for each split."""
    column = lambda r: r["experts"] + f", {r['dense_layers']} layers dense" * (r["dense_layers"] > 0)
    splits = {column(r): f"{column(r)}, ideal {r['ideal']:.2f}x" for r in rows}
    lines = {}
    for r in rows:
        where = f"FFN {r['shape']}" if r["what"] == "ffn" else f"{r['shape']} {r['what']}, batch {r['batch']}"
        name = f"{where}, {tokens_of(r)}, {r['dtype']}" + f", {r['device']}" * (r["device"] != "cpu")
        line = lines.setdefault(name, {"dense": []})
        line["dense"].append(r["dense_ms"])
        line[column(r)] = f"{r['speedup']:.2f}x " + (f"of {r['bound']:.2f}x" if "bound" in r else f"({r['of_ideal']:.0%})")
    cells = [[name, milliseconds(float(np.median(line["dense"]))), *(line.get(split, "") for split in splits)] for name, line in lines.items()]
    return markdown(["", "dense, ms", *splits.values()], cells)


def speed_table(rows: Iterable[dict]) -> str:
    """Markdown. Peers are given as speedups over dense too; the bound of a whole model is what it would reach if its FFNs
    were as fast as ideal."""
    head = ["what", "shape", "tokens", "batch", "dtype", "experts", "dense, ms", "MoE, ms", "speedup", "ideal", "of ideal", "spread", "bound"]
    head += ["static", "plain dense", "grouped_mm", "transformers", "peak memory", "weights read per token"]
    lines = []
    for r in rows:
        cells = [str(r[key]) for key in ("what", "shape", "tokens", "batch", "dtype", "experts")]
        cells += [milliseconds(r["dense_ms"]), milliseconds(r["moe_ms"]), f"{r['speedup']:.2f}x", f"{r['ideal']:.2f}x"]
        cells += [f"{r['of_ideal']:.1%}", f"{r['spread']:.1%}"]
        cells.append(f"{r['bound']:.2f}x" if "bound" in r else "")
        peers = ("static_ms", "plain_dense_ms", "grouped_mm_ms", "transformers_ms")
        cells += [f"{r['dense_ms'] / r[key]:.2f}x" if key in r else "" for key in peers]
        for key in ("peak_bytes", "weight_bytes_per_token"):
            pair = [r[f"{name}_{key}"] for name in ("dense", "moe")]
            cells.append("" if None in pair else f"{pair[0] / 1e6:,.0f} → {pair[1] / 1e6:,.0f} MB")
        lines.append(cells)
    return markdown(head, lines)


def plot_speed(rows: list[dict], file: Path):
    """Speedup against the active share of the FFN: a panel for the FFN alone, with the ideal line, and one for the whole model,
    with what each would be if its FFNs were ideal."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    for ax, whole in zip(figure.subplots(1, 2), (False, True)):
        series = {}
        for r in rows:
            if (r["what"] != "ffn") == whole:
                name = f"{r['what']}, batch {r['batch']}" if whole else f"{r['shape']}, {tokens_of(r)}"
                series.setdefault(f"{name}, {r['dtype']}", []).append((1 / r["ideal"], r["speedup"], r.get("bound")))
        for i, (name, points) in enumerate(series.items()):
            x = [share + (0.008 if whole else 0.003) * (i - len(series) / 2) for share, _, _ in points]  # so that they do not hide each other
            ax.plot(x, [speedup for _, speedup, _ in points], "osD^v<>p"[i % 8], label=name, markersize=5)
            if whole:
                ax.plot(x, [bound for _, _, bound in points], "_", color="black", label="with ideal FFNs" if i == 0 else None)
        if not whole:
            share = np.linspace(0.2, 1, 100)
            ax.plot(share, 1 / share, color="black", linewidth=0.8, label="ideal, 1 / share")
        ax.axhline(1, color="#999999", linewidth=0.8)
        title = "whole model" if whole else "FFN alone"
        ax.set(xlabel="(S + A) / E", ylabel="speedup over dense", title=title, xlim=(0.2, 1.02))
        ax.grid(alpha=0.3)
        if series or not whole:
            ax.legend(fontsize=8, loc="upper right")
    figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Fine-tuning


RECIPE = ("samples", "length", "rate", "distill", "dropout", "scale_rate", "bias_step")  # settings of train.py that are flags here too


def finetune_rows(s: SimpleNamespace) -> list[tuple[str, Row, dict]]:
    """(name, how to convert, settings of train.py that differ from s): the methods at three sizes, then ablations at one.

    The dense model learns the text, is converted as the row says, and teaches the converted one. Rows without a teacher
    (distill = 0) are in the paper's order: the dense model is converted, and the result learns the text.
    """
    rows = {(row.name, row.percent): row for row in quality_rows()}
    joint = rows["joint", 50]
    main = lambda percent: [(name, rows[name, percent], {}) for name in ("static pruning, refit", "paper", "joint")]

    def switched(what, name, on):  # off, if the recipe has it on
        value = getattr(s, name)
        return (f"joint, no {what}", joint, {name: 0.0}) if value else (f"joint, with {what}", joint, {name: on})

    ablations = [
        switched("balancing", "bias_step", 0.02),
        switched("gate scales", "scale_rate", 1e-3),
        switched("dropout", "dropout", 0.1),
        ("joint, router trained too", joint, {"router": True}),
        ("joint, in the paper's order", joint, {"distill": 0.0}),
        ("joint, router learned from nothing", joint._replace(layer=blank_router_layer), {"router": True}),
        ("paper, no shared expert", rows["paper, no shared expert", 50], {}),
    ]
    return [("dense", rows["dense", 100], {}), *main(75), *main(25), *main(50), *ablations]  # which begin as the last one


def blank_router_layer(ffn: FFN, x: Tensor, split: Split) -> MoE:
    """The joint method's experts, as they are, under a router that has everything to learn."""
    moe = joint_layer(ffn, x, split)
    weight = torch.randn(moe.router_weight.shape, generator=torch.Generator().manual_seed(0))
    moe.router_weight.copy_(ffn2moe.ROUTER_SCALE * weight / len(x[0]) ** 0.5)
    return moe


def finetune(args: argparse.Namespace):
    file = Path(args.json)
    s = train.settings(**{name: getattr(args, name) for name in (*RECIPE, "seed")})
    settings = {"model": args.model or Path(lm.WHEEL_MEMBER).name, "dtype": args.dtype, "device": args.device}
    settings |= {"text": Path(args.text).stem, "eval": Path(args.eval).stem, "eval_tokens": args.eval_tokens, **vars(s)}
    done = read_results(file, settings)
    rows = finetune_rows(s)
    check_only(args.only, {name for name, _, _ in rows})
    rows = [row for row in rows if args.only is None or row[0] in args.only]
    dense, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    ids = lm.read_ids(dense, tokenizer, args.text, "train")
    window = min(2048, dense.config.max_position_embeddings)
    if args.eval == HELD_BACK:
        ids, eval_ids = hold_back(ids, window)
    else:
        eval_ids = lm.read_ids(dense, tokenizer, args.eval, "test")
    calib = lm.cut_windows(ids, window)
    calib = ffn2moe.draw(calib, len(calib), args.seed)
    tuned, last = None, (None, None, None)  # the dense model after its fine-tune; the last conversion, and its perplexity
    for n, (name, row, changes) in enumerate(rows):
        key = {"name": name, "percent": row.percent, "experts": row.experts, "dense": row.dense, **changes}
        if key in [r["key"] for r in done["rows"]]:
            continue
        title = f"{n + 1}/{len(rows)} {name}, {row.percent} %"
        bar = partial(tqdm, desc=f"{title}: evaluate", unit="window")
        measure = partial(lm.perplexity, ids=eval_ids[: args.eval_tokens or None], window=window, progress=bar)
        mine = train.settings(**vars(s) | changes)
        taught = row.layer and mine.distill
        if taught and tuned is None:
            tuned = copy.deepcopy(dense)
            train.finetune(tuned, ids, s)
        source = tuned if taught else dense
        if last[0] != (row, source):  # several rows may begin with it
            model = copy.deepcopy(source)
            if row.layer:
                replace_by_row(model, row, calib[: row.calib_windows], title)
            last = (row, source), model, measure(model)
        model, before = copy.deepcopy(last[1]), last[2]
        result = {"key": key, "active_ffn": lm.active_parameters(model)[0] / lm.active_parameters(dense)[0], "before": before}
        start = time.perf_counter()
        log = train.finetune(model, ids, mine, teacher=tuned if taught else None)
        result |= {"seconds": time.perf_counter() - start, "after": measure(model)}
        tuned = model if not row.layer else tuned
        tenth = len(log["loss"]) // 10 + 1
        result |= {key: [float(np.mean(log[key][:tenth])), float(np.mean(log[key][-tenth:]))] for key in ("loss", "imbalance")}
        add_row(file, done, result)
        print(f"{title}: {result['before']:.2f} -> {result['after']:.2f}", flush=True)
    publish(file, finetune_table(done))


def finetune_table(done: dict) -> str:
    """Markdown: perplexity before → after, in brackets the latter over that of the dense model after its own fine-tune: methods
    by size, then the ablations with the load of their experts at first and at last."""
    results = {(r["key"]["name"], r["key"]["percent"]): r for r in done["rows"]}
    dense, main = results.get(("dense", 100)), ["static pruning, refit", "paper", "joint"]
    over_dense = lambda r: f" ({r['after'] / dense['after']:.2f})" if dense else ""
    cell = lambda r: f"{r['before']:.2f} → {r['after']:.2f}" + over_dense(r) if r else ""
    imbalance = lambda r: " → ".join(f"{load:.2f}" for load in r["imbalance"])
    lines = [[name, *(cell(results.get((name, percent))) for percent in (75, 50, 25))] for name in main]
    ablations = [[name, cell(r), imbalance(r)] for (name, percent), r in results.items() if percent == 50 and r["imbalance"][0]]
    tables = markdown(["active FFN", "75 %", "50 %", "25 %"], [["dense", *[cell(dense)] * 3], *lines])
    return tables + "\n" + markdown(["at 50 %", "perplexity", "load, max / mean"], ablations)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Two levels


def ffn_levels(levels: list[str], like: Tensor, turns: int, hidden_size=2048, intermediate_size=8192) -> list[dict]:
    """A random FFN on 2,048 tokens, split once and twice."""
    one = lm.split_spec(intermediate_size, levels[0], "linear")
    two = lm.split_spec(one, levels[1], "linear")
    x, specs = torch.randn(2048, hidden_size).to(like), {"dense": intermediate_size, "one level": one, "two levels": two}
    functions = {name: partial(random_ffn(hidden_size, spec, like), x) for name, spec in specs.items()}
    ms = {name: float(np.median(t)) for name, t in interleave(functions, like.device.type, turns).items()}
    ideal = {name: intermediate_size / lm.active_neurons(spec) for name, spec in specs.items()}
    dtype = str(like.dtype).removeprefix("torch.")
    return [{"dtype": dtype, "name": name, "ms": ms[name], "speedup": ms["dense"] / ms[name], "ideal": ideal[name]} for name in specs]


@torch.no_grad()
def levels(args: argparse.Namespace):
    """A model that was converted, one whose experts were converted again, and one that is as sparse in one level."""
    chosen = {"one level": args.levels[:1], "two levels": args.levels, "one level, as sparse": [args.flat]}
    dense, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    like, window = dense.embed_tokens.weight[:0], min(2048, dense.config.max_position_embeddings)
    calib, text = (lm.read_ids(dense, tokenizer, *source) for source in ((args.calib, "train"), (args.eval, "test")))
    calib = ffn2moe.draw(lm.cut_windows(calib, window), 32, args.seed)
    models, results = {"dense": dense}, []
    for name, splits in chosen.items():
        models[name] = copy.deepcopy(dense)
        for split in splits:
            bar = partial(tqdm, desc=f"{name}, {split}: convert", unit="layer")
            ffn2moe.convert(models[name], calib, split, dense=args.dense, progress=bar)
    speeds = {row["experts"]: row for row in model_speed(models, "prefill", text[None, :window], args.turns)}
    for name, model in models.items():
        used, parameters = lm.active_parameters(model)
        result = {"name": name, "splits": chosen.get(name, []), "ffn_parameters": used, "parameters": parameters}
        bar = partial(tqdm, desc=f"{name}: evaluate", unit="window")
        result["perplexity"] = lm.perplexity(model, text[: args.eval_tokens or None], window, bar)
        result |= {key: speeds[name][key] for key in ("speedup", "bound", "dense_ms", "machine") if name in speeds}
        results.append(result)
    alone = [row for dtype in (torch.float32, torch.bfloat16) for row in ffn_levels(args.levels, like.to(dtype), args.turns)]
    done = {"settings": plain_settings(args), "rows": results, "ffn": alone}
    lm.write_json(Path(args.json), done)
    publish(Path(args.json), levels_table(done))


def plain_settings(args: argparse.Namespace) -> dict:
    """The arguments, files by their names alone."""
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    return settings | {key: Path(settings[key]).name for key in ("model", "calib", "eval") if settings.get(key)}


def levels_table(done: dict) -> str:
    """Markdown, of the model and of an FFN alone."""
    dense, lines = done["rows"][0], []
    for r in done["rows"]:
        cells = [r["name"], ", then ".join(r["splits"]), f"{r['ffn_parameters'] / dense['ffn_parameters']:.1%}", f"{r['parameters']:,}"]
        lines.append([*cells, f"{r['perplexity']:.2f}", f"{r['speedup']:.2f}x of {r['bound']:.2f}x" if "speedup" in r else ""])
    table = markdown(["", "split", "active FFN", "active parameters", "perplexity", "prefill"], lines) + "\n"
    cells = [[r["dtype"], r["name"], milliseconds(r["ms"]), f"{r['speedup']:.2f}x", f"{r['ideal']:.2f}x"] for r in done["ffn"]]
    return table + markdown(["FFN 2048x8192", "", "ms", "speedup", "ideal"], cells)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Memory


def memory(args: argparse.Namespace):
    """What a conversion needs at its peak beyond the model, on one of random weights. Layers are converted one by one, so
    that a few of a large model's are enough to tell."""
    if peak_memory(lambda: None, args.device) is None:
        raise InputError("the peak memory of a process can only be told on Linux")
    hidden_size, intermediate_size = map(int, args.shape.split("x"))
    heads = hidden_size // 64
    raw = {"model_type": "llama", "vocab_size": args.vocab_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    raw |= {"num_hidden_layers": args.layers, "tie_word_embeddings": True}
    raw |= {"num_attention_heads": heads, "num_key_value_heads": heads if heads % 4 else heads // 4}
    with torch.device("meta"):
        model = lm.Decoder(lm.parse_config(raw)).bfloat16().requires_grad_(False)
    for weight in model.to_empty(device=args.device).parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5) if weight.dim() > 1 else weight.fill_(1)
    size, start = sum(weight.nbytes for weight in model.parameters()), time.perf_counter()
    ids = torch.randint(model.config.vocab_size, (args.calib_tokens // 2048, 2048))
    bar = partial(tqdm, desc="converting", unit="layer")
    extra = peak_memory(lambda: ffn2moe.convert(model, ids, args.experts, dense=args.dense, progress=bar), args.device)
    result = {"settings": plain_settings(args), "model_bytes": size, "extra_bytes": extra, "seconds": time.perf_counter() - start}
    print(f"model {size / 1e9:.2f} GB, conversion {extra / 1e9:.2f} GB more: {1 + extra / size:.2f} times the model")
    print(f"{result['seconds']:.0f} seconds")
    if args.json:
        lm.write_json(Path(args.json), result)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Figures


def plot_partition(ffn: FFN, x: Tensor, split: Split, file: Path):
    """What the router's first choice says about where a token's energy is, before and after the joint alternation."""
    R, x = split.routed, ffn2moe.draw(x, ffn2moe.SAMPLE_TOKENS)
    energy = ffn2moe.in_blocks(lambda block: ffn2moe.contribution_energy(ffn2moe.hidden(ffn, block), ffn.down_proj), x, ffn.down_proj.shape[1])
    figure = Figure(figsize=(7.6, 3.7), layout="constrained")
    bins = {"before": ffn2moe.first_bins(energy, split), "after": partition_and_router(ffn, x, split)[0]}
    for ax, (when, bin_of) in zip(figure.subplots(1, 2), bins.items()):
        norms = ffn2moe.expert_norms(energy, bin_of, R)
        scores = x @ ffn2moe.ridge_router(energy, x, bin_of, R)["router_weight"].T
        chosen = scores.topk(split.active, dim=-1).indices
        gain = ffn2moe.energy_gain(energy, ffn2moe.active_bins(chosen, R))  # [q, 1 + R]
        captured = ffn2moe.captured_energy(gain, bin_of) / gain[:, 0].sum(dtype=torch.float64).item()
        first = F.one_hot(chosen[:, 0], R).float()  # [T, R]
        mean = first.T @ norms.square() / first.sum(dim=0).clamp_min(1)[:, None] / norms.square().mean(dim=0)
        order = mean.diagonal().argsort(descending=True)
        mean[first.sum(dim=0) == 0] = torch.nan  # nobody's first choice: grey
        image = ax.imshow(mean[order][:, order].log2().clamp(-2, 2).cpu().numpy(), cmap="RdBu_r", vmin=-2, vmax=2)
        ax.set_facecolor("#bbbbbb")
        ax.set_title(f"{when}: {captured:.0%} of the energy runs", fontsize=9)
        ax.set(xlabel="expert", xticks=[], yticks=[])
    figure.axes[0].set_ylabel("tokens whose first choice is this expert")
    ticks = {-2: "1/4", -1: "1/2", 0: "1", 1: "2", 2: "4"}
    bar = figure.colorbar(image, ax=figure.axes, ticks=list(ticks))
    bar.set_ticklabels(list(ticks.values()))
    bar.set_label("expert's energy / its mean")
    figure.savefig(file, dpi=120)


def plot_words(model: lm.Decoder, tokenizer: Tokenizer, shown: Tensor, words: list[list[str]], layer: int, file: Path):
    """Which routed experts run for the tokens of a text [T], and which words each is for."""
    R = len(words)
    ran = F.one_hot(ffn2moe.chosen_experts(model, shown[None], layer), R).sum(dim=1).T.cpu()  # [R, T]
    figure = Figure(figsize=(3.4 + 0.24 * len(shown), 1.2 + 0.19 * R), layout="constrained")
    ax = figure.subplots()
    ax.imshow(ran.numpy(), cmap="Blues", aspect="auto", vmax=1.4)
    ax.set_xticks(range(len(shown)), [tokenizer.decode([i]).strip() for i in shown.tolist()], rotation=90, fontsize=8)
    ax.set_yticks(range(R), [", ".join(of[:5]) for of in words], fontsize=7)
    ax.set_xticks([i + 0.5 for i in range(len(shown) - 1)], minor=True)
    ax.set_yticks([e + 0.5 for e in range(R - 1)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.set_ylabel("routed expert: the words that it is for", fontsize=9)
    figure.savefig(file, dpi=120)


@torch.no_grad()
def figures(args: argparse.Namespace):
    """The three figures of the README, from one conversion."""
    out, split = Path(args.out), Split.parse(args.experts)
    lm.check_writable(out / "x.png")
    model, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    dense = ffn2moe.parse_layers(args.dense)
    if not {args.layer, *args.layers} <= set(range(len(model.layers))) or args.layer in dense:
        raise InputError(f"--layer and --layers: the model has {len(model.layers)}, of which {args.dense} stay dense")
    window = min(2048, model.config.max_position_embeddings)
    calib, test = (lm.cut_windows(lm.read_ids(model, tokenizer, *source), window) for source in ((args.calib, "train"), (args.eval, "test")))
    out.mkdir(parents=True, exist_ok=True)
    reports = []

    def replacement(i, ffn, x):
        if i in args.layers:
            markers = ffn2moe.neuron_markers(ffn, ffn2moe.draw(x, ffn2moe.SAMPLE_TOKENS), 10)
            bin_of, _ = ffn2moe.partition_neurons(markers, split)
            reports.append(ffn2moe.LayerReport(i, bin_of, ffn2moe.activation_rates(markers), None))
        if i == args.layer:
            plot_partition(ffn, x, split, out / "partition.png")
        return ffn if i in dense else joint_layer(ffn, x, split)

    windows = ffn2moe.draw(calib, 32, seed=0)
    bar = partial(tqdm, desc="converting", unit="layer")
    ffn2moe.replace_ffns(model, windows, replacement, progress=bar)
    ffn2moe.plot_rates(reports, out / "activation_rates.png")
    words = ffn2moe.words_of_experts(model, tokenizer, test[:20], args.layer)
    shown = lm.as_ids(model, lm.encode(tokenizer, args.text))
    plot_words(model, tokenizer, shown, words, args.layer, out / "words.png")
    print(ffn2moe.explain(model, tokenizer, shown, words, args.layer))


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality and speed of the conversion, beside its controls.")
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "a text file, 'wikitext2' or 'manual', as for ffn2moe.py"
    shared = {
        "model": {"metavar": "SOURCE", "help": "as for ffn2moe.py; splits are chosen for the default, SmolLM2"},
        "calib": {"default": "manual", "metavar": "TEXT", "help": f"calibration text: {text} (%(default)s)"},
        "eval": {"default": "manual", "metavar": "TEXT", "help": "evaluation text (%(default)s)"},
        "eval-tokens": {"type": int, "default": 10 * 2048, "metavar": "N", "help": "first N tokens of it; 0: all (%(default)s)"},
        "only": {"nargs": "+", "metavar": "ROW", "help": "only the rows of these names"},
        "dense": {"default": "none", "metavar": "LAYERS", "help": "that stay so, as for ffn2moe.py (%(default)s)"},
        "turns": {"type": int, "default": 5, "help": "of which the median is taken (%(default)s)"},
        "dtype": {"choices": ["float32", "bfloat16"], "default": "bfloat16", "help": "(%(default)s)"},
        "device": {"default": device, "help": "(here: %(default)s)"},
        "seed": {"type": int, "default": 0, "help": "picks the calibration windows (%(default)s)"},
    }

    def command(name, what, flags, **changes):
        add = commands.add_parser(name, help=what).add_argument
        for flag in flags.split():
            add(f"--{flag}", **shared[flag] | changes.get(flag.replace("-", "_"), {}))
        return add

    several = {"nargs": "+", "default": ["manual"], "help": f"evaluation texts; {HELD_BACK}: the end of the calibration text (manual)"}
    add = command("quality", "perplexity, KL divergence and agreement at 75, 50 and 25 %% active FFN",
                  "model calib eval eval-tokens only turns dtype device seed", eval=several, turns={"default": 3},
                  dtype={"choices": ["float32", "bfloat16", "float16"]})  # fmt: skip
    add("--whole", action="store_true", help="the main rows on the whole of the first text as well")
    add("--window", type=int, default=2048, metavar="N", help="tokens per sequence (%(default)s)")
    add("--json", default="quality.json", metavar="FILE", help="raw results; table and plot beside it (%(default)s)")

    both = {"nargs": "+", "default": ["float32", "bfloat16"], "help": "(both)"}
    add = command("speed", "dense FFN layers and models against converted ones", "dense turns dtype device",
                  turns={"default": 9}, dtype=both)  # fmt: skip
    shapes = ["576x1536", "2048x8192", "smollm2-135m"] + ["4096x11008"] * (device == "cuda")
    tokens = [1, 1024, 2048, 4096, 8192, 16384] if device == "cuda" else [1, 2048]
    kinds = ["ffn", "prefill", "decode"]
    splits = ["S3A3E8", "S8A4E16", "S4A4E16", "S2A2E8", "S2A2E16"]
    add("--what", nargs="+", choices=kinds, default=kinds, help="FFNs alone; the model on 2,048 tokens; one token at a time (all)")
    add("--shape", nargs="+", default=shapes, help=f"FFNs of DxQ, or the whole model 'smollm2-135m' (here: {' '.join(shapes)})")
    add("--tokens", nargs="+", type=int, default=tokens, help=f"for the FFNs (here: {' '.join(map(str, tokens))})")
    add("--batch", nargs="+", type=int, default=[1, 8], help="sequences at a time, for the model (1 8)")
    add("--experts", nargs="+", default=splits, metavar="SnAnEn", help=f"({' '.join(splits)})")
    add("--json", metavar="FILE", help="write the rows, beside those of other runs; a table beside it")
    add("--plot", metavar="FILE", help="draw speedup against active share, a PNG")

    add = command("finetune", "perplexity before and after the fine-tune of train.py, the dense model's too",
                  "model eval eval-tokens only dtype device seed", eval_tokens={"default": 0},
                  only={"help": "only the rows of these names (the dense model learns first in any case)"},
                  seed={"help": "of the calibration windows, and of train.py (%(default)s)"})  # fmt: skip
    add("--text", default="manual", help=f"for calibration and fine-tuning: {text} (%(default)s)")
    train.add_settings(add, RECIPE)
    add("--json", default="finetune.json", metavar="FILE", help="raw results; a table beside it (%(default)s)")

    add = command("levels", "a conversion of a conversion, beside one in one level",
                  "model calib eval eval-tokens dense turns dtype device seed", dense={"default": "0-2"})  # fmt: skip
    add("--levels", nargs=2, default=["S2A4E8", "S3A3E8"], metavar="SnAnEn", help="of all FFNs, and of each expert (S2A4E8 S3A3E8)")
    add("--flat", default="S9A9E32", metavar="SnAnEn", help="one level that is as sparse (%(default)s)")
    add("--json", default="levels.json", metavar="FILE", help="raw results; a table beside it (%(default)s)")

    add = command("memory", "peak memory of a conversion, of a model of random weights", "dense device", dense={"default": "0-3"})
    add("--shape", default="2048x8192", metavar="DxQ", help="of its FFNs (%(default)s, with the rest as in Llama-3.2-1B)")
    add("--layers", type=int, default=16, metavar="N", help="(%(default)s)")
    add("--vocab-size", type=int, default=128256, metavar="N", help="(%(default)s)")
    add("--calib-tokens", type=int, default=32 * 2048, metavar="N", help="(%(default)s)")
    add("--experts", default="S10A10E32", metavar="SnAnEn", help="(%(default)s)")
    add("--json", metavar="FILE", help="write the result")

    add = command("figures", "the pictures of the README", "model calib eval dense dtype device", dense={"default": "0-2"})
    add("--experts", default="S7A7E32", metavar="SnAnEn", help="(%(default)s)")
    add("--layer", type=int, default=15, metavar="N", help="for partition and words (%(default)s)")
    add("--layers", type=int, nargs="+", default=[0, 15, 29], metavar="N", help="for activation rates (0 15 29)")
    sentences = "The river rose in 1913, and the old bridge was carried away by the water. She sings better than he does."
    add("--text", default=sentences, help="to show the experts of (%(default)s)")
    add("--out", default="figures", metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    jobs = {"quality": quality, "speed": speed, "finetune": finetune, "levels": levels, "memory": memory, "figures": figures}
    return lm.run_command("bench", lambda: jobs[args.command](args))


if __name__ == "__main__":
    sys.exit(main())
