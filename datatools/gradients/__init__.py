"""The gradient of each row of a batch: `per_sample_grads`, with its definition and its fast path."""

from datatools.gradients.batching import MicroBatches as MicroBatches
from datatools.gradients.batching import micro_batches as micro_batches
from datatools.gradients.batching import pieces as pieces
from datatools.gradients.batching import token_batches as token_batches
from datatools.gradients.checks import keep_gradients as keep_gradients
from datatools.gradients.layers import covered as covered
from datatools.gradients.memory import TokenBudget as TokenBudget
from datatools.gradients.memory import is_out_of_memory as is_out_of_memory
from datatools.gradients.per_sample import _Bound as _Bound
from datatools.gradients.per_sample import _frozen as _frozen
from datatools.gradients.per_sample import per_sample_grads as per_sample_grads
from datatools.gradients.per_sample import visit_per_sample_grads as visit_per_sample_grads
from datatools.gradients.types import Batch as Batch
from datatools.gradients.types import Loss as Loss
from datatools.gradients.types import Method as Method
from datatools.gradients.types import Visit as Visit
