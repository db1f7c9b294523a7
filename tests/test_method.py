"""The method: each step against brute force, a closed form or the official code's own outputs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, LLAMA, SHARED, random_model

import ffn2moe
import model as lm
from ffn2moe import balanced_assignment
from model import FFN, InputError, Split


def random_ffn(hidden_size=16, intermediate_size=48, seed=0, dtype=torch.float64) -> FFN:
    torch.manual_seed(seed)
    ffn = FFN(hidden_size, intermediate_size).to(dtype).requires_grad_(False)
    for p in ffn.parameters():
        p.uniform_(-1, 1).div_(p.shape[1] ** 0.5)
    return ffn


# --- Balanced assignment


def brute_force_cost(cost, capacity) -> float:
    slots = [b for b, c in enumerate(capacity) for _ in range(c)]
    return min(sum(cost[i, b] for i, b in enumerate(order)) for order in set(itertools.permutations(slots)))


@pytest.mark.parametrize("capacity", [(2, 2, 2), (1, 2, 4), (0, 3, 3), (7,), (3, 1, 1, 2), (1, 0, 5, 1)])
@pytest.mark.parametrize("kind", ["real", "integer with ties", "one bin is cheapest", "negative"])
def test_assignment_equals_brute_force(capacity, kind):
    random = np.random.default_rng(0)
    for _ in range(10):
        cost = random.random((sum(capacity), len(capacity)))
        if kind == "integer with ties":
            cost = np.floor(3 * cost)
        if kind == "one bin is cheapest":
            cost[:, 0] -= 5
        if kind == "negative":
            cost = -1000 * cost**3
        result = balanced_assignment(cost, capacity)
        assert np.bincount(result, minlength=len(capacity)).tolist() == list(capacity)
        total = cost[np.arange(len(cost)), result].sum()
        assert total == pytest.approx(brute_force_cost(cost, capacity), abs=1e-9)


@pytest.mark.parametrize("n, k, skew", [(500, 4, 0.0), (3000, 9, 1.0), (10000, 16, 3.0)])
def test_assignment_at_size_has_an_optimality_certificate(n, k, skew):
    """An assignment is optimal exactly if no cycle of moves between bins lowers its cost (Klein 1967)."""
    random = np.random.default_rng(1)
    cost = random.random((n, k)) + skew * random.random((1, k)) * random.pareto(2, (n, 1))
    capacity = np.full(k, n // k)
    capacity[0] += n - capacity.sum() + k
    capacity[-1] -= k
    result = balanced_assignment(cost, capacity)
    assert (np.bincount(result, minlength=k) == capacity).all()
    distance = np.zeros((k, k))
    for a in range(k):
        distance[a] = (cost[result == a] - cost[result == a, a, None]).min(axis=0)
    for b in range(k):  # Floyd-Warshall
        distance = np.minimum(distance, distance[:, b, None] + distance[None, b])
    assert distance.diagonal().min() >= -1e-9


def test_assignment_with_forbidding_costs():
    cost = np.array([[0, 1, 5], [0, 1e13, 1e13], [1e13, 0, 1]])
    assert balanced_assignment(cost, [1, 1, 1]).tolist() == [1, 0, 2]


def test_assignment_rejects_what_it_cannot_do():
    for cost, capacity in (
        (np.zeros((4, 2)), [2, 3]),
        (np.zeros((4, 2)), [4]),
        (np.zeros((4, 2)), [5, -1]),
        (np.array([[np.nan, 1.0]]), [1, 0]),
    ):
        with pytest.raises(ValueError):
            balanced_assignment(cost, capacity)
    assert len(balanced_assignment(np.zeros((0, 3)), [0, 0, 0])) == 0


# --- Profile, partition, router


def test_scores_and_markers_by_hand():
    ffn, x = random_ffn(), torch.randn(20, 16, dtype=torch.float64)
    scores = ffn2moe.normalized_scores(x, ffn.gate_proj, ffn.up_proj)
    markers = ffn2moe.atopk_markers(scores, k=5)
    for t in range(20):
        h = []
        for g, u in zip(ffn.gate_proj, ffn.up_proj):
            a = float(x[t] @ g / (x[t].norm() * g.norm()))
            h.append(a / (1 + np.exp(-a)) * float(x[t] @ u / (x[t].norm() * u.norm())))
        assert np.allclose(scores[t], h, atol=1e-6)
        assert set(np.argsort(np.abs(h))[-5:]) == set(markers[t].nonzero().flatten().tolist())
    rates = ffn2moe.activation_rates(markers)
    assert torch.allclose(rates, markers.double().mean(0).float())
    shared, rest = ffn2moe.split_shared(rates, 12)
    assert rates[shared].min() >= rates[rest].max() and len(set(shared.tolist()) | set(rest.tolist())) == 48


def test_l1_distances_equal_the_definition():
    torch.manual_seed(0)
    markers, centroids = torch.rand(5000, 7) < 0.2, torch.rand(5000, 3)
    expected = (markers.double()[:, :, None] - centroids.double()[:, None, :]).abs().sum(0)
    assert torch.allclose(ffn2moe.l1_distances(markers, centroids), expected, rtol=1e-12)


def test_partition_is_the_cheapest_and_complete():
    """On 12 neurons all balanced partitions can be tried."""
    torch.manual_seed(3)
    markers = torch.rand(200, 12) < torch.linspace(0.9, 0.05, 12)
    split = Split.parse("S1A1E4")
    bin_of, representatives = ffn2moe.partition_neurons(markers, split)
    shared, routed = ffn2moe.members(bin_of, 3)
    assert sorted([*shared.tolist(), *routed.flatten().tolist()]) == list(range(12))
    order = markers.sum(0).argsort(descending=True, stable=True)
    assert set(shared.tolist()) == set(order[:3].tolist()) and (bin_of[shared] == 0).all()
    assert (bin_of[routed] == torch.tensor([[1], [2], [3]])).all()
    distance = lambda i, j: float((markers[:, i] != markers[:, j]).sum())
    cost = np.array([[distance(i, seed) for seed in order[3:6]] for i in order[3:]])
    found = sum(distance(i, order[3 + e]) for e in range(3) for i in routed[e])
    assert found == brute_force_cost(cost, [3, 3, 3])
    for members, representative in zip(routed, representatives):
        mean = markers[:, members].double().mean(1)
        far = [(markers[:, i].double() - mean).abs().sum().item() for i in members]
        assert representative in members
        assert far[members.tolist().index(representative)] == pytest.approx(min(far))


@pytest.mark.parametrize("name", ["small", "s3a3e8", "s2a2e16"])
def test_official_fixtures(name):
    folder = Path(__file__).parent if name == "small" else SHARED / "reference"  # the large ones are not in the repository
    file = folder / f"official_{name}.npz"
    if not file.exists():
        pytest.skip("outputs of the official code are not here")
    official = {key: torch.from_numpy(value) for key, value in np.load(file).items()}
    split = Split(int(official["S"]), int(official["A"]), int(official["E"]))
    x, gate, up = official["x"], official["gate"], official["up"]
    markers = ffn2moe.atopk_markers(ffn2moe.normalized_scores(x, gate, up), int(official["K"]))
    rates = ffn2moe.activation_rates(markers)
    assert torch.equal(rates, official["rates"])
    shared, rest = ffn2moe.split_shared(rates, split.shared * len(gate) // split.total)
    assert set(shared.tolist()) == set(official["shared"].tolist())
    assert torch.equal(rest[: split.routed], official["seeds"])
    expert, _ = ffn2moe.group_routed(markers[:, rest], split.routed)
    cost = ffn2moe.l1_distances(markers[:, rest], markers[:, official["seeds"]].float())
    assert cost.gather(1, expert[:, None]).sum() == official["assignment_cost"]  # ties: another optimum may be found
    # From the official groups on, everything must agree.
    routed = official["routed"]
    expert = (rest[:, None, None] == routed).any(dim=2).float().argmax(dim=1)
    centroids = torch.stack([markers[:, members].float().mean(1) for members in routed], dim=1)
    representatives = rest[ffn2moe.representative_neurons(markers[:, rest], expert, centroids)]
    assert torch.equal(representatives, official["representatives"])
    ffn = FFN(x.shape[1], len(gate)).requires_grad_(False)
    for place, weight in ((ffn.gate_proj, gate), (ffn.up_proj, up), (ffn.down_proj, official["down"])):
        place.copy_(weight)
    router = ffn2moe.analytical_router(ffn, representatives)
    bin_of = torch.zeros(len(gate), dtype=torch.long)
    bin_of[routed] = torch.arange(1, 1 + split.routed)[:, None]
    moe = ffn2moe.build_moe(ffn, bin_of, router, split)
    assert torch.equal(moe.route(x)[0].sort().values, official["topk_experts"].sort().values)
    assert torch.allclose(moe(x), official["moe_out"], rtol=1e-5, atol=1e-3)  # values up to 1,700
    assert torch.allclose(ffn(x), official["dense_out"], rtol=1e-5, atol=1e-3)


# --- The layer


def converted_layer(split: str, seed=0):
    ffn, x = random_ffn(seed=seed), torch.randn(50, 16, dtype=torch.float64)
    split = Split.parse(split)
    scores = ffn2moe.normalized_scores(x, ffn.gate_proj, ffn.up_proj)
    bin_of, representatives = ffn2moe.partition_neurons(ffn2moe.atopk_markers(scores, 5), split)
    moe = ffn2moe.build_moe(ffn, bin_of, ffn2moe.analytical_router(ffn, representatives), split)
    return ffn, moe, bin_of, representatives, x


@pytest.mark.parametrize("split", ["S1A3E4", "S4A4E8", "S2A14E16", "S1A1E2"])
def test_with_all_experts_active_the_layer_is_the_dense_one(split):
    ffn, moe, _, _, x = converted_layer(split)
    assert torch.allclose(moe(x), ffn(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("split", ["S1A1E4", "S3A3E8", "S2A2E16"])
def test_layer_runs_the_highest_scored_experts(split):
    """Token by token and neuron by neuron, from the dense weights and the partition alone."""
    ffn, moe, bin_of, representatives, x = converted_layer(split)
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    active = Split.parse(split).active
    expected = torch.zeros_like(x)
    for t, token in enumerate(x):
        score = [
            abs(F.silu(token @ gate[r] / gate[r].float().norm()) * (token @ up[r] / up[r].float().norm())).item()
            for r in representatives
        ]
        chosen = np.argsort(score)[-active:].tolist()
        for i in [i for i, b in enumerate(bin_of.tolist()) if b == 0 or b - 1 in chosen]:
            expected[t] += F.silu(token @ gate[i]) * (token @ up[i]) * down[:, i]
    assert torch.allclose(moe(x), expected, rtol=0, atol=1e-12)


def test_bias_moves_the_choice_and_scale_the_weight():
    _, moe, _, _, x = converted_layer("S1A1E4")
    before, weights = moe.route(x)
    assert (weights == 1).all()
    p = (F.silu(x @ moe.router_gate.T) * (x @ moe.router_up.T)).abs().softmax(-1)
    moe.router_scale += torch.tensor([0.5, -1.0, 2.0])
    chosen, weights = moe.route(x)
    assert torch.equal(chosen, before)  # u weighs, it does not select
    assert torch.allclose(weights[:, 0], 1 + (p * moe.router_scale).gather(1, chosen)[:, 0], atol=1e-6)
    moe.router_bias += torch.tensor([0.0, 2.0, 0.0])  # p is at most 1: expert 1 must win for every token
    assert (moe.route(x)[0] == 1).all()


# --- The joint method


def test_ridge_solver_is_at_the_minimum():
    torch.manual_seed(0)
    x, y = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    w = ffn2moe.ridge_solver(x.T @ x, 0.1)(x.T @ y).double().requires_grad_()
    penalty = 0.1 * (x.T @ x).diagonal().median()
    (((x @ w - y) ** 2).sum() + penalty * (w**2).sum()).backward()
    assert w.grad.abs().max() < 1e-5 * (x.T @ y).abs().max()


def random_bins(q=48, m=6, shared=2, seed=0):
    bins = torch.arange(q // m - shared).repeat_interleave(m) + 1
    return torch.cat([torch.zeros(shared * m, dtype=torch.long), bins])[torch.randperm(q)]


def test_norms_and_captured_energy_equal_a_count_by_hand():
    torch.manual_seed(1)
    energy, bin_of = torch.rand(30, 48).double(), random_bins()
    chosen = torch.rand(30, 6).topk(2, dim=1).indices
    active = ffn2moe.active_bins(chosen, 6)
    norms = ffn2moe.expert_norms(energy, bin_of, 6)
    captured = 0.0
    for t in range(30):
        runs = {0, *(chosen[t] + 1).tolist()}
        assert active[t].nonzero().flatten().tolist() == sorted(runs)
        for e in range(6):
            members = [i for i in range(48) if bin_of[i] == e + 1]
            assert norms[t, e].item() == pytest.approx(sum(energy[t, i].item() for i in members) ** 0.5)
        captured += sum(energy[t, i].item() for i in range(48) if bin_of[i].item() in runs)
    assert ffn2moe.captured_energy(energy.T @ active.double(), bin_of) == pytest.approx(captured)


@pytest.mark.parametrize("capacity", [(4, 2, 2), (0, 3, 4), (1, 3, 1, 2), (7, 0, 1)])
def test_best_bins_capture_the_most(capacity):
    random = np.random.default_rng(0)
    for _ in range(10):
        gain = random.random((sum(capacity), len(capacity))) ** 3
        gain[:, 0] = gain.max(axis=1) + 0.1  # the shared bin always runs: every neuron is worth most there
        bin_of = ffn2moe.best_bins(torch.from_numpy(1e5 * gain), capacity).numpy()
        assert np.bincount(bin_of, minlength=len(capacity)).tolist() == list(capacity)
        assert -gain[np.arange(len(gain)), bin_of].sum() == pytest.approx(brute_force_cost(-gain, capacity))
    assert ffn2moe.best_bins(torch.zeros(6, 2), [2, 4]).bincount().tolist() == [2, 4]  # nothing to gain anywhere


def test_alternation_finds_groups_that_a_router_can_tell_apart():
    """Neurons of group e fire for inputs of kind e only, one group always: the alternation has to recover that."""
    torch.manual_seed(0)
    kind = torch.randint(4, (2000,))
    x = F.one_hot(kind, 4).float() + 0.1 * torch.randn(2000, 4)
    group = torch.arange(20)[torch.randperm(20)] % 5  # group 0 always fires
    energy = (torch.rand(2000, 20) + 0.5) * ((group == 0) | (group[None] == kind[:, None] + 1))
    start = torch.arange(20) % 5
    bin_of = ffn2moe.alternate(energy, x, start, [4] * 5, active=1, rounds=8)
    assert (bin_of[group == 0] == 0).all()
    for g in range(1, 5):
        assert len(bin_of[group == g].unique()) == 1


def test_alternation_ends_when_it_captures_no_more(monkeypatch):
    torch.manual_seed(0)
    x, energy, start = torch.randn(300, 4), torch.rand(300, 20), torch.arange(20) % 5
    assert torch.equal(ffn2moe.alternate(energy, x, start, [4] * 5, 1, rounds=0), start)
    calls, best_bins = [], ffn2moe.best_bins
    monkeypatch.setattr(ffn2moe, "best_bins", lambda gain, capacity: calls.append(gain) or best_bins(gain, capacity))
    end = ffn2moe.alternate(energy, x, start, [4] * 5, 1, rounds=1000)
    assert 1 < len(calls) < 100
    gains = calls.copy()
    assert torch.equal(ffn2moe.alternate(energy, x, end, [4] * 5, 1, rounds=1000), end)  # nothing left to improve
    # In each round the assignment of the round before, under the router that was made for it, captures more.
    rounds = [ffn2moe.alternate(energy, x, start, [4] * 5, 1, rounds=n) for n in range(len(gains))]
    captured = [ffn2moe.captured_energy(gain, bin_of) for gain, bin_of in zip(gains, rounds, strict=True)]
    assert captured == sorted(captured) and captured[-1] > captured[0]
    # If the assignment step made things worse, the assignment before it would be kept.
    worst_bins = lambda gain, capacity: best_bins(gain.max() - gain, capacity)
    monkeypatch.setattr(ffn2moe, "best_bins", worst_bins)
    assert torch.equal(ffn2moe.alternate(energy, x, end, [4] * 5, 1, rounds=1000), end)


def linear_moe(split="S2A2E8"):
    ffn, x = random_ffn(dtype=torch.float32), torch.randn(400, 16)
    split = Split.parse(split)
    return ffn, x, split, ffn2moe.partition_and_router(ffn, x, split)[0]


def test_partition_is_found_in_two_alternations(monkeypatch):
    """The first decides which neurons are shared; the second moves the others, for what the shared cannot predict."""
    monkeypatch.setattr(ffn2moe, "STORED", torch.float32)
    ffn, x = random_ffn(16, 192, dtype=torch.float32), torch.randn(400, 16)
    bin_of, _ = ffn2moe.partition_and_router(ffn, x, Split.parse("S2A2E8"))
    assert bin_of.bincount().tolist() == [48] + [24] * 6
    x = ffn2moe.draw(x, ffn2moe.SAMPLE_TOKENS)
    energy = (ffn2moe.hidden(ffn, x) * ffn.down_proj.norm(dim=0)) ** 2
    start = torch.empty(192, dtype=torch.long)
    start[energy.sum(dim=0).argsort(descending=True)] = torch.tensor([0] * 48 + [1, 2, 3, 4, 5, 6] * 24)
    first = ffn2moe.alternate(energy, x, start, [48] + [24] * 6, 2, 8)
    assert torch.equal(first == 0, bin_of == 0) and not torch.equal(first, start)
    routed = first > 0
    unpredicted = ffn2moe.unpredicted_energy(ffn2moe.hidden(ffn, x), ffn.down_proj, first)
    second = ffn2moe.alternate(unpredicted, x, first[routed], [0] + [24] * 6, 2, 8)
    assert torch.equal(second, bin_of[routed]) and not torch.equal(second, first[routed])


def test_unpredicted_energy_is_what_least_squares_leaves(monkeypatch):
    monkeypatch.setattr(ffn2moe, "STORED", torch.float32)
    monkeypatch.setattr(ffn2moe, "HIDDEN_RIDGE", 0.0)
    ffn, x, _, bin_of = linear_moe()
    h, shared = ffn2moe.hidden(ffn, x).double(), bin_of == 0
    rest = h - h[:, shared] @ torch.linalg.lstsq(h[:, shared], h).solution
    expected = ((rest * ffn.down_proj.double().norm(dim=0)) ** 2)[:, ~shared]
    assert torch.allclose(ffn2moe.unpredicted_energy(h.float(), ffn.down_proj, bin_of).double(), expected, atol=1e-4)


def test_router_is_the_ridge_optimum_up_to_what_moves_no_choice():
    ffn, x, _, bin_of = linear_moe()
    energy = ffn2moe.unpredicted_energy(ffn2moe.hidden(ffn, x), ffn.down_proj, bin_of)
    router = ffn2moe.ridge_router(energy, x, bin_of[bin_of > 0], 6)
    norms = ffn2moe.expert_norms(energy, bin_of[bin_of > 0], 6).double()
    inputs = x.double()
    penalty = ffn2moe.ROUTER_RIDGE * (inputs.T @ inputs).diagonal().median()
    scores = inputs @ torch.linalg.solve(inputs.T @ inputs + penalty * torch.eye(16).double(), inputs.T @ norms)
    scores -= scores.mean(dim=1, keepdim=True)
    found = (x @ router["router_weight"].T).double() / ffn2moe.ROUTER_SCALE
    assert torch.allclose(found, scores / scores.abs().max(), atol=1e-4)


def test_linear_layer_runs_the_highest_scored_experts():
    """Token by token, from the partition, the scores and the refitted columns."""
    ffn, x, split, bin_of = linear_moe()
    moe = ffn2moe.joint_layer(ffn, x, split)
    assert torch.equal(moe.bin_of, bin_of)
    down = torch.empty(16, 48)
    down[:, bin_of == 0] = moe.shared_expert.down_proj
    for e in range(6):
        down[:, bin_of == 1 + e] = moe.down_proj[e]
    for token in x[:20]:
        scores = moe.router_weight @ token
        best = scores.argsort()[-2:]
        weights = torch.tensor([1.0] + [0.0] * 6).scatter(0, best + 1, scores[best].softmax(0))
        h = ffn2moe.hidden(ffn, token[None])[0] * weights[bin_of]
        assert torch.allclose(moe(token[None])[0], down @ h, atol=1e-5)


def test_refit_is_the_ridge_optimum(monkeypatch):
    """Its gradient is zero, next to what it is for half or twice the penalty; whatever the block size."""
    ffn, x, split, bin_of = linear_moe()
    moe = ffn2moe.joint_layer(ffn, x, split, refit=False)

    def active(block):
        chosen, weights = moe.route(block)
        return ffn2moe.active_bins(chosen, 6, 2 * weights)

    old, fitted = ffn.down_proj.double(), ffn2moe.refit_down(ffn, x, active, bin_of).double()
    h = ffn2moe.hidden(ffn, x).double()
    running = h * active(x)[:, bin_of]
    penalty = ffn2moe.HIDDEN_RIDGE * running.square().sum(dim=0).median()

    def gradient(penalty):
        weight = fitted.clone().requires_grad_()
        (((running @ weight.T - h @ old.T) ** 2).sum() + penalty * ((weight - old) ** 2).sum()).backward()
        return weight.grad.norm()

    assert gradient(penalty) < 0.02 * min(gradient(penalty / 2), gradient(penalty * 2))
    monkeypatch.setattr(ffn2moe, "BLOCK", 33)
    assert torch.allclose(ffn2moe.refit_down(ffn, x, active, bin_of).double(), fitted, atol=1e-5)
    before = ((moe(x) - ffn(x)) ** 2).sum()
    ffn2moe.refit_moe(ffn, moe, x)
    assert torch.allclose(moe(x), (running @ fitted.T).float(), atol=1e-4)
    assert ((moe(x) - ffn(x)) ** 2).sum() < 0.8 * before


def test_a_few_huge_neurons_do_not_switch_ridge_off():
    """Two of 40 neurons are huge for one token: the others are fitted as well as without that token."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=random)
    y = x @ torch.randn(40, 8, generator=random)
    x[0, :2], y[0] = 1e5, 0
    w = ffn2moe.ridge_solver(x.T @ x, 1e-3)(x.T @ y)
    rest = x[1:].clone()
    rest[:, :2] = 0
    alone = torch.linalg.lstsq(rest[:, 2:].double(), y[1:].double()).solution
    assert (w[2:].double() - alone).norm() / alone.norm() < 0.02


def test_a_singular_system_gets_a_larger_penalty_and_a_broken_one_a_sentence():
    x = torch.ones(50, 1) @ torch.rand(1, 30) * 1e3  # of rank one
    w = ffn2moe.ridge_solver(x.T @ x, 1e-12)(x.T @ x[:, :3])
    assert torch.allclose(x @ w, x[:, :3], rtol=1e-2)
    with pytest.raises(InputError, match="overflow"):
        ffn2moe.ridge_solver(torch.eye(3), 0.1)(torch.full((3, 1), torch.inf))


def test_the_refit_adds_up_in_float32_whatever_the_dtype():
    """W_down (h - h~) is beyond float16 for one token; what comes out is as in float32."""
    ffn, x, split, bin_of = linear_moe()
    ffn.down_proj.mul_(30)
    x[0] *= 100
    half = FFN.of(ffn.gate_up_proj.half(), ffn.down_proj.half())
    never = lambda block: torch.tensor([1.0, *[0.0] * 6]).expand(len(block), 7)
    assert (ffn(x[:1]).abs() > 65504).any()
    found, expected = (ffn2moe.refit_down(f, x.to(f.down_proj), never, bin_of).float() for f in (half, ffn))
    assert found.isfinite().all() and (found - expected).norm() < 0.05 * expected.norm()
    half.down_proj.mul_(8000)  # times A it is beyond float16
    moe = ffn2moe.build_moe(half, bin_of, {"router_weight": torch.zeros(6, 16).half()}, split)
    with pytest.raises(InputError, match="choose another dtype"):
        ffn2moe.refit_moe(half, moe, x.half())


def test_experts_run_with_nearly_the_same_weight_even_for_huge_inputs():
    ffn, x, split, _ = linear_moe()
    x[7] *= 100
    weights = ffn2moe.joint_layer(ffn, x, split).route(x)[1]
    assert (2 * weights - 1).abs().max() < 0.07  # e^(1/16)


def test_a_sample_is_drawn_from_all_of_the_text():
    rows = ffn2moe.draw(torch.arange(1000)[:, None], 100)[:, 0]
    assert len(rows.unique()) == 100 and rows.min() < 100 and rows.max() > 900
    assert sorted(ffn2moe.draw(torch.arange(50)[:, None], 100)[:, 0].tolist()) == list(range(50))


@pytest.mark.parametrize("split", ["S1A3E4", "S4A4E8"])
def test_joint_layer_with_all_experts_active_is_the_dense_one(split, even_weights):
    ffn, x = random_ffn(dtype=torch.float32), torch.randn(200, 16)
    moe = ffn2moe.joint_layer(ffn, x, Split.parse(split), rounds=2)
    assert torch.allclose(moe(x), ffn(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_beats_the_paper_where_it_can_be_seen(dtype):
    """Output error of one layer on tokens that neither has seen; each part of the method has its share."""
    ffn, split = random_ffn(32, 128, dtype=dtype), Split.parse("S2A2E16")
    centres = 2 * torch.randn(6, 32)
    tokens = lambda n: (centres[torch.randint(6, (n,))] + torch.randn(n, 32)).to(dtype)
    x, new = tokens(3000), tokens(500)
    error = lambda moe: (((moe(new) - ffn(new)).float() ** 2).sum() / (ffn(new).float() ** 2).sum()).item()
    joint, paper = ffn2moe.joint_layer(ffn, x, split), ffn2moe.paper_layer(ffn, x, split)
    unfitted = ffn2moe.joint_layer(ffn, x, split, refit=False)
    dealt = ffn2moe.joint_layer(ffn, x, split, rounds=0)
    assert error(joint) < 0.7 * error(paper)
    assert error(joint) < 0.9 * error(unfitted) and error(joint) < 0.97 * error(dealt)


# --- Which layers to convert


def test_conversion_losses_are_the_fisher_form(monkeypatch):
    """g by autograd of a perturbation of the FFN's output in place of hooks, e neuron by neuron; labels: the likeliest."""
    model, windows = random_model(LLAMA, dtype=torch.float64), torch.arange(60).view(2, 30)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(dim=-1, keepdim=True))
    found = ffn2moe.conversion_losses(model, windows)
    assert not any(layer.mlp._forward_hooks for layer in model.layers) and not model.embed_tokens._forward_hooks
    labels = [model(window[None])[0].argmax(dim=-1) for window in windows]
    for i, layer in enumerate(model.layers):
        ffn, expected, inputs = layer.mlp, 0.0, []
        for window, label in zip(windows, labels):
            delta = torch.zeros(30, 32, dtype=torch.float64, requires_grad=True)
            remember = lambda _, x, y, inputs=inputs, delta=delta: inputs.append(x[0][0].detach()) or y + delta
            hook = ffn.register_forward_hook(remember)
            logp = model(window[None])[0].log_softmax(dim=-1)
            hook.remove()
            (g,) = torch.autograd.grad(logp.gather(1, label[:, None]).sum(), delta)
            h = F.silu(inputs[-1] @ ffn.gate_proj.T) * (inputs[-1] @ ffn.up_proj.T)
            energy = [(h[:, n, None] * ffn.down_proj[:, n]).square().sum().item() for n in range(64)]
            least = sorted(range(64), key=energy.__getitem__)[:32]
            e = sum(h[:, n, None] * ffn.down_proj[:, n] for n in least)
            expected += 0.5 * ((g * e).sum(dim=1) ** 2).sum().item() / 60
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_dense_layers_are_those_of_largest_loss_within_the_budget(monkeypatch):
    model, ids = random_model(LLAMA | {"num_hidden_layers": 8}), torch.arange(200).view(2, 100)
    losses = torch.tensor([5.0, 1, 2, 8, 3, 7, 4, 6])
    monkeypatch.setattr(ffn2moe, "conversion_losses", lambda model, windows: losses)
    for active, dense in ((0.75, {0, 3, 5, 7}), (0.8, {0, 3, 5, 7}), (0.5, set()), (0.1, set()), (1.0, set(range(8)) - {1})):
        assert ffn2moe.choose_dense(model, ids, Split.parse("S2A2E8"), active) == dense
    assert ffn2moe.choose_dense(model, ids, Split.parse("S2A6E8"), 0.5) == set()  # nothing is saved anywhere
    ffn2moe.convert(model, ids, "S2A2E8", active=0.75)
    assert [isinstance(ffn, int) for ffn in model.config.ffns] == [i in {0, 3, 5, 7} for i in range(8)]


def test_layers_are_written_as_ranges():
    for text, layers in (("none", set()), ("3", {3}), ("0-2", {0, 1, 2}), ("0-1,5,7-9", {0, 1, 5, 7, 8, 9})):
        assert ffn2moe.parse_layers(text) == layers and ffn2moe.format_layers(layers) == text
    for text in ("", "1-", "a", "1,,2", "-1"):
        with pytest.raises(InputError, match="numbers and ranges"):
            ffn2moe.parse_layers(text)


def test_dense_layers_between_sparse_ones_are_passed_through():
    """Layers 0 and 2 are converted, 1 is not: layer 2 is profiled on what the converted layer 0 leads to."""
    model, ids, inputs = random_model(LLAMA), torch.arange(200).view(2, 100), {}
    replacement = lambda i, ffn, x: inputs.setdefault(i, x) is x and FFN.of(0.5 * ffn.gate_up_proj, ffn.down_proj)
    ffn2moe.replace_ffns(model, ids, replacement, dense={1})
    seen = []
    model.layers[2].mlp.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    model(ids)
    assert list(inputs) == [0, 2] and torch.allclose(seen[0].flatten(0, 1), inputs[2], atol=1e-5)


def test_versions_are_timed_in_turns_and_the_model_is_left_as_it_was():
    model, ran = random_model(LLAMA), []
    now = [layer.mlp for layer in model.layers]
    others = [FFN.of(ffn.gate_up_proj, ffn.down_proj) for ffn in now]
    for name, ffn in (("a", now[0]), ("b", others[0])):
        ffn.register_forward_hook(lambda _, x, y, name=name: ran.append((name, x[0].shape[1])))
    times = ffn2moe.time_in_turns(model, torch.arange(100), {"a": now, "b": others}, turns=2)
    one_turn = lambda name: [(name, 84), *[(name, 1)] * 16]
    assert ran == 2 * (one_turn("a") + one_turn("b")) and [layer.mlp for layer in model.layers] == now
    assert all(ms > 0 for pair in times.values() for ms in pair)


# --- The whole model


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_model_with_all_experts_active_is_the_dense_model(name, even_weights):
    model, ids = random_model(CONFIGS[name], dtype=torch.float64), torch.arange(250).view(2, 125)
    dense = model(ids)
    assert torch.allclose(ffn2moe.convert(model, ids, "S2A6E8", "paper")(ids), dense, rtol=0, atol=1e-10)
    model = random_model(CONFIGS[name], dtype=torch.float64)
    assert torch.allclose(ffn2moe.convert(model, ids, "S2A6E8", "joint", dense=[0])(ids), dense, rtol=0, atol=1e-4)


def test_layers_are_profiled_on_what_converted_layers_put_out():
    dense, model = random_model(LLAMA), random_model(LLAMA)
    ids = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(0))
    reports = []
    ffn2moe.convert(model, ids, "S1A1E8", "paper", k_act=6, report=reports.append)
    inputs = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: inputs.append(args[0].flatten(0, 1)))
    model(ids)
    for i, (x, report) in enumerate(zip(inputs, reports, strict=True)):
        ffn = dense.layers[i].mlp
        markers = ffn2moe.atopk_markers(ffn2moe.normalized_scores(x, ffn.gate_proj, ffn.up_proj), 6)
        assert torch.allclose(ffn2moe.activation_rates(markers), report.rates, atol=0.01)
        chosen = model.layers[i].mlp.route(x)[0].flatten()
        assert torch.allclose(chosen.bincount(minlength=7) / len(x), report.load, atol=0.01)
        assert report.load.sum().item() == pytest.approx(1.0)  # A = 1
    whole = random_model(LLAMA)
    ffn2moe.convert(whole, ids.flatten(), "S1A1E8", "paper", k_act=6, window=100)  # the same windows, cut from a flat text
    assert torch.equal(whole(ids), model(ids))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": "S3A3E7"}, "not divisible by E = 7"),
        ({"experts": "S5A4E8"}, "S \\+ A = 9 is more than E = 8"),
        ({"experts": "S0A4E8"}, "S >= 1"),
        ({"experts": "S4A0E8"}, "A >= 1"),
        ({"experts": "8 experts"}, "S3A3E8"),
        ({"k_act": 65}, "k_act = 65"),
        ({"k_act": 0}, "k_act = 0"),
        ({"method": "magic"}, "magic"),
        ({"dense": [0, 1, 2]}, "leave none of the 3 layers"),
        ({"dense": "1-3"}, "the model has 3"),
        ({"calib_ids": torch.zeros(0, 20, dtype=torch.long)}, "no calibration tokens"),
        ({"calib_ids": torch.full((1, 20), 300)}, "vocabulary of 300"),
        ({"calib_ids": torch.zeros(20, dtype=torch.long)}, "20 tokens"),
    ],
)
def test_convert_refuses_and_leaves_the_model_alone(change, message):
    model, ids = random_model(LLAMA), torch.arange(100).view(1, 100)
    before = model(ids)
    with pytest.raises(InputError, match=message):
        ffn2moe.convert(model, **({"calib_ids": ids, "dense": "none"} | change))
    assert torch.equal(model(ids), before)


def test_the_first_layers_stay_dense():
    model, ids = random_model(LLAMA), torch.arange(100).view(1, 100)
    first = model.layers[0].mlp
    reports = []
    ffn2moe.convert(model, ids, "S2A2E8", dense=[0], report=reports.append)
    assert model.layers[0].mlp is first and [getattr(ffn, "split", ffn) for ffn in model.config.ffns] == [64, (2, 2, 8), (2, 2, 8)]
    assert [report.layer for report in reports] == [1, 2]
    ffn, _ = lm.active_parameters(model)
    router = 6 * (32 + 1 + 1)  # weight, scale, bias
    assert ffn == 3 * 32 * 64 + 2 * (3 * 32 * 64 // 2 + router)


def test_a_model_that_overflows_is_refused():
    model, ids = random_model(LLAMA), torch.arange(100).view(1, 100)
    model.layers[1].self_attn.o_proj.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="layer 1 are not finite"):
        ffn2moe.convert(model, ids, dense=[])
    model = random_model(LLAMA, dtype=torch.float16)
    model.layers[1].mlp.gate_up_proj.fill_(3e4)
    with pytest.raises(InputError, match="hidden activations overflow"):
        ffn2moe.convert(model, ids, "S2A2E8", dense=[])


def test_active_parameters_count_what_a_token_touches():
    model, ids = random_model(LLAMA), torch.arange(100).view(1, 100)
    dense_ffn, dense_all = lm.active_parameters(model)
    assert dense_ffn == 3 * 3 * 32 * 64 and dense_all == sum(p.numel() for p in model.parameters())
    ffn, total = lm.active_parameters(ffn2moe.convert(model, ids, "S3A3E8", "paper"))
    router = 5 * (32 + 32 + 1 + 1)  # gate and up rows, scale, bias
    assert ffn == 3 * (3 * 32 * 64 * 6 // 8 + router) and dense_all - total == dense_ffn - ffn


# --- 7. What experts are for


def test_chosen_experts_are_those_that_score_highest():
    model = ffn2moe.convert(random_model(LLAMA), torch.arange(200) % 300, "S2A2E8", dense=[0], window=100)
    windows = torch.arange(60).view(2, 30)
    found = ffn2moe.chosen_experts(model, windows, 2)
    rope, x = model.rope(0, 30), model.embed_tokens(windows)
    for layer in model.layers[:2]:
        x = layer(x, rope)
    last = model.layers[2]
    x = last.post_attention_layernorm(x + last.self_attn(last.input_layernorm(x), rope)).flatten(0, 1)
    scores = x @ last.mlp.router_weight.T  # [60, 6]
    for row, experts in zip(scores, found):
        assert sorted(experts.tolist()) == sorted(row.argsort(descending=True)[:2].tolist())
    assert not last.mlp._forward_pre_hooks


def test_favourite_words():
    """Expert 0 runs for "cat", 1 for "dog", 2 for every other word; "12" is no word; and what all choose alike, or one does once, is nobody's."""
    words = (["cat", "dog", "the", "12"] * 10) + ["rare"]
    expert = [0, 1, 2, 2] * 10 + [2]
    chosen = torch.tensor([[e, 3] for e in expert])
    likes = ffn2moe.favourite_words(words, chosen, 5, n=2)
    assert likes == [["cat"], ["dog"], ["the"], [], []]


def test_explain(checkpoint, text, capsys):
    argv = ["--model", str(checkpoint), "--eval", str(text), "--calib", str(text), "--window", "64", "--calib-tokens", "256"]
    argv += ["--experts", "S1A2E8", "--dense", "0"]
    assert ffn2moe.main([*argv, "--explain", "The old house", "--layer", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    tokens = [line.split() for line in printed if set(line.split()[-1:][0] if line.split() else "") == {"#", "."}]
    assert "".join(word for word, _ in tokens) == "Theoldhouse" and all(len(runs) == 7 and runs.count("#") == 2 for _, runs in tokens)
    assert sum(line.startswith("expert ") for line in printed) == 7 and not any("perplexity" in line for line in printed)
    for layer in ("0", "3", "-1"):  # before the long work
        assert ffn2moe.main([*argv, "--explain", "The", "--layer", layer]) == 2
        assert f"layer {layer} is no MoE; these are: 1, 2" in capsys.readouterr().err
