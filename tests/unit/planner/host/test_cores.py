"""Ranks on shared cores: against sums done by hand, and the simulator of programs where cores suffice."""

import pytest

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.host.cores import Need, Operation, Send, Start, Wait, Work, run_on_cores
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule import BUILDERS, Program, build
from moe_runtime.schedule.action import actions_of
from moe_runtime.schedule.products import made_by, remote_needs, user_of


def ends(ranks: list[list[Operation]], cores: int) -> list[float]:
    return [round(each.end, 9) for each in run_on_cores(ranks, cores)]


@pytest.mark.parametrize(
    ("ranks", "cores", "end"), [(1, 1, 1.0), (2, 1, 2.0), (2, 2, 1.0), (4, 2, 2.0), (3, 2, 1.5)]
)
def test_cores_are_shared_alike(ranks: int, cores: int, end: float) -> None:
    assert ends([[Work(1.0)] for _ in range(ranks)], cores) == [end] * ranks


def test_the_shorter_one_leaves_its_share_to_the_others() -> None:
    # Both have half a core until the first has ended at 2; then the other has a whole one.
    assert ends([[Work(1.0)], [Work(3.0)]], 1) == [2.0, 4.0]


def test_a_rank_that_waits_lends_its_core() -> None:
    late = [Work(2.0), Send("m", 1, background=0.0)]
    found = run_on_cores([late, [Need("m"), Work(1.0)], [Work(2.0)]], 2)
    assert [each.end for each in found] == pytest.approx([2.0, 3.0, 2.0])
    assert found[1].waited_message == pytest.approx(2.0)


def test_an_exchange_begins_with_the_last_to_come_and_its_bytes_take_cores() -> None:
    def rank(work: float) -> list[Operation]:
        return [Work(work), Start("x", (0, 1), background=0.5), Wait("x"), Work(1.0)]

    found = run_on_cores([rank(1.0), rank(3.0)], 2)
    assert [each.end for each in found] == pytest.approx([4.5, 4.5])
    assert [each.waited_exchange for each in found] == pytest.approx([2.5, 0.5])


def test_background_work_goes_before_computation() -> None:
    ranks: list[list[Operation]] = [
        [Send("m", 1, background=0.5), Work(1.0)],
        [Need("m"), Work(0.25)],
    ]
    found = run_on_cores(ranks, 1)
    assert found[1].end == pytest.approx(1.0)  # half a second of background, then half a core each
    assert found[0].end == pytest.approx(1.75)


def test_messages_cross_a_link_one_after_the_other_and_take_no_core() -> None:
    first = [Send(n, 1, background=0.0, link_s=1.0) for n in range(3)]
    found = run_on_cores([[*first, Work(2.0)], [Need(0), Need(1), Need(2)]], 1)
    assert (found[0].end, found[1].end) == pytest.approx((2.0, 3.0))


def test_ranks_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        run_on_cores([[Need("a"), Send("b", 1, 0.0)], [Need("b"), Send("a", 0, 0.0)]], 2)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_with_a_core_for_each_rank_a_program_takes_what_the_simulator_says(name: str) -> None:
    ranks = 1 if name == "single" else 2
    program = build(name, ranks, 8)
    stages = tuple(StageCosts(1.0 + stage, 1.5, 0.75 + stage / 4) for stage in range(program.num_stages))
    costs = Costs(stages)
    found = run_on_cores([_operations(program, rank, costs) for rank in range(ranks)], ranks)
    assert max(each.end for each in found) == pytest.approx(simulate(program, costs).makespan)


def _operations(program: Program, rank: int, costs: Costs) -> list[Operation]:
    found: list[Operation] = []
    for entry in program.rows[rank]:
        found += [Need(need) for need in remote_needs(program, rank, entry)]
        found.append(Work(costs.compute(entry)))
        for action in actions_of(entry):
            product = made_by(action)
            user = None if product is None else user_of(program, product)
            if user is not None and user != rank:
                found.append(Send(product, user, background=0.0))
    return found
