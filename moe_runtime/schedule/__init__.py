"""The pipeline program as data: vocabulary, builders, passes, checker and text form. No torch here.

`build(name, num_ranks, num_microbatches)` gives a program of computations, `placement_of` the ranks of
its stages without building it; `lower(program)` checks it, adds the transfers and checks again.
`Program.to_text`, `Program.from_text` and `Program.check` read it. `check_lanes` compares programs that
lanes of one expert-parallel group made each for itself.
"""

from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program
from moe_runtime.schedule.builders import BUILDERS, admissible, build, nearest_microbatches, placement_of
from moe_runtime.schedule.check import Report
from moe_runtime.schedule.lane_agreement import check_lanes, collectives_of
from moe_runtime.schedule.passes import add_transfers, lower, merge_weight_grads, split_backward, unpair

__all__ = [
    "BUILDERS",
    "Action",
    "Entry",
    "Kind",
    "Overlap",
    "Program",
    "Report",
    "add_transfers",
    "admissible",
    "build",
    "check_lanes",
    "collectives_of",
    "lower",
    "merge_weight_grads",
    "nearest_microbatches",
    "placement_of",
    "split_backward",
    "unpair",
]
