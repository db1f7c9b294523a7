"""Measure what a conversion costs in quality, beside the controls that it has to beat.

    python bench.py quality --calib wikitext2 --eval wikitext2 manual

Each row converts the model anew in one way and evaluates it: `quality_rows` lists them, and the functions above it are
the controls that ffn2moe.py has no use for. Raw results go to a JSON file after each row, and a run that is cut off goes
on from there; the Markdown table and the plot (perplexity against active FFN) are made from that file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import ffn2moe
import model as lm
from ffn2moe import joint_layer, joint_moe, joint_partition, paper_layer, refit_moe
from model import FFN, Experts, InputError

# ----------------------------------------------------------------------------------------------------------------------
# Controls. Each takes an FFN, its inputs x [T, D] and a split, and returns what stands for the FFN.


def total_energy(ffn: FFN, x: torch.Tensor) -> torch.Tensor:
    """Squared contribution of each neuron, summed over all tokens: [q]."""
    blocks = x.split(ffn2moe.BLOCK)
    return sum(ffn2moe.contribution_energy(ffn, ffn2moe.hidden(ffn, block)).sum(dim=0) for block in blocks)


def static_layer(ffn: FFN, x: torch.Tensor, experts: Experts, refit: bool) -> FFN:
    """Static pruning: the S + A slices of neurons of largest mean squared contribution, for every token the same."""
    width = (experts.shared + experts.active) * lm.expert_size(ffn.gate_proj.out_features, experts)
    keep = total_energy(ffn, x).topk(width).indices
    down = ffn.down_proj.weight
    if refit:
        bin_of = torch.ones_like(down[0], dtype=torch.long).index_fill_(0, keep, 0)
        always = lambda block: torch.tensor([1.0, 0.0], device=x.device).expand(len(block), 2)
        down = ffn2moe.refit_down(ffn, x, always, bin_of).to(down)
    small = FFN(ffn.gate_proj.in_features, width).to(x).requires_grad_(False)
    small.gate_proj.weight.copy_(ffn.gate_proj.weight[keep])
    small.up_proj.weight.copy_(ffn.up_proj.weight[keep])
    small.down_proj.weight.copy_(down[:, keep])
    return small


def random_layer(ffn: FFN, x: torch.Tensor, experts: Experts) -> nn.Module:
    """The joint method's router and refit on a partition that is drawn by lot."""
    m = lm.expert_size(ffn.gate_proj.out_features, experts)
    bins = torch.arange(experts.total).sub(experts.shared - 1).clamp_min(0).repeat_interleave(m)
    bins = bins[torch.randperm(len(bins), generator=torch.Generator().manual_seed(0))]
    moe, partition = joint_moe(ffn, x, experts, bins.to(x.device))
    refit_moe(ffn, moe, x, partition)
    return moe


def paper_refit_layer(ffn: FFN, x: torch.Tensor, experts: Experts) -> nn.Module:
    """The paper's partition and router, and the refit."""
    moe, partition = paper_layer(ffn, x, experts)
    refit_moe(ffn, moe, x, partition)
    return moe


class Oracle(nn.Module):
    """An FFN of which those neurons run that `active` says, given all of the hidden h: [T, q] -> [T, q].

    It computes all of h first: something to compare with, not to use.
    """

    def __init__(self, ffn: FFN, active: Callable, down: torch.Tensor | None = None):
        super().__init__()
        self.ffn, self.active, self.down = ffn, active, ffn.down_proj.weight if down is None else down

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        h = ffn2moe.hidden(self.ffn, x)
        return F.linear((h * self.active(h)).to(x), self.down).view(shape)


def oracle_router_layer(ffn: FFN, x: torch.Tensor, experts: Experts) -> Oracle:
    """The joint partition under a router that knows how much energy each expert has, refitted under its choices."""
    bin_of = joint_partition(ffn, x, experts)

    def active(h):
        norms = ffn2moe.expert_norms(ffn2moe.contribution_energy(ffn, h), bin_of, experts.routed)
        return ffn2moe.active_bins(norms.topk(experts.active, dim=-1).indices, experts.routed)

    down = ffn2moe.refit_down(ffn, x, lambda block: active(ffn2moe.hidden(ffn, block)), bin_of)
    return Oracle(ffn, lambda h: active(h)[:, bin_of], down.to(x))


def oracle_neurons_layer(ffn: FFN, x: torch.Tensor, experts: Experts) -> Oracle:
    """For each token the neurons that contribute most, no experts, no refit."""
    width = (experts.shared + experts.active) * lm.expert_size(ffn.gate_proj.out_features, experts)
    top = lambda h: ffn2moe.contribution_energy(ffn, h).topk(width, dim=-1).indices
    return Oracle(ffn, lambda h: torch.zeros_like(h).scatter_(1, top(h), 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# The rows


class Row(NamedTuple):
    """One way to convert: layer(ffn, x [T, D], experts) in all layers but the first `first_dense`."""

    name: str
    percent: int  # of the FFN that is meant to be active
    layer: Callable
    experts: str
    first_dense: int = 0
    calib_windows: int = 32
    all_texts: bool = False  # evaluated on every text, not on the first only
    main: bool = False  # and, with --whole, on the whole of the first

    def key(self, texts: list[str], whole: bool) -> dict:
        """What a result must agree in to stand for this row."""
        key = {"name": self.name, "percent": self.percent, "experts": self.experts, "first_dense": self.first_dense}
        texts = texts if self.all_texts or self.main else texts[:1]
        return key | {"calib_windows": self.calib_windows, "texts": texts, "whole": whole and self.main}


def quality_rows() -> list[Row]:
    """The controls at three sizes, then the ablations at one of them.

    Splits of the joint rows: E = 32, S about A, and as many dense layers as did best on held-back windows of training text
    (--eval held-back), for no more parameters than the paper's rows have, routers included.
    """
    paper = lambda *args, **kwargs: paper_layer(*args, **kwargs)[0]
    joint = lambda *args, **kwargs: joint_layer(*args, **kwargs)[0]
    no_refit = lambda ffn, x, experts: joint_moe(ffn, x, experts, joint_partition(ffn, x, experts))[0]
    unified = lambda ffn, x, split: paper(ffn, x, Experts(0, split.shared + split.active, split.total))
    rows = [Row("dense", 100, None, "S1A1E2", main=True)]
    for percent, paper_split, even, split, first in (
        (75, "S3A3E8", "S12A12E32", "S10A10E32", 9),
        (50, "S2A2E8", "S8A8E32", "S7A7E32", 3),
        (25, "S2A2E16", "S4A4E32", "S4A3E32", 1),
    ):
        rows += [
            Row("paper", percent, paper, paper_split, calib_windows=8, main=True),
            Row("static pruning", percent, partial(static_layer, refit=False), even, all_texts=True),
            Row("static pruning, refit", percent, partial(static_layer, refit=True), even, main=True),
            Row("static pruning, refit, first layers dense", percent, partial(static_layer, refit=True), split, first),
            Row("paper, refit, first layers dense", percent, paper_refit_layer, split, first),
            Row("random partition, ridge router, refit", percent, random_layer, split, first),
            Row("joint, all layers alike", percent, joint, even),
            Row("joint, no refit", percent, no_refit, split, first, all_texts=True),
            Row("joint", percent, joint, split, first, main=True),
            Row("oracle router", percent, oracle_router_layer, split, first),
            Row("oracle neurons", percent, oracle_neurons_layer, even),
        ]
    return rows + [
        Row("paper, no shared expert", 50, unified, "S2A2E8", calib_windows=8),
        Row("paper, K_a = 50", 50, partial(paper, k_act=50), "S2A2E8", calib_windows=8),
        Row("paper, K_a = 200", 50, partial(paper, k_act=200), "S2A2E8", calib_windows=8),
        Row("paper, 4 assignment rounds", 50, partial(paper, rounds=4), "S2A2E8", calib_windows=8),
        Row("paper, 32 calibration windows", 50, paper, "S2A2E8", calib_windows=32),
        Row("joint, no alternation", 50, partial(joint, rounds=0), "S7A7E32", 3),
        Row("joint, 1 round", 50, partial(joint, rounds=1), "S7A7E32", 3),
        Row("joint, 8 calibration windows", 50, joint, "S7A7E32", 3, calib_windows=8),
        Row("joint, 64 calibration windows", 50, joint, "S7A7E32", 3, calib_windows=64),
        Row("joint, all layers alike, E = 16", 50, joint, "S4A4E16"),
        Row("joint, all layers alike, E = 8", 50, joint, "S2A2E8"),
        Row("joint, more shared", 50, joint, "S11A3E32", 3),
        Row("joint, more routed", 50, joint, "S3A11E32", 3),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


HELD_BACK = "held-back"  # the name of the last windows of the calibration text, on which settings are chosen


class Text(NamedTuple):
    name: str
    windows: torch.Tensor  # [N, T]
    dense: list[torch.Tensor]  # what the dense model puts out before its unembedding, [T, D] for the first windows


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


def read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError:
        raise InputError(f"{file} is not a JSON file that this program wrote; delete it to start over") from None


def quality(args):
    rows = [row for row in quality_rows() if args.only is None or row.name in args.only]
    if args.only and set(args.only) - {row.name for row in rows}:
        raise InputError(f"--only: no such row; there are {sorted({row.name for row in quality_rows()})}")
    file, names = Path(args.json), [Path(text).stem for text in args.eval]
    if len(set(names)) < len(names):
        raise InputError("two evaluation texts have the same name")
    settings = {"model": args.model or Path(lm.WHEEL_MEMBER).name, "dtype": args.dtype, "device": args.device, "seed": args.seed}
    settings |= {"calib": Path(args.calib).stem, "eval": names, "first_tokens": args.eval_tokens, "window": args.window}
    done = read_json(file) or {"settings": settings, "rows": []}
    if done["settings"] != settings:
        raise InputError(f"{file} was made with other settings, {done['settings']}: choose another --json")
    keys = [r["key"] for r in done["rows"]]
    pending = [row for row in rows if row.key(names, args.whole) not in keys]
    if pending:
        measure_rows(args, pending, done, file)
    table = quality_table(done)
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    plot_quality(done, file.with_suffix(".png"))
    print(table)


def measure_rows(args, rows: list[Row], done: dict, file: Path):
    """Convert and evaluate once for each row; add the results to `done` and write it to the file after each."""
    model, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    window = min(args.window, model.config.max_position_embeddings)
    read = lambda text, split: lm.cut_windows(lm.read_ids(model, tokenizer, text, split), window)
    calib = read(args.calib, "train")
    if HELD_BACK in args.eval:
        calib, held_back = calib[:-12], calib[-8:]
    calib = ffn2moe.draw(calib, len(calib), args.seed)
    layers, dense_ffn = model.config.num_layers, lm.active_parameters(model)[0]
    first = max(1, args.eval_tokens // window)
    texts = [Text(Path(t).stem, held_back if t == HELD_BACK else read(t, "test"), []) for t in args.eval]
    for text in texts:
        for one in tqdm(text.windows[:first], desc=f"dense, {text.name}", unit="window"):
            text.dense.append(model.hidden_states(one[None])[0, :-1])
    for n, row in enumerate(sorted(rows, key=lambda row: not row.main)):  # what matters most first
        title = f"{n + 1}/{len(rows)} {row.name}, {row.percent} %"
        model, _ = lm.load_model(args.model, args.dtype, args.device)
        split, start = Experts.parse(row.experts), time.perf_counter()
        windows = calib[: row.calib_windows]
        if row.layer:
            if len(windows) < row.calib_windows:
                print(f"warning: {args.calib} has {len(windows)} calibration windows, not {row.calib_windows}", file=sys.stderr)
            replace = lambda i, ffn, x, row=row, split=split: ffn if i < row.first_dense else row.layer(ffn, x, split)
            ffn2moe.replace_ffns(model, windows, replace, partial(tqdm, desc=f"{title}: convert", unit="layer"))
        seconds = time.perf_counter() - start
        if isinstance(model.layers[-1].mlp, Oracle):  # it computes everything; what it stands for is this
            sparse = (split.shared + split.active) / split.total
            active = (row.first_dense + (layers - row.first_dense) * sparse) / layers
        else:
            active = lm.active_parameters(model)[0] / dense_ffn
        key = row.key([text.name for text in texts], args.whole)
        result = {"key": key, "active_ffn": active, "calib_tokens": windows.numel(), "seconds": seconds}
        result["texts"] = {}
        for text in texts[: len(key["texts"])]:
            bar = partial(tqdm, desc=f"{title}: {text.name}", unit="window")
            result["texts"][text.name] = evaluate(model, text, first, key["whole"] and text is texts[0], bar)
        done["rows"] = [r for r in done["rows"] if (r["key"]["name"], r["key"]["percent"]) != (row.name, row.percent)]
        done["rows"].append(result)
        lm.write_json(file, done)
        print(f"{title}: {result['texts'][texts[0].name]['perplexity']:.2f}", flush=True)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, ["---"] + ["---:"] * (len(head) - 1), *lines])


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

    at_all_sizes = {row.name for row in everything if row.percent == 75}
    controls = list(dict.fromkeys(row.name for row in order if row.name in at_all_sizes))
    elsewhere = list(dict.fromkeys(row.name for row in order if (row.main or row.all_texts) and row.layer))
    parts = [f"Perplexity, first {done['settings']['first_tokens']:,} tokens of {text}:\n\n" + pivot(controls, text)]
    lines = []
    for row in order:
        if row.main:
            r = results[row.name, row.percent]
            t, start = r["texts"][text], f", first {row.first_dense} dense" if row.first_dense else ""
            details = [f"{t['kl']:.3f}", f"{t['same_top']:.1%}", ppl(r), ppl(r, key="perplexity_whole")]
            lines.append([row.name, (row.experts if row.layer else "") + start, f"{r['active_ffn']:.1%}", *details])
    head = ["", "split", "active FFN", "KL to dense, nats", "same top token", "perplexity", "whole text"]
    parts.append(f"In detail ({text}):\n\n" + markdown(head, lines))
    for other in others:
        parts.append(f"Calibrated on {done['settings']['calib']}, evaluated on {other}:\n\n" + pivot(elsewhere, other))
    ablations = []
    for row in order:
        if row.name not in ["dense", *controls]:
            r = results[row.name, row.percent]
            ablations.append([row.name, row.experts, f"{r['active_ffn']:.1%}", ppl(r)])
    if ablations:
        parts.append("Ablations:\n\n" + markdown(["", "split", "active FFN", "perplexity"], ablations))
    return "\n".join(parts)


PLOTTED = {
    "paper": ("#b03a2e", "o"),
    "static pruning": ("#999999", "s"),
    "static pruning, refit": ("#555555", "D"),
    "joint": ("#1f6fb4", "o"),
    "oracle router": ("#1f6fb4", "^"),
    "oracle neurons": ("#6a9e5c", "^"),
}


def plot_quality(done: dict, file: Path):
    """Perplexity against active FFN, a line per method, a panel per text."""
    texts = list(done["settings"]["eval"])
    figure = Figure(figsize=(5.2 * len(texts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(texts), squeeze=False)[0]
    for ax, text in zip(axes, texts):
        for name, (colour, marker) in PLOTTED.items():
            rows = [r for r in done["rows"] if r["key"]["name"] == name and text in r["texts"]]
            points = sorted((r["active_ffn"], r["texts"][text]["perplexity"]) for r in rows)
            dashes = "--" if name.startswith("oracle") else "-"
            if points:
                ax.plot(*zip(*points), dashes, marker=marker, color=colour, label=name, markersize=5)
        for r in done["rows"]:
            if r["key"]["name"] == "dense" and text in r["texts"]:
                ax.axhline(r["texts"][text]["perplexity"], color="black", linewidth=0.8, label="dense")
        ax.set(yscale="log", xlabel="active FFN parameters / dense", ylabel="perplexity", title=text)
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Quality of the conversion, beside its controls.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("quality", help="perplexity, KL divergence and agreement at 75, 50 and 25 %% active FFN").add_argument
    text = "a text file, 'wikitext2' or 'manual', as for ffn2moe.py"
    add("--model", metavar="SOURCE", help="as for ffn2moe.py; splits and first layers are chosen for the default, SmolLM2")
    add("--calib", default="manual", metavar="TEXT", help=f"calibration text: {text} (%(default)s)")
    add("--eval", nargs="+", default=["manual"], metavar="TEXT", help=f"evaluation texts; {HELD_BACK}: the end of the calibration text (%(default)s)")
    add("--eval-tokens", type=int, default=10 * 2048, metavar="N", help="first N tokens of each (%(default)s)")
    add("--whole", action="store_true", help="the main rows on the whole of the first text as well")
    add("--only", nargs="+", metavar="ROW", help="only the rows of these names")
    add("--window", type=int, default=2048, metavar="N", help="tokens per sequence (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    add("--seed", type=int, default=0, help="picks the calibration windows (%(default)s)")
    add("--json", default="results/quality.json", metavar="FILE", help="raw results; table and plot beside it (%(default)s)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    return lm.run_command("bench", lambda: quality(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
