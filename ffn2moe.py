"""Turn the FFNs of a pretrained Llama-style model into mixtures of experts, analytically, without training.

Steps 1 to 4 are Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis (Pei et al., ACL 2026, arXiv
2502.04416), in its order:

1. Activation pattern   which neurons fire for which token: `normalized_scores`, `atopk_markers`, `activation_rates`
2. Shared expert        the neurons that fire most often: `split_shared`
3. Routed experts       the others, in groups of equal size that fire together: `balanced_assignment`, `group_routed`
4. Analytical router    one neuron of each expert speaks for it: `representative_neurons`, `analytical_router`, `build_moe`
5. Beyond the paper     partition and router found together, and a refitted output, which do better: `alternate`,
                        `partition_and_router`, `refit_down`, `joint_layer`
6. Which layers         those whose conversion costs least, by a closed form: `conversion_losses`, `choose_dense`
7. The whole model      layer by layer, each profiled on what the converted layers below it put out: `convert`; in a model
                        that is an MoE already, each of its experts becomes one too: `convert_ffn`
8. What experts are for the words that each runs for: `favourite_words`, `explain`

Then the command line: `python ffn2moe.py --help`. The MoE layer itself, with the equations of the router, is `model.MoE`;
what either method is worth, beside its controls, is measured by bench.py.

Shapes in comments: T tokens, D hidden_size, q intermediate_size (neurons), E slices of m = q / E neurons, S of them shared,
R = E - S routed, A routed experts active per token. S3A3E8 is a split with S = 3, A = 3, E = 8.
"""

import argparse
import copy
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure  # not pyplot: it would set the caller's backend
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import model as lm
from kernels import SETTINGS_LOCK, swiglu
from model import FFN, InputError, MoE, MoESpec, Split, expert_size

# Settings of the joint method, chosen by perplexity on windows of training text that were held back from calibration
SAMPLE_TOKENS = 16384  # for partition and router; the refit sees all calibration tokens
ROUTER_RIDGE = 1e-3
ROUTER_SCALE = 2.0**-4  # the largest score: so small that experts run with nearly the same weight
HIDDEN_RIDGE = 0.3
LEAST_GAIN = 1e-3  # of captured energy in a round

# Settings that trade memory for time
BLOCK = 1024  # tokens at a time
FISHER_TOKENS = 2048  # to predict what the conversion of each layer costs
STORED = torch.bfloat16  # what is known of each token and neuron of a sample

# Calibration tokens per neuron
PLENTY = 10  # for least squares to fit the model rather than the text
ENOUGH = 1  # for an expert of an MoE to be converted

# ----------------------------------------------------------------------------------------------------------------------
# 1. Activation pattern: which neurons fire for which token


def normalized_scores(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """h_i(x) = silu(x^ . g^_i) * (x^ . u^_i): x [T, D]; gate, up [q, D] -> float32 [T, q].

    g_i and u_i are neuron i's rows of gate and up, and ^ scales to unit length: without it, neurons with long weights
    would fire always. What a neuron's output is worth further on (W_down) plays no part.
    """
    x, gate, up = (F.normalize(t.float(), dim=-1) for t in (x, gate, up))
    return F.silu(x @ gate.T) * (x @ up.T)


def atopk_markers(scores: Tensor, k: int) -> Tensor:
    """ATopK: M[t, i] = 1 if |h_i(x_t)| is among the k largest of token t. scores [T, q] -> bool [T, q]."""
    top = scores.abs().topk(k, dim=-1).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, top, True)


def neuron_markers(ffn: FFN, x: Tensor, k: int) -> Tensor:
    """Both steps, for an FFN and its inputs x [T, D], a block at a time: bool [T, q], on the CPU."""
    gate, up = ffn.gate_proj, ffn.up_proj
    return torch.cat([atopk_markers(normalized_scores(block, gate, up), k).cpu() for block in x.split(BLOCK)])


def activation_rates(markers: Tensor) -> Tensor:
    """mu_i = mean_t M[t, i]: the share of tokens for which neuron i fires. markers [T, q] -> [q]."""
    return markers.sum(dim=0, dtype=torch.int32) / len(markers)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Shared expert: the neurons that fire most often


def split_shared(rates: Tensor, num_shared_neurons: int) -> tuple[Tensor, Tensor]:
    """The neurons of highest rate, which always run, and the others; both in falling order of rate."""
    order = rates.argsort(descending=True, stable=True)
    return order[:num_shared_neurons], order[num_shared_neurons:]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Routed experts: balanced k-means on the columns of M


def balanced_assignment(cost: np.ndarray, capacity: Sequence[int]) -> np.ndarray:
    """Put n items into k bins at the least total cost, exactly capacity[b] of them into bin b. Exact; O(n k) memory.

    Every item starts in its cheapest bin. That is the cheapest assignment of all, but for its loads. Then, while a bin is
    overfull, one item too many is handed on along the cheapest chain of moves that ends in a bin with room: bin a gives
    one of its items to b, b one of its own to c, and so on. A move from a to b costs

        move[a, b] = min over items i in a of cost[i, b] - cost[i, a],

    and the chain is a shortest path on a graph whose nodes are the k bins. Each chain keeps the assignment the cheapest
    one for its loads (successive shortest paths for minimum-cost flow), so the last one is optimal.

    The same cost as scipy's linear_sum_assignment(np.repeat(cost, capacity, axis=1)), which needs an n x n matrix; exact
    up to the rounding of the largest cost in float64.

    cost [n, k], finite; capacity [k], whole numbers that sum to n -> bin of each item, int64 [n].
    """
    cost, capacity = np.asarray(cost, dtype=np.float64), np.asarray(capacity)
    n, k = cost.shape
    if not np.isfinite(cost).all():
        raise ValueError("costs must be finite")
    if capacity.shape != (k,) or (capacity < 0).any() or capacity.sum() != n:
        raise ValueError(f"{k} capacities must sum to the {n} items")
    if n == 0:
        return np.zeros(0, dtype=np.int64)

    bin_of = cost.argmin(axis=1)
    load = np.bincount(bin_of, minlength=k)
    move = np.full((k, k), np.inf)  # the cheapest move from each bin to each other,
    mover = np.zeros((k, k), dtype=np.int64)  # and the item that makes it

    def update_moves(a):
        items = np.flatnonzero(bin_of == a)
        if len(items):
            price = cost[items] - cost[items, a, None]  # [items, k]
            best = price.argmin(axis=0)
            move[a], mover[a] = price[best, np.arange(k)], items[best]
        else:
            move[a] = np.inf
        move[a, a] = np.inf

    for a in range(k):
        update_moves(a)
    tolerance = 4 * k * np.finfo(np.float64).eps * np.abs(cost).max()  # a gain below it may be rounding
    while (load > capacity).any():
        # Bellman-Ford from all overfull bins at once: the cheapest way to take on one more item, and from which bin.
        distance, origin = np.where(load > capacity, 0.0, np.inf), np.full(k, -1)
        for _ in range(k):
            via = distance[:, None] + move
            a = via.argmin(axis=0)
            better = via[a, np.arange(k)] < distance - tolerance
            if not better.any():
                break
            distance[better], origin[better] = via[a, np.arange(k)][better], a[better]
        chain = [np.where(load < capacity, distance, np.inf).argmin()]  # the cheapest bin with room, and back from there
        while origin[chain[-1]] >= 0 and len(chain) <= k:
            chain.append(origin[chain[-1]])
        if len(chain) > k:  # rounding sent us in a circle
            tolerance *= 10
            continue
        for giver, taker in zip(chain[1:], chain):
            bin_of[mover[giver, taker]] = taker
        load[chain[-1]] -= 1
        load[chain[0]] += 1
        for a in chain:
            update_moves(a)
    return bin_of


def l1_distances(markers: Tensor, centroids: Tensor) -> Tensor:
    """L1 distance of each binary column M_i to each centroid c_e in [0, 1]: [T, n], [T, R] -> float64 [n, R].

    |1 - c| = 1 - c and |0 - c| = c, so |M_i - c_e|_1 = sum_t M_i + sum_t c_e - 2 M_i . c_e: one matrix product.
    """
    total = markers.sum(dim=0, dtype=torch.int32)[:, None] + centroids.sum(dim=0, dtype=torch.float64)[None, :]
    blocks = zip(markers.split(4096), centroids.split(4096))  # a float64 copy of all of M would be large
    return total - 2 * sum(m.double().T @ c.double() for m, c in blocks)


def group_routed(markers: Tensor, num_routed: int, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Balanced k-means: markers [T, n], columns in falling order of rate -> expert of each column [n], centroids [T, R].

    The R neurons that fire most are the seeds. In each round, neurons are assigned to the experts at the least total L1
    distance to the centroids, exactly n / R to each; then each centroid becomes the mean of its members. The official
    code does one round.
    """
    n = markers.shape[1]
    centroids = markers[:, :num_routed].float()
    for _ in range(rounds):
        cost = l1_distances(markers, centroids)
        expert = torch.from_numpy(balanced_assignment(cost, [n // num_routed] * num_routed))
        centroids = torch.stack([markers[:, expert == e].float().mean(dim=1) for e in range(num_routed)], dim=1)
    return expert, centroids


# ----------------------------------------------------------------------------------------------------------------------
# 4. Analytical router: a representative neuron speaks for its expert
#
# From here on neurons live in bins: bin 0 is the shared expert, bin 1 + e is routed expert e. bin_of [q] says which.


def representative_neurons(markers: Tensor, expert: Tensor, centroids: Tensor) -> Tensor:
    """The member of each expert that is closest (L1) to its centroid: indices into the columns of markers, [R]."""
    distance = l1_distances(markers, centroids)  # [n, R]
    outside = expert[:, None] != torch.arange(centroids.shape[1])
    return distance.masked_fill(outside, torch.inf).argmin(dim=0)


def partition_neurons(markers: Tensor, split: Split, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3 on the markers [T, q] of one layer -> bin_of [q], and the representative of each routed expert [R]."""
    _, rest = split_shared(activation_rates(markers), split.shared * expert_size(markers.shape[1], split))
    expert, centroids = group_routed(markers[:, rest], split.routed, rounds)
    bin_of = torch.zeros(markers.shape[1], dtype=torch.long)
    bin_of[rest] = 1 + expert
    return bin_of, rest[representative_neurons(markers[:, rest], expert, centroids)]


def analytical_router(ffn: FFN, representatives: Tensor) -> dict[str, Tensor]:
    """The router scores expert e with the gate and up rows of its representative neuron r, each of unit length:

        s_e(x) = | silu(g^_r . x) * (u^_r . x) |.

    The paper's argument: the output changes least where the experts that are left out contribute least; the L1 norm of
    an expert's hidden state stands for its contribution, and its most typical neuron for that norm. Scaling the rows to
    unit length makes experts comparable; x is the same for all of them and stays as it is.
    """
    gate, up = ffn.gate_proj[representatives], ffn.up_proj[representatives]  # [R, D]
    unit = lambda rows: F.normalize(rows.float(), dim=-1).to(rows)
    return {"router_gate": unit(gate), "router_up": unit(up)}


def members(bin_of: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
    """The neurons of the shared expert [S * m], and of each routed one [R, m], in order."""
    order = bin_of.argsort(stable=True)
    num_shared = int((bin_of == 0).sum())
    return order[:num_shared], order[num_shared:].view(num_routed, -1)


@torch.no_grad()
def build_moe(ffn: FFN, bin_of: Tensor, router: dict[str, Tensor], split: Split) -> MoE:
    """Slice an FFN into the experts that bin_of [q] says, under a router (its tensors, by the names they have in model.MoE).

    With a linear router, the weights of the experts that run sum to 1, as in Mixtral or Qwen2-MoE, so that the W_down of
    routed experts is multiplied by A (`spec.down_scale`). The MoE remembers bin_of, which checkpoints do not hold.
    """
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj  # [q, D], [q, D], [D, q]
    shared, routed = members(bin_of, split.routed)
    router_kind = "linear" if "router_weight" in router else "neurons"
    spec = MoESpec(shared.numel(), [routed.shape[1]] * split.routed, split.active, router_kind, lm.ROUTERS[router_kind])
    weights = {
        "gate_up_proj": torch.cat([gate[routed], up[routed]], dim=1),  # [R, 2m, D]
        "down_proj": down[:, routed].transpose(0, 1) * spec.down_scale,  # [R, D, m]
        "router_scale": gate.new_zeros(split.routed),
        "router_bias": gate.new_zeros(split.routed),
        **router,
    }
    if shared.numel():
        weights["shared_expert.gate_up_proj"] = torch.cat([gate[shared], up[shared]])
        weights["shared_expert.down_proj"] = down[:, shared]
    with torch.device("meta"):  # allocates nothing: the slices above become the parameters
        moe = MoE(gate.shape[1], spec)
    moe.load_state_dict({name: weight.contiguous() for name, weight in weights.items()}, assign=True)
    moe.bin_of = bin_of
    return moe.requires_grad_(False)


def paper_layer(ffn: FFN, x: Tensor, split: Split, k_act: int = 10, rounds: int = 1) -> MoE:
    """Steps 1 to 4 on one FFN and its inputs x [T, D]."""
    bin_of, representatives = partition_neurons(neuron_markers(ffn, x, k_act), split, rounds)
    return build_moe(ffn, bin_of, analytical_router(ffn, representatives), split)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Beyond the paper: partition and router found together, and a refitted output
#
# The paper groups neurons by when they fire. What counts is by how much the output misses the neurons that do not run,
# and whether a router can tell beforehand. Neuron i adds h_i(x_t) W_down[:, i] to the output, which has the length
#
#     c[t, i] = |h_i(x_t)| |W_down[:, i]|    and the energy    c[t, i]^2.
#
# Energies are added up as if the outputs of different neurons were at right angles; the refit makes up for some of that.


def hidden(ffn: FFN, x: Tensor) -> Tensor:
    """h(x) = silu(W_gate x) * (W_up x): x [T, D] -> float32 [T, q]."""
    return swiglu(F.linear(x, ffn.gate_up_proj)).float()


def contribution_energy(h: Tensor, down: Tensor) -> Tensor:
    """c[t, i]^2 = |h_i(x_t)|^2 |W_down[:, i]|^2: h [T, n], down [D, n] -> float32 [T, n]."""
    return (h * down.float().norm(dim=0)) ** 2


def in_blocks(function: Callable, x: Tensor, width: int) -> Tensor:
    """function [t, .] -> [t, width] of all tokens x [T, .], a block at a time: [T, width] in STORED."""
    y = torch.empty(len(x), width, dtype=STORED, device=x.device)
    for part, block in zip(y.split(BLOCK), x.split(BLOCK)):
        part.copy_(function(block))
    return y


def draw(rows: Tensor, n: int, seed: int = 0) -> Tensor:
    """n of the rows at most, by lot."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:n].to(rows.device)]


@contextmanager
def fast_products():
    """float32 products on the CPU by oneDNN. On a CPU with bfloat16 matrix units their factors are
    rounded to bfloat16, which sums over thousands of tokens can bear.

    It is a setting of the whole process: threads that convert at once take turns.
    """
    with SETTINGS_LOCK:
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


def check_finite(activations: Tensor):
    if not activations.isfinite().all():
        raise InputError("hidden activations overflow: choose another dtype")


def ridge_solver(xx: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression from its normal equations: X^T X [n, n] -> a function of X^T Y [n, k] that
    returns

        W = argmin |X W - Y|^2 + penalty |W|^2,   penalty = strength * median(diag(X^T X)).   [n, k]

    The median, since a few neurons that are huge for one token can own the mean. A millionth of its own
    diagonal is added for each neuron, about what float32 can tell; where that is too little for the
    factorisation, ten times as much.
    """
    check_finite(xx)
    diagonal = xx.diagonal().clone()
    penalty = (strength * diagonal.median() + 1e-6 * diagonal).clamp_min(1e-30)
    for _ in range(10):
        xx.diagonal().copy_(diagonal + penalty)
        factor, failed = torch.linalg.cholesky_ex(xx)
        if not failed:
            break
        penalty *= 10
    else:
        raise InputError("the normal equations of a ridge regression cannot be solved: choose another dtype")

    def solve(xy: Tensor) -> Tensor:
        check_finite(xy)
        return torch.cholesky_solve(xy, factor)

    return solve


def expert_norms(energy: Tensor, bin_of: Tensor, num_routed: int) -> Tensor:
    """sqrt(sum_{i in e} c[t, i]^2), what the router predicts: energy [T, n] -> float32 [T, R]."""
    inside = F.one_hot(bin_of, 1 + num_routed)[:, 1:].float()  # [n, R]
    return torch.cat([block.float() @ inside for block in energy.split(BLOCK)]).sqrt()


def energy_gain(energy: Tensor, active: Tensor) -> Tensor:
    """sum_t c[t, i]^2 active[t, b], what neuron i would contribute in bin b: energy [T, n], active [T, k] -> [n, k]."""
    return sum(e.float().T @ a for e, a in zip(energy.split(BLOCK), active.split(BLOCK)))


def active_bins(chosen: Tensor, num_routed: int, weights: Tensor | None = None) -> Tensor:
    """1 for each bin that runs, the shared one always: chosen experts [T, A], their weights if not 1 -> float32 [T, 1 + R]."""
    weights = torch.ones(chosen.shape, device=chosen.device) if weights is None else weights.float()
    active = torch.zeros(len(chosen), 1 + num_routed, device=chosen.device).scatter_(1, chosen + 1, weights)
    active[:, 0] = 1
    return active


def captured_energy(gain: Tensor, bin_of: Tensor) -> float:
    """sum_t sum_i c[t, i]^2 active[t, bin_of[i]], the energy of what runs: gain [n, k], bin_of [n]."""
    return gain.gather(1, bin_of[:, None]).sum(dtype=torch.float64).item()


def best_bins(gain: Tensor, capacity: Sequence[int]) -> Tensor:
    """The assignment that captures the most energy, with capacity[b] neurons in bin b: gain [n, k] -> bin_of [n].

    All neurons would like the shared bin best, and handing them on one by one takes long. So each bin first gets a price:
    between what its last customer and the first one turned away would pay, over their next best. Capacities are fixed, so
    that prices add the same to all assignments, and the exact one is found from a start that is nearly balanced.
    """
    cost = -(gain / gain.max().clamp_min(1e-30)).double().cpu().numpy()
    for _ in range(5):  # a price moves the customers of the others
        for b, c in enumerate(capacity):
            offers = np.sort(np.delete(cost, b, axis=1).min(axis=1) - cost[:, b])[::-1]  # [n], highest first
            # One more at both ends, for capacities 0 and n: offers[c] is now the last customer's.
            offers = np.concatenate(([offers[0] + 1], offers, [offers[-1] - 1]))
            cost[:, b] += (offers[c] + offers[c + 1]) / 2
    return torch.from_numpy(balanced_assignment(cost, capacity)).to(gain.device)


def alternate(
    energy: Tensor, x: Tensor, bin_of: Tensor, capacity: Sequence[int], active: int, rounds: int
) -> Tensor:
    """Improve an assignment of neurons to bins, by two steps in turn, each solved exactly:

        router, given the experts    ridge regression from x to the root of each expert's energy; the top `active` run
        experts, given the router    the assignment that captures the most energy under the router's choices

    The shared expert is just the bin that always runs, so that one assignment decides shared and routed at once. The
    second step can only gain; the first, whose aim is another, may lose it again. A round that gains less than LEAST_GAIN
    was the last.
    energy [T, n], x [T, D], bin_of [n] -> bin_of [n].
    """
    x, num_routed = x.float(), len(capacity) - 1
    solve = ridge_solver(x.T @ x, ROUTER_RIDGE)
    best, captured = bin_of, 0.0
    for _ in range(rounds):
        scores = x @ solve(x.T @ expert_norms(energy, bin_of, num_routed))  # [T, R]
        gain = energy_gain(energy, active_bins(scores.topk(active, dim=-1).indices, num_routed))  # [n, 1 + R]
        now = captured_energy(gain, bin_of)
        if now <= captured:
            return best
        if now < (1 + LEAST_GAIN) * captured:
            return bin_of
        best, captured = bin_of, now
        bin_of = best_bins(gain, capacity)
    return bin_of


def first_bins(energy: Tensor, split: Split) -> Tensor:
    """To start with, the neurons of most energy are shared, and the others are dealt out to the experts in turn:
    energy [T, q] -> bin_of [q]."""
    total = sum(block.float().sum(dim=0) for block in energy.split(BLOCK))
    routed = total.argsort(descending=True)[split.shared * expert_size(len(total), split) :]
    bin_of = torch.zeros(len(total), dtype=torch.long, device=energy.device)
    bin_of[routed] = torch.arange(len(routed), device=energy.device) % split.routed + 1
    return bin_of


def unpredicted_energy(h: Tensor, down: Tensor, bin_of: Tensor) -> Tensor:
    """The refit below lets the shared neurons, which always run, stand in for what they predict of the others. A routed
    neuron i is worth only the rest: with B the ridge regression from h_shared to h_routed,

        (h_i(x) - B_i . h_shared(x))^2 |W_down[:, i]|^2.    h [T, q], down [D, q], bin_of [q] -> [T, routed neurons]
    """
    shared, routed = (bin_of == 0).nonzero().flatten(), bin_of.nonzero().flatten()
    hh = sum(block[:, shared].float().T @ block.float() for block in h.split(BLOCK))  # [shared, q]
    B = ridge_solver(hh[:, shared], HIDDEN_RIDGE)(hh[:, routed])
    rest = lambda block: block[:, routed].float() - block[:, shared].float() @ B
    return in_blocks(lambda block: contribution_energy(rest(block), down[:, routed]), h, len(routed))


def ridge_router(energy: Tensor, x: Tensor, bin_of: Tensor, num_routed: int) -> dict[str, Tensor]:
    """The router of a partition: ridge regression from x [T, D] to the root of each expert's energy. energy [T, n], bin_of [n].

    Without an intercept, for which standard MoE layers have no place; the README says what that costs. What all experts have
    in common moves no choice: scores are made to have mean 0 over the experts, which spares bfloat16 digits. They are scaled
    to a largest size of ROUTER_SCALE over the sample: the weights of experts that run differ by e^(2 ROUTER_SCALE) at most.
    """
    inputs = x.float()
    weight = ridge_solver(inputs.T @ inputs, ROUTER_RIDGE)(inputs.T @ expert_norms(energy, bin_of, num_routed))  # [D, R]
    weight -= weight.mean(dim=1, keepdim=True)
    weight *= ROUTER_SCALE / (inputs @ weight).abs().max().clamp_min(1e-30)
    return {"router_weight": weight.T.to(x)}


@torch.no_grad()
@fast_products()
def partition_and_router(ffn: FFN, x: Tensor, split: Split, rounds: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Which bin each neuron goes into, bin_of [q], and the router of that, from inputs of the FFN x [T, D], of which
    SAMPLE_TOKENS are looked at."""
    q, R = ffn.down_proj.shape[1], split.routed
    m = expert_size(q, split)
    x = draw(x, SAMPLE_TOKENS)
    h = in_blocks(partial(hidden, ffn), x, q)
    check_finite(h)
    energy = in_blocks(partial(contribution_energy, down=ffn.down_proj), h, q)
    bin_of = alternate(energy, x, first_bins(energy, split), [split.shared * m] + [m] * R, split.active, rounds)
    # Then the routed experts once more, among themselves, by what the shared expert cannot make up for.
    del energy  # before there is another
    energy, routed = unpredicted_energy(h, ffn.down_proj, bin_of), bin_of > 0
    bin_of[routed] = alternate(energy, x, bin_of[routed], [0] + [m] * R, split.active, rounds)
    return bin_of, ridge_router(energy, x, bin_of[routed], R)


@torch.no_grad()
@fast_products()
def refit_down(ffn: FFN, x: Tensor, active: Callable, bin_of: Tensor) -> Tensor:
    """The W_down' that makes the most of the neurons that run, h~ = h * active[bin_of]. Costs nothing at inference.

        min over W'   sum_t |W' h~(x_t) - F(x_t)|^2 + penalty |W' - W_down|^2

    is a ridge regression of what is missing, W_down (h - h~), on h~. x [T, D], in blocks, so that T may be large;
    active: x [t, D] -> [t, 1 + R]. -> [D, q]
    """
    D, q = ffn.down_proj.shape
    hh, hy = torch.zeros(q, q, device=x.device), torch.zeros(q, D, device=x.device)
    down = ffn.down_proj.float()  # in float16, what is missing can overflow
    for block in x.split(BLOCK):
        h = hidden(ffn, block)  # [t, q]
        running = h * active(block)[:, bin_of]
        missing = h.sub_(running) @ down.T  # [t, D]
        hh.addmm_(running.T, running)
        hy.addmm_(running.T, missing)
    return down + ridge_solver(hh, HIDDEN_RIDGE)(hy).T


def refit_moe(ffn: FFN, moe: MoE, x: Tensor):
    """Refit, in place, the W_down of an MoE that was made of an FFN, under its own routing of x [T, D]."""
    R = len(moe.spec.experts)
    shared, routed = members(moe.bin_of, R)

    def active(block):
        chosen, weights = moe.route(block)
        return active_bins(chosen, R, moe.spec.down_scale * weights)

    down = refit_down(ffn, x, active, moe.bin_of)
    moe.shared_expert.down_proj.copy_(down[:, shared])
    moe.down_proj.copy_(moe.spec.down_scale * down[:, routed].transpose(0, 1))
    check_finite(moe.shared_expert.down_proj)  # the cast may have overflowed
    check_finite(moe.down_proj)


def joint_layer(ffn: FFN, x: Tensor, split: Split, rounds: int = 8, refit: bool = True) -> MoE:
    """The joint method on one FFN and its inputs x [T, D]."""
    moe = build_moe(ffn, *partition_and_router(ffn, x, split, rounds), split)
    if refit:
        refit_moe(ffn, moe, x)
    return moe


# ----------------------------------------------------------------------------------------------------------------------
# 6. Which layers to convert
#
# Layers differ by a factor of ten in what their conversion costs. With g_t the gradient of the log
# likelihood with respect to the output of an FFN for token t, and e_t the error that the conversion
# makes there, the divergence from the dense model is, to second order and token by token,
#
#     KL(p || p') ~= 1/2 mean_t E[(g_t . e_t)^2],
#
# where labels are drawn from the model's own predictions p (the Fisher information). As a cheap
# stand-in for e_t, we take what the half of the neurons adds that have least energy. That needs no
# conversion, and one backward pass for all layers at once.


def conversion_losses(model: lm.Decoder, windows: Tensor) -> Tensor:
    """What it costs to convert each layer, predicted in nats per token: windows [B, T] -> float64 [layers]."""
    seen = {}

    def remember(i: int, _, inputs: tuple, output: Tensor):
        output.retain_grad()
        seen[i] = inputs[0].detach(), output

    ffns = [layer.mlp for layer in model.layers]
    hooks = [ffn.register_forward_hook(partial(remember, i)) for i, ffn in enumerate(ffns)]
    hooks.append(model.embed_tokens.register_forward_hook(lambda _, inputs, output: output.requires_grad_()))
    loss, draw_label = torch.zeros(len(ffns), dtype=torch.float64), torch.Generator(windows.device).manual_seed(0)
    try:
        for window in windows:
            with torch.enable_grad():
                x = model.hidden_states(window[None])[0]  # [T, D]
            x.backward(sampled_label_gradient(model, x, draw_label))
            for i, ffn in enumerate(ffns):
                ffn_input, output = seen[i]
                loss[i] += squared_change(ffn, ffn_input[0], output.grad[0]) / 2
    finally:
        for hook in hooks:
            hook.remove()
    return loss / windows.numel()


def sampled_label_gradient(model: lm.Decoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of sum_t log p(label_t) with respect to the last hidden states x [T, D], labels drawn from p."""
    gradients = []
    for block in x.detach().split(128):  # logits are large
        with torch.enable_grad():
            logp = model.logits(block.requires_grad_()).float().log_softmax(dim=-1)
            label = torch.multinomial(logp.detach().exp(), 1, generator=generator)
            likelihood = logp.gather(1, label).sum()
        gradients += torch.autograd.grad(likelihood, block)
    return torch.cat(gradients)


def squared_change(ffn: FFN, x: Tensor, g: Tensor) -> float:
    """sum_t (g_t . e_t)^2, with e_t what the half of the neurons of least energy adds: x, g [T, D]."""
    h = hidden(ffn, x)
    energy = contribution_energy(h, ffn.down_proj).sum(dim=0)
    least = energy.argsort()[: len(energy) // 2]
    change = ((g.float() @ ffn.down_proj[:, least].float()) * h[:, least]).sum(dim=1)  # [T]
    return change.square().sum(dtype=torch.float64).item()


def choose_dense(model: lm.Decoder, calib_ids: Tensor, split: Split, active: float) -> frozenset[int]:
    """The layers that stay dense, so that the share `active` of all FFN neurons runs: those whose conversion costs most."""
    num_layers, saved = model.config.num_layers, 1 - (split.shared + split.active) / split.total
    if saved == 0:
        return frozenset()
    num_sparse = math.ceil(round(num_layers * (1 - active) / saved, 6))  # rounded: 7.000000001 layers are 7
    num_sparse = min(max(1, num_sparse), num_layers)
    length = min(512, calib_ids.shape[1])
    losses = conversion_losses(model, calib_ids[:, :length][: FISHER_TOKENS // length])
    return frozenset(losses.argsort(descending=True)[: num_layers - num_sparse].tolist())


def parse_layers(text: str) -> frozenset[int]:
    """Layers written like "0-7,24-29", or "none"."""
    if text == "none":
        return frozenset()
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text):
        raise InputError(f"layers {text!r}: expected numbers and ranges, for example 0-7,24-29, or none")
    ranges = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return frozenset(i for ends in ranges for i in range(ends[0], ends[-1] + 1))


def format_layers(layers: Iterable[int]) -> str:
    """The way back: {0, 1, 2, 9} -> "0-2,9"."""
    parts = []
    for i in sorted(layers):
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts) or "none"


# ----------------------------------------------------------------------------------------------------------------------
# 7. The whole model


class LayerReport(NamedTuple):
    layer: int
    bin_of: Tensor  # [q], 0 for the neurons of the shared expert
    rates: Tensor  # [q], activation rates (step 1), on a sample
    load: Tensor  # [R], the share of calibration tokens that each routed expert gets; A / R on average


class Method(NamedTuple):
    """How to convert a layer, the kind of router that makes, and the defaults of convert and the command line."""

    convert_layer: Callable
    router: str
    experts: str
    active: float  # share of the FFN that runs, by which dense layers are chosen
    calib_tokens: int


METHODS = {
    "joint": Method(joint_layer, "linear", "S2A2E8", 0.74, 16 * 2048),
    "paper": Method(paper_layer, "neurons", "S3A3E8", 0.75, 8 * 2048),
}


def convert_ffn(ffn: FFN | MoE, x: Tensor, convert_layer: Callable) -> FFN | MoE:
    """A dense FFN becomes an MoE. In an MoE, the same happens to each expert (hierarchical sparsity, section 4.4), on the
    tokens that its router sends there; a routed expert that gets too few of them for its size stays whole. x [T, D]."""
    if isinstance(ffn, FFN):
        return convert_layer(ffn, x)
    chosen, spec = ffn.route(x)[0], ffn.spec

    def convert_expert(expert, mine):
        enough = isinstance(expert, MoE) or len(mine) >= ENOUGH * lm.spec_of(expert)
        return convert_ffn(expert, mine, convert_layer) if enough else expert

    if spec.shared:
        ffn.shared_expert = convert_expert(ffn.shared_expert, x)
        spec = spec._replace(shared=lm.spec_of(ffn.shared_expert))
    experts = ffn.experts if hasattr(ffn, "experts") else map(FFN.of, ffn.gate_up_proj, ffn.down_proj)
    experts = [convert_expert(expert, x[(chosen == e).any(dim=-1)]) for e, expert in enumerate(experts)]
    if any(isinstance(expert, MoE) for expert in experts):
        ffn.gate_up_proj = ffn.down_proj = None
        ffn.experts = nn.ModuleList(copy.deepcopy(e) if isinstance(e, FFN) else e for e in experts)  # not views of what was
    ffn.spec = spec._replace(experts=list(map(lm.spec_of, experts)))
    return ffn


def resolve(
    model: lm.Decoder, experts: Split | str | None, method: str, dense: Iterable[int] | str, k_act: int
) -> tuple[Split, frozenset[int] | None]:
    """The split, and the layers that stay dense (None: they are still to be chosen); InputError if `convert` cannot do it."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    split, num_layers = Split.parse(experts or METHODS[method].experts), model.config.num_layers
    if dense == "auto":
        is_moe = any(isinstance(ffn, MoESpec) for ffn in model.config.ffns)  # then no layer is dense now
        dense = frozenset() if is_moe or method == "paper" else None
    elif isinstance(dense, str):
        dense = parse_layers(dense)
    layers = set(range(num_layers)) - set(dense or ())
    if dense and not set(dense) <= set(range(num_layers)):
        raise InputError(f"dense layers {format_layers(dense)}: the model has {num_layers}")
    if not layers:
        raise InputError(f"dense layers {format_layers(dense)} leave none of the {num_layers} layers to convert")
    sizes = {q for i in layers for q in lm.dense_sizes(model.config.ffns[i])} - {0}
    for q in sizes:
        expert_size(q, split)
    q = min(sizes) if method == "paper" else model.config.intermediate_size
    if not 1 <= k_act <= q:
        raise InputError(f"k_act = {k_act} is not between 1 and intermediate_size = {q}")
    return split, None if dense is None else frozenset(dense)


@torch.no_grad()
def replace_ffns(
    model: lm.Decoder,
    calib_ids: Tensor,
    replacement: Callable,
    dense: Iterable[int] = (),
    progress: Callable = lambda layers: layers,
):
    """Walk calib_ids [B, T] through the model, in place. replacement(i, ffn, x [B * T, D]) returns what stands for the FFN
    of layer i, given its inputs; the layers above see what that puts out. Layers in `dense` stay as they are."""
    rope = model.rope(0, calib_ids.shape[1])
    x = model.embed_tokens(calib_ids)  # [B, T, D], what flows into the next layer
    last = max(set(range(len(model.layers))) - set(dense))
    for i, layer in enumerate(progress(model.layers[: last + 1])):
        if i in dense:
            for sequence in x.split(1):  # one by one, to need little memory
                sequence.copy_(layer(sequence, rope))
            continue
        ffn_input = torch.empty_like(x)
        for sequence, normed in zip(x.split(1), ffn_input.split(1)):
            sequence += layer.self_attn(layer.input_layernorm(sequence), rope)
            normed.copy_(layer.post_attention_layernorm(sequence))
        if not ffn_input.isfinite().all():
            raise InputError(f"the inputs of the FFN of layer {i} are not finite: the model or its dtype overflows")
        layer.mlp = replacement(i, layer.mlp, ffn_input.flatten(0, 1))
        if i < last:
            for sequence, normed in zip(x.split(1), ffn_input.split(1)):
                sequence += layer.mlp(normed)


@torch.no_grad()
def convert(
    model: lm.Decoder,
    calib_ids: Tensor | list[int],
    experts: Split | str | None = None,
    method: str = "joint",
    dense: Iterable[int] | str = "auto",
    active: float | None = None,
    k_act: int = 10,
    window: int = 2048,
    progress: Callable = lambda layers: layers,
    report: Callable[[LayerReport], None] | None = None,
) -> lm.Decoder:
    """Convert the FFNs of a model, or the experts of one that is an MoE already, in place, and return the model.

    calib_ids: token ids, [B, T], or [T] to be cut into windows. experts: None for the method's default. dense: layers that
    stay as they are, numbers or text like "0-7,24-29" or "none"; "auto": those whose conversion would cost most, so that the
    share `active` of all FFN neurons runs for a token (joint; the paper's method converts all). k_act: the k of ATopK
    (paper). `progress` wraps the layers (tqdm does), `report` is called after each dense FFN. Raises InputError, for bad
    arguments before anything is changed.
    """
    config = model.config
    split, dense = resolve(model, experts, method, dense, k_act)
    calib_ids = lm.as_ids(model, calib_ids)
    if calib_ids.dim() == 1:
        calib_ids = lm.cut_windows(calib_ids, min(window, config.max_position_embeddings))
    if not calib_ids.numel():
        raise InputError("there are no calibration tokens")
    if dense is None:
        dense = choose_dense(model, calib_ids, split, active or METHODS[method].active)
    settings = {"k_act": k_act} if method == "paper" else {}
    convert_layer = partial(METHODS[method].convert_layer, split=split, **settings)

    def replacement(i, ffn, x):
        moe = convert_ffn(ffn, x, convert_layer)
        if report and isinstance(ffn, FFN):
            rates = activation_rates(neuron_markers(ffn, draw(x, SAMPLE_TOKENS), k_act))
            load = moe.route(x)[0].flatten().bincount(minlength=split.routed) / len(x)
            report(LayerReport(i, moe.bin_of, rates, load.cpu()))
        return moe

    replace_ffns(model, calib_ids, replacement, dense, progress)
    config.ffns = [lm.spec_of(layer.mlp) for layer in model.layers]
    config.raw = lm.native_raw(config)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# 8. What experts are for


@torch.no_grad()
def chosen_experts(model: lm.Decoder, windows: Tensor, layer: int) -> Tensor:
    """The routed experts that run in a layer for each token: windows [B, T] -> [B * T, A]."""
    moe, chosen = model.layers[layer].mlp, []
    hook = moe.register_forward_pre_hook(lambda moe, inputs: chosen.append(moe.route(inputs[0].flatten(0, -2))[0]))
    try:
        for window in windows:
            model.hidden_states(window[None])
    finally:
        hook.remove()
    return torch.cat(chosen)


def favourite_words(words: list[str], chosen: Tensor, num_routed: int, n: int = 8) -> list[list[str]]:
    """The words that choose each expert most clearly: of a word that occurs c times, z = (c_e - c p_e) / sqrt(c p_e (1 - p_e))
    says by how much its choices of expert e exceed those of all words, p_e. words [T], chosen [T, A] -> n words of each expert.
    """
    kinds = {word: i for i, word in enumerate(dict.fromkeys(words))}
    kind = torch.tensor([kinds[word] for word in words])
    ran = torch.zeros(len(words), num_routed).scatter_(1, chosen.cpu(), 1.0)  # [T, R]
    count = torch.bincount(kind).double()[:, None]  # [words, 1]
    together = torch.zeros(len(kinds), num_routed).index_add_(0, kind, ran).double()  # [words, R]
    p = ran.double().mean(dim=0).clamp(1e-6, 1 - 1e-6)
    z = (together - count * p) / (count * p * (1 - p)).sqrt()
    z[[not any(c.isalpha() for c in word) for word in kinds]] = -torch.inf  # numbers, dots, ends of lines
    names = list(kinds)
    return [[names[i] for i in column.topk(min(n, len(names))).indices if column[i] > 1] for column in z.T]


def words_of_experts(model: lm.Decoder, tokenizer: Tokenizer, windows: Tensor, layer: int) -> list[list[str]]:
    """The words that each routed expert of a layer is for, in a text: windows [B, T]."""
    words = [tokenizer.decode([i], skip_special_tokens=False).strip() for i in windows.flatten().tolist()]
    return favourite_words(words, chosen_experts(model, windows, layer), len(model.layers[layer].mlp.spec.experts))


def explain(model: lm.Decoder, tokenizer: Tokenizer, ids: Tensor, words: list[list[str]], layer: int) -> str:
    """The tokens of a text, ids [T], with the routed experts that run for them in a layer, and the words that each is for."""
    lines = [f"Layer {layer}: {model.layers[layer].mlp.spec.active} of {len(words)} routed experts run for each token (#)", ""]
    for i, experts in zip(ids.tolist(), chosen_experts(model, ids[None], layer).tolist()):
        word = tokenizer.decode([i], skip_special_tokens=False).strip() or "_"
        lines.append(f"{word:>16.16}  " + "".join(".#"[e in experts] for e in range(len(words))))
    return "\n".join([*lines, "", *(f"expert {e:>2} is for  {', '.join(of)}" for e, of in enumerate(words))])


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def plot_rates(reports: list[LayerReport], file: Path):
    """How often neurons fire, a panel per layer."""
    columns = min(6, len(reports))
    rows = -(-len(reports) // columns)
    figure = Figure(figsize=(1.9 * columns + 0.8, 1.3 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    bins = np.logspace(-4, 0, 25)
    for i, ax in enumerate(axes.flat):
        if i >= len(reports):
            ax.axis("off")
            continue
        rates = reports[i].rates.double().numpy().clip(bins[0], None)  # neurons that never fire: the first bin
        is_shared = (reports[i].bin_of == 0).cpu().numpy()
        ax.hist(rates[~is_shared], bins, color="#4878a8", label="routed")
        ax.hist(rates[is_shared], bins, color="#e08a3c", label="shared", rwidth=0.8)
        ax.set(xscale="log", yscale="log", xlim=(bins[0], 1), xticks=[1e-4, 1e-2, 1])
        ax.set_title(f"layer {reports[i].layer}", fontsize=8, pad=2)
        ax.tick_params(labelsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.supxlabel("activation rate: share of tokens for which a neuron fires", fontsize=9)
    figure.supylabel("neurons", fontsize=9)
    figure.savefig(file, dpi=120)


def plot_load(reports: list[LayerReport], split: str, file: Path):
    """Which share of the tokens each routed expert gets."""
    even = Split.parse(split).active / Split.parse(split).routed
    load = torch.stack([r.load.sort(descending=True).values for r in reports]).numpy().T / even  # [R, layers]
    spread = max(0.25, abs(load - 1).max())
    figure = Figure(figsize=(2.2 + 0.22 * len(reports), 1.4 + 0.25 * len(load)), layout="constrained")
    ax = figure.subplots()
    edges = (reports[0].layer - 0.5, reports[-1].layer + 0.5, len(load) + 0.5, 0.5)
    image = ax.imshow(load, aspect="auto", cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread, extent=edges)
    ax.set(xlabel="layer", ylabel="routed expert, busiest first")
    ax.set_title(f"Load of the routed experts, {split}: 1 is an even share, {even:.0%} of the tokens", fontsize=9)
    figure.colorbar(image, label="load / even share")
    figure.savefig(file, dpi=120)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert the FFNs of a Llama-style model into mixtures of experts, without training, and compare "
        "perplexity before and after. Without arguments: SmolLM2-135M-Instruct, on text that every Python carries.",
    )
    add = parser.add_argument
    text = "a text file, 'wikitext2' (from the hub), or 'manual' (the Python manual's topics; the default)"
    add("--model", metavar="SOURCE", help="checkpoint directory, .gguf file or hub id; SmolLM2-135M-Instruct if not given")
    add("--calib", metavar="TEXT", default="manual", help=f"calibration text: {text}")
    add("--eval", metavar="TEXT", default="manual", help=f"evaluation text: {text}")
    add("--method", choices=METHODS, default="joint", help="how to partition and route: joint (%(default)s), or as in the paper")
    default = lambda field: ", ".join(f"{name}: {getattr(method, field)}" for name, method in METHODS.items())
    add("--experts", metavar="SnAnEn", help=f"E slices per FFN, S shared, A of the rest active per token ({default('experts')})")
    add("--dense", default="auto", metavar="LAYERS", help="layers that stay dense: 0-7,24-29, say, or none; auto: those whose "
        "conversion would cost most, as many as --active allows (joint), or none (paper)")
    add("--active", type=float, metavar="SHARE", help="share of the FFN neurons that are to run for a token, for --dense auto (0.74)")
    add("--k-act", type=int, default=10, metavar="K", help="paper: neurons that count as firing per token (ATopK; %(default)s)")
    add("--calib-tokens", type=int, metavar="N", help=f"calibration tokens, random windows ({default('calib_tokens')}; joint: {PLENTY} per neuron, if more)")
    add("--eval-tokens", type=int, default=6 * 2048, metavar="N", help="first N evaluation tokens; 0: all (%(default)s)")
    add("--window", type=int, default=2048, metavar="N", help="tokens per sequence, at most the context (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights and products (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here: %(default)s)")
    add("--seed", type=int, default=0, help="picks the calibration windows (%(default)s)")
    add("--prompt", default="The capital of France is", help="text to continue, before and after (%(default)s)")
    add("--explain", metavar="TEXT", help="print which experts run for the tokens of this text, and the words that each is for, instead")
    add("--layer", type=int, metavar="N", help="that --explain looks at (the middle one)")
    add("--out", metavar="DIR", help="write the converted checkpoint; --model DIR loads it back")
    add("--format", choices=["standard", "native"], help="of --out: Qwen2-MoE, which other engines run (if possible), or our own")
    add("--force", action="store_true", help="replace the checkpoint in an --out that is not empty")
    add("--json", metavar="FILE", help="write the final table and the settings")
    add("--plot", metavar="DIR", help="write activation_rates.png and expert_load.png")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace):
    """Refuse what is known to be impossible before anything is loaded."""
    few = args.calib_tokens is not None and args.calib_tokens < args.window
    if args.window < 2 or args.eval_tokens < 0 or few or not 0 <= args.seed < 2**63:
        raise InputError("--window must be at least 2, --calib-tokens at least --window, --eval-tokens and --seed at least 0")
    if args.active is not None and not 0 < args.active <= 1:
        raise InputError("--active must be more than 0 and at most 1")
    if args.experts:
        Split.parse(args.experts)
    if args.dense != "auto":
        parse_layers(args.dense)
    if args.out:
        lm.check_output(args.out, args.force)
    for path, is_kind in ((args.json, Path.is_file), (args.plot, Path.is_dir)):
        if path:
            lm.check_writable(path, is_kind)
    if args.calib == args.eval and Path(args.calib).exists():
        print("warning: calibrating and evaluating on the same file", file=sys.stderr)


def describe(ffns: list[int | MoESpec]) -> str:
    moes = [ffn for ffn in ffns if isinstance(ffn, MoESpec)]
    if not moes:
        return "dense"
    if any(isinstance(expert, MoESpec) for moe in moes for expert in (moe.shared, *moe.experts)):
        return "MoE of MoEs"
    return f"MoE {moes[0].split or f'{moes[0].active} of {len(moes[0].experts)}'}"


def measure(when: str, model: lm.Decoder, tokenizer: Tokenizer, eval_ids: Tensor, window: int, prompt: Tensor) -> dict:
    ffn_parameters, parameters = lm.active_parameters(model)
    return {
        "name": describe(model.config.ffns),
        "text": tokenizer.decode([*prompt.tolist(), *lm.generate(model, prompt, 24)]),  # first: it refuses an empty prompt
        "dense_layers": sum(isinstance(ffn, int) for ffn in model.config.ffns),
        "ffn_parameters": ffn_parameters,
        "parameters": parameters,
        "perplexity": lm.perplexity(model, eval_ids, window, partial(tqdm, desc=f"perplexity {when}", unit="window")),
    }


def plan(model: lm.Decoder, tokenizer: Tokenizer, args: argparse.Namespace, window: int) -> tuple[Tensor, dict]:
    """The calibration windows [N, window] and the arguments of `convert`; refuses what is not possible."""
    split, dense = resolve(model, args.experts, args.method, args.dense, args.k_act)
    if args.out and args.format == "standard":
        ffns = [lm.split_spec(ffn, split, METHODS[args.method].router) for ffn in model.config.ffns]
        lm.check_standard(replace(model.config, ffns=ffns))
    windows = lm.cut_windows(lm.read_ids(model, tokenizer, args.calib, "train"), window)
    plenty = PLENTY * model.config.intermediate_size if args.method == "joint" else 0
    tokens = args.calib_tokens or max(METHODS[args.method].calib_tokens, plenty + window)
    windows = draw(windows, tokens // window, args.seed)
    if windows.numel() < plenty:
        few = f"{windows.numel()} calibration tokens for {model.config.intermediate_size} neurons"
        print(f"warning: {few}: least squares may fit the text rather than the model", file=sys.stderr)
    if dense is None:
        dense = choose_dense(model, windows, split, args.active or METHODS[args.method].active)
    return windows, {"experts": split, "method": args.method, "dense": dense, "k_act": args.k_act}


TIMED_TOKENS, TIMED_STEPS = 2048, 16  # of a prefill, and decoded after it


@torch.no_grad()
def time_in_turns(model: lm.Decoder, ids: Tensor, versions: dict[str, list[nn.Module]], turns: int = 3) -> dict[str, tuple]:
    """Milliseconds of a prefill of TIMED_TOKENS of ids [T] at most, and of one token after it (without torch.compile), for
    the model with each version of its FFNs: medians of turns A B A B, so that what slows the machine slows both."""
    ids = ids[: min(TIMED_TOKENS + TIMED_STEPS, model.config.max_position_embeddings)].view(1, -1)
    steps = min(TIMED_STEPS, ids.shape[1] // 2)
    prompt = ids.shape[1] - steps
    cache, now = model.new_cache(1, ids.shape[1]), [layer.mlp for layer in model.layers]
    times = {name: [] for name in versions}
    clock = lambda: (torch.cuda.synchronize() if ids.is_cuda else None, time.perf_counter())[1]
    for turn in range(turns + ids.is_cuda):  # on a GPU, the first compiles kernels
        for name, ffns in versions.items():
            for layer, ffn in zip(model.layers, ffns):
                layer.mlp = ffn
            start = clock()
            model.logits(model.hidden_states(ids[:, :prompt], cache)[:, -1])
            middle = clock()
            for t in range(prompt, prompt + steps):
                model(ids[:, t : t + 1], cache, t)
            if turn or not ids.is_cuda:
                times[name].append((1e3 * (middle - start), 1e3 * (clock() - middle) / steps))
    for layer, ffn in zip(model.layers, now):
        layer.mlp = ffn
    return {name: tuple(np.median(times[name], axis=0).tolist()) for name in versions}


def convert_and_time(model: lm.Decoder, windows: Tensor, chosen: dict, report: Callable | None) -> float:
    """Convert the model -> the seconds it took."""
    before, start = model.config.ffns, time.perf_counter()
    convert(model, windows, **chosen, progress=partial(tqdm, desc="converting", unit="layer"), report=report)
    seconds = time.perf_counter() - start
    layers = [pair for i, pair in enumerate(zip(before, model.config.ffns)) if i not in chosen["dense"]]
    inner = [expert for was, now in layers if isinstance(was, MoESpec) for expert in now.experts]
    whole = sum(isinstance(expert, int) for expert in inner)
    if whole:
        few = "fewer calibration tokens than they have neurons"
        print(f"warning: {whole} of {len(inner)} routed experts got {few} and stay whole", file=sys.stderr)
    return seconds


def run(args: argparse.Namespace):
    check_args(args)
    # Everything is read and checked before the long work starts.
    model, tokenizer = lm.load_model(args.model, args.dtype, args.device)
    window = min(args.window, model.config.max_position_embeddings)
    eval_ids = lm.read_ids(model, tokenizer, args.eval, "test")[: args.eval_tokens or None]
    eval_ids = lm.cut_windows(eval_ids, window)
    prompt = lm.as_ids(model, lm.encode(tokenizer, args.prompt))
    measured = partial(measure, tokenizer=tokenizer, eval_ids=eval_ids.flatten(), window=window, prompt=prompt)
    if args.explain is not None:
        shown = lm.as_ids(model, lm.encode(tokenizer, args.explain))
        if not 0 < len(shown) <= model.config.max_position_embeddings:
            raise InputError(f"--explain: a text of {len(shown)} tokens is none, or more than the model can run")
    before, chosen, settings, reports, seconds = {}, {}, {}, [], None
    if args.experts is not None or describe(model.config.ffns) == "dense":
        windows, chosen = plan(model, tokenizer, args, window)
        settings = {**chosen, "experts": str(chosen["experts"]), "dense": format_layers(chosen["dense"]), "seed": args.seed, "calib": args.calib, "calib_tokens": windows.numel()}
    else:
        doing = "evaluated" if args.explain is None else "explained"
        print(f"the model is an MoE already: it is {doing}; --experts would split its experts", file=sys.stderr)
    if args.explain is not None:
        layer = model.config.num_layers // 2 if args.layer is None else args.layer
        will_be = lambda i: chosen and i not in chosen["dense"]
        moes = [i for i, ffn in enumerate(model.config.ffns) if isinstance(ffn, MoESpec) or will_be(i)]
        if layer not in moes:
            raise InputError(f"layer {layer} is no MoE; these are: {', '.join(map(str, moes))}")
    if chosen:
        before = measured("before", model) if args.explain is None else {}
        dense_ffns = [layer.mlp for layer in model.layers]  # kept, to be timed beside what becomes of them
        seconds = convert_and_time(model, windows, chosen, reports.append if args.plot else None)
    if args.explain is None:
        versions = {"dense": dense_ffns} if chosen else {}
        versions["moe"] = [layer.mlp for layer in model.layers]
        speeds = time_in_turns(model, eval_ids.flatten(), versions)
    if args.out:
        model = lm.in_format(model, args.format)
        lm.save_model(model, tokenizer, args.out, args.force)
    if args.plot and reports:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
        plot_load(reports, settings["experts"], Path(args.plot, "expert_load.png"))
        plot_rates(reports, Path(args.plot, "activation_rates.png"))
    if args.explain is not None:
        print(explain(model, tokenizer, shown, words_of_experts(model, tokenizer, eval_ids, layer), layer))
        return
    after = measured("after", model)
    for side, name in ((before, "dense"), (after, "moe")):
        side |= dict(zip(("prefill_ms", "decode_ms"), speeds.get(name, ())))

    whole = 3 * model.config.hidden_size * sum(map(lm.neurons_of, model.config.ffns))
    result = {
        "model": args.model or Path(lm.WHEEL_MEMBER).name,
        **settings,
        "eval": args.eval,
        "eval_tokens": eval_ids.numel(),
        "window": window,
        "dtype": args.dtype,
        "device": args.device,
        "torch": torch.__version__,
        "dense_perplexity": before.get("perplexity"),
        "moe_perplexity": after["perplexity"],
        "active_ffn_fraction": after["ffn_parameters"] / whole,  # the router included
        "dense_ffn_parameters": whole,
        "active_ffn_parameters": after["ffn_parameters"],
        "dense_parameters": before.get("parameters"),
        "active_parameters": after["parameters"],
        "conversion_seconds": seconds,
        "dense_prefill_ms": before.get("prefill_ms"),
        "moe_prefill_ms": after["prefill_ms"],
        "prefill_speedup": before["prefill_ms"] / after["prefill_ms"] if before else None,
        "dense_decode_ms": before.get("decode_ms"),
        "moe_decode_ms": after["decode_ms"],
        "decode_speedup": before["decode_ms"] / after["decode_ms"] if before else None,
    }
    if args.json:
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in result.items()}
        lm.write_json(Path(args.json), finite)

    def row(name, form, value, ratio=None):
        cells = [form.format(value(side)) if side else "-" for side in (before, after)]
        if ratio and before:
            cells.append(f"{ratio(value(before), value(after)):.2f}x")
        print(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells))

    times = lambda dense, moe: moe / dense
    speedup = lambda dense, moe: dense / moe
    timed = min(TIMED_TOKENS + TIMED_STEPS, model.config.max_position_embeddings, eval_ids.numel())
    length = timed - min(TIMED_STEPS, timed // 2)
    print()
    row("", "{}", lambda side: side["name"])
    row("perplexity", "{:.2f}", lambda side: side["perplexity"], times)
    row(f"prefill, {length:,} tokens", "{:,.0f} ms", lambda side: side["prefill_ms"], speedup)
    row("decode, one token", "{:.1f} ms", lambda side: side["decode_ms"], speedup)
    row("layers with a dense FFN", "{}", lambda side: side["dense_layers"])
    row("active FFN parameters", "{:,}", lambda side: side["ffn_parameters"], times)
    row("active parameters", "{:,}", lambda side: side["parameters"], times)
    if seconds:
        print(f"conversion: {seconds:.1f} seconds")
    print()
    for side in (before, after):
        if side:
            print(f"{side['name']}: {' '.join(side['text'].split())}")
    if args.out:
        print(f"\nwrote {args.out}")


def main(argv: list[str] | None = None) -> int:
    return lm.run_command("ffn2moe", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
