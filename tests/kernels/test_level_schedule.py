"""Level waves of the weight gradients, played on a CPU: every lane of a warp is a thread.

Legend: unit = what one cluster computes at once, wave = at most one unit for every cluster.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cutlass")
from sonicmoe_kernels.cute import schedule_k

from tests.kernels.symbols import rebind

LANES = 4  # of a warp here
TRACKED = 3  # clusters of a lane
lane_of = threading.local()


class Warp:
    """What the lanes of a warp do together."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(LANES)
        self.given: list[Any] = [None] * LANES

    def exchange(self, value: Any) -> list[Any]:
        self.given[lane_of.number] = value
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every

    def redux(self, value: int, kind: str) -> int:
        return {"min": min, "max": max}[kind](self.exchange(value))

    def ballot(self, value: bool) -> int:
        return sum(1 << lane for lane, vote in enumerate(self.exchange(value)) if vote)

    def play(self, body: Callable[[], Any]) -> list[Any]:
        """What `body` returns in each lane."""
        found: list[Any] = [None] * LANES

        def live(lane: int) -> None:
            lane_of.number = lane
            found[lane] = body()

        threads = [threading.Thread(target=live, args=(lane,)) for lane in range(LANES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def schedule(warp: Warp) -> dict[str, Any]:
    """The functions of schedule_k.py, with Python's numbers and this warp."""
    arch = SimpleNamespace(
        lane_idx=lambda: lane_of.number,
        warp_redux_sync=warp.redux,
        vote_ballot_sync=warp.ballot,
        popc=lambda word: word.bit_count(),
    )
    names: dict[str, Any] = {
        "cutlass": SimpleNamespace(range_constexpr=range, min=min, max=max),
        "cute": SimpleNamespace(size=len, make_rmem_tensor=lambda size, _: [0] * size, arch=arch),
        "Float32": float,
        "Int32": int,
        "Uint32": int,
        "bits_below": lambda lane: (1 << lane) - 1,
        "WARP": LANES,
    }
    for name in ("unit_of", "uneven", "start_loads", "join_wave", "next_level_unit"):
        names[name] = rebind(getattr(schedule_k, name).__wrapped__, names)
    return names


def played(costs: list[int], clusters: int) -> list[list[int]]:
    """The units that each cluster takes, as all lanes of its warps find them."""

    def cost(unit: int) -> int:
        return costs[min(unit, len(costs) - 1)]

    def taken_by(cluster: int) -> list[int]:
        warp = Warp()
        names = schedule(warp)

        def body() -> list[int]:
            loads, following = [0] * TRACKED, [0, 0]
            names["start_loads"](loads, lane_of.number, clusters)
            units: list[int] = []
            while not units or units[-1] < len(costs):
                found = names["next_level_unit"](loads, following, cluster, len(costs), cost)
                units.append(found)
            return units[:-1]

        first, *others = warp.play(body)
        assert all(other == first for other in others)
        return first

    return [taken_by(cluster) for cluster in range(clusters)]


def expected(costs: list[int], clusters: int) -> list[list[int]]:
    """The rule in plain Python."""
    loads, taken, base, wave = [0] * clusters, [[] for _ in range(clusters)], 0, 0
    while base < len(costs):
        least = min(loads)
        joining = [c for c in range(clusters) if loads[c] - least < costs[base]]
        if wave % 2:
            joining.reverse()
        for unit, cluster in enumerate(joining, base):
            if unit < len(costs):
                taken[cluster].append(unit)
                loads[cluster] += costs[unit]
        base, wave = base + len(joining), wave + 1
    return taken


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, LANES * TRACKED),
    st.lists(st.sampled_from([2, 3, 9, 40, 300]), min_size=1, max_size=40),
)
def test_all_warps_agree_on_the_waves_of_the_rule(clusters, costs):
    costs = sorted(costs, reverse=True)
    found = played(costs, clusters)
    assert found == expected(costs, clusters)
    assert sorted(unit for units in found for unit in units) == list(range(len(costs)))


def test_units_in_any_order_are_each_taken_once():
    """As where there are more experts than are sorted."""
    costs = [2, 50, 2, 2, 9, 300, 2, 2, 2, 70, 2, 2, 2, 2, 8, 2]
    found = played(costs, 5)
    assert sorted(unit for units in found for unit in units) == list(range(len(costs)))


@pytest.mark.parametrize("clusters", [5, 12])
def test_balanced_units_are_taken_as_without_levels(clusters):
    costs = [26, 26, 25, 25, 25, 24, 24, 24, 24, 23] * 4
    costs = sorted(costs, reverse=True)
    unit_of = schedule(Warp())["unit_of"]
    waves = range(-(-len(costs) // clusters))
    plain = [
        [unit for wave in waves if (unit := unit_of(wave, cluster, clusters)) < len(costs)]
        for cluster in range(clusters)
    ]
    assert played(costs, clusters) == plain


def test_few_large_experts_leave_no_cluster_with_much_more_than_its_part():
    """Zipf(1.2) over 128 experts, no one with more than T rows; 12 units each, 66 clusters."""
    parts = [(rank + 1) ** -1.2 for rank in range(128)]
    rows = [min(24576, int(196608 * part / sum(parts))) for part in parts]
    costs = [-(-r // 64) + 1 for r in rows for _ in range(12)]
    mean, clusters = sum(costs) / 66, 66
    assert schedule(Warp())["uneven"](rows[0], sum(rows), 128, 12, clusters)
    level = max(sum(costs[unit] for unit in units) for units in expected(costs, clusters))
    loads = [0] * clusters
    for unit, cost in enumerate(costs):  # a wave for everybody
        wave, place = divmod(unit, clusters)
        loads[clusters - 1 - place if wave % 2 else place] += cost
    assert level < 1.01 * max(mean, costs[0])
    assert max(loads) > 1.2 * level


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([1536] * 128, 0),
        ([3000] + [1536] * 127, 0),  # less than twice the mean
        ([6000] + [1536] * 127, 1),
        ([0] * 128, 0),
        ([24576] + [0] * 127, 1),
    ],
    ids=["balanced", "nearly", "skewed", "no rows", "one expert"],
)
def test_level_waves_are_left_to_skewed_routings(rows, wanted):
    uneven = schedule(Warp())["uneven"]
    assert uneven(max(rows), sum(rows), len(rows), 6, 66) == wanted
    # with so many units each cluster gets a part of every expert
    assert uneven(max(rows), sum(rows), len(rows), 10000, 66) == 0
