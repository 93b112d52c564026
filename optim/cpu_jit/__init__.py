"""Steps on the CPU, compiled from the rules' own definition: `UpdateRule.update`, traced once, as one loop over memory.

A step is bound by memory, and written in tensor operations it moves every parameter a dozen times. Here the operations
of `update` and `decay` are recorded (`trace`), turned into LLVM assembly (`assembly`) and compiled by llvmlite, at the
first step of a rule, in 0.1 s or so. Learning rate, weight decay and the numbers that the rule computes with stay
variables: a scheduled momentum is traced again at each change, in some milliseconds, and not compiled again. All
tensors of a param group are stepped by one call, spread over ``torch.get_num_threads()`` threads; results do not depend
on their number.

Tensors that a rule must read several times are stepped whole by one thread while they fit into a cache. The check that
gradients are finite, which rules with ``elementwise = False`` need, is made in the first of these readings; and what
stands in a branch of ``torch.where`` is not read where its scalar condition chooses the other one.

What cannot be compiled is stepped by `UpdateRule.step`, tensor by tensor: rules with operations that have no element
loop (products of matrices), rules called elementwise that look at the shape, rules that override `step` or have a
field that cannot be hashed, tensors that are not dense or not on the CPU, subclasses such as DTensor, and everything
where llvmlite is missing or with OPTIM_BACKEND=torch in the environment. A rule that fails to compile for another
reason is too, with one warning.
"""

from optim.cpu_jit import codes as codes
from optim.cpu_jit.step import all_finite as all_finite
from optim.cpu_jit.step import step as step
from optim.cpu_jit.step import supports as supports
