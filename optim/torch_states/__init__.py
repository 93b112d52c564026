"""State dicts of torch's optimizers, read as those of the rules here and written from them.

Each torch optimizer that has a counterpart here is one file and one line in `COUNTERPARTS`.
"""

from optim.torch_states.states import COUNTERPARTS as COUNTERPARTS
from optim.torch_states.states import counterpart as counterpart
from optim.torch_states.states import described as described
from optim.torch_states.states import kept_keys as kept_keys
from optim.torch_states.states import native as native
from optim.torch_states.states import to_torch_state as to_torch_state
