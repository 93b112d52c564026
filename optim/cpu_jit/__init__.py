"""Steps on the CPU, compiled from the rules' own definition: `UpdateRule.update`, traced once, as one loop over memory.

A step is bound by memory, and tensor operations move every parameter through memory a dozen times. Here the operations
of `update` and `decay` are recorded (`trace`), turned into LLVM assembly (`assembly`) and compiled by llvmlite, at the
first step of a rule, in about 0.1 s. Learning rate, weight decay and the numbers that the rule computes with stay
variables: a scheduled momentum is traced again at each change, in a few milliseconds, and not compiled again. All
tensors of a param group are stepped by one call, spread over ``torch.get_num_threads()`` threads; results do not depend
on their number.

A tensor that a rule must read several times is stepped as a whole by one thread if it fits into a cache. The check that
gradients are finite, which rules with ``elementwise = False`` need, is part of the first of these readings. What a
branch of ``torch.where`` needs is not read where its scalar condition chooses the other branch.

Everything that cannot be compiled is stepped by `UpdateRule.step`, tensor by tensor: rules with operations that have no
element loop (products of matrices), rules that call themselves elementwise and read the shape, rules that override
`step` or have a field that cannot be hashed, tensors that are not dense or not on the CPU, subclasses such as DTensor,
and everything if llvmlite is missing or OPTIM_BACKEND=torch is set. A rule that fails to compile for another reason is
stepped that way too, with one warning.
"""

from optim.cpu_jit import codes as codes
from optim.cpu_jit.step import all_finite as all_finite
from optim.cpu_jit.step import step as step
from optim.cpu_jit.step import supports as supports
