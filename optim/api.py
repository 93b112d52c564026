"""The public names of the package, which `optim` loads when one of them is first used."""

from optim import cpu_jit, curvature, diagnostics
from optim.averaging import averages_in_place
from optim.block_rates import PAPER_RATIOS, Blockwise, Ratios, blockwise, example_parameters
from optim.fused import FusedBackward, fuse_backward
from optim.optimizer import Optimizer, Params
from optim.param_groups import (
    Assign,
    Assigned,
    SpareNorms,
    checked_assign,
    divide_groups,
    group_table,
    split_matrices,
    without_decay,
)
from optim.qk_clip import QKClip
from optim.registry import OPTIMIZERS, RULES, check_optimizer, create, rule_from
from optim.roles import block_of, is_matrix
from optim.rounding import Arrived, set_rounding
from optim.rule import State, UpdateRule
from optim.rules import *  # one line per optimizer, there
from optim.rules.divided import fused_note
from optim.rules.matrices import MatrixOptimizer
from optim.rules.wrappers.cautious import Cautious, Grams
from optim.rules.wrappers.low_rank import LowRank
from optim.rules.wrappers.quantized import Quantized
from optim.rules.wrappers.stable_embedding import StableEmbedding, stable_embedding_groups
from optim.saved import bare_name
from optim.schedules import SCHEDULES, group_factors, schedule, schedule_options
from optim.torch_states import to_torch_state
from optim.unknown import did_you_mean
from optim.update_map import Grads, UpdateMap
