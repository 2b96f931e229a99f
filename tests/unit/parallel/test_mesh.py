"""Which ranks belong together, for every small layout."""

import itertools

import pytest

from moe_runtime.parallel.mesh import Mesh

SHAPES = [
    (pp, dp, ep, mirrored)
    for pp, dp, ep, mirrored in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (False, True))
    if dp % ep == 0 and not (mirrored and pp % 2)
]


@pytest.mark.parametrize(("pp", "dp", "ep", "mirrored"), SHAPES)
def test_every_rank_is_in_one_group_of_each_kind(pp: int, dp: int, ep: int, mirrored: bool) -> None:
    mesh = Mesh(pp, dp, ep, mirrored, rank=0)
    for lists in (
        mesh.data_groups(),
        mesh.expert_groups(),
        mesh.expert_data_groups(),
        mesh.norm_groups(),
        mesh.pipe_groups(),
    ):
        assert sorted(rank for ranks in lists for rank in ranks) == list(range(pp * dp))


def _stages(mesh: Mesh) -> set[int]:
    return {mesh.pp_rank, mesh.pp - 1 - mesh.pp_rank} if mesh.is_mirrored else {mesh.pp_rank}


@pytest.mark.parametrize(("pp", "dp", "ep", "mirrored"), SHAPES)
def test_the_norm_group_times_the_owners_covers_each_stage_once(
    pp: int, dp: int, ep: int, mirrored: bool
) -> None:
    ranks = [Mesh(pp, dp, ep, mirrored, rank) for rank in range(pp * dp)]
    owners = [mesh for mesh in ranks if mesh.is_stage_owner]
    assert sorted(stage for mesh in owners for stage in _stages(mesh)) == list(range(pp))
    for group in ranks[0].norm_groups():
        assert sorted(stage for rank in group for stage in _stages(ranks[rank])) == list(range(pp))


def test_expert_groups_are_contiguous_and_expert_data_groups_share_experts() -> None:
    mesh = Mesh(pp=2, dp=4, ep=2, is_mirrored=True, rank=5)
    assert mesh.expert_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.expert_data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.replicas) == (1, 1, 1, 8)
