"""Steps on the CPU, compiled from the rules' own definition: `UpdateRule.update`, traced once, becomes one loop.

The speed of a step is limited by memory bandwidth, and tensor operations move every parameter through memory about a
dozen times. Here the operations of `update` and `decay` are recorded (`trace`), turned into LLVM assembly (`assembly`)
and compiled by llvmlite. This happens at the first step of a rule and takes about 0.1 s. The learning rate, the weight
decay and the numbers that the rule computes with remain variables: when a scheduled momentum changes, the step is
traced again, which takes a few milliseconds, but not compiled again. One call steps all tensors of a param group, on
``torch.get_num_threads()`` threads; results do not depend on the number of threads.

A tensor that a rule must read several times is stepped as a whole by one thread if it fits into a cache. The check that
gradients are finite, which rules with ``elementwise = False`` need, is part of the first pass. Values that only one
branch of ``torch.where`` needs are not read if its scalar condition selects the other branch.

Everything that cannot be compiled is stepped by `UpdateRule.step`, tensor by tensor. These are rules with operations
that have no elementwise loop (matrix products), rules that are declared elementwise but read the shape, rules that
override `step` or have an unhashable field, tensors that are not dense or not on the CPU, and subclasses such as
DTensor; without llvmlite, or with OPTIM_BACKEND=torch, these are all rules and tensors. A rule that fails to compile
for another reason is stepped in the same way, with one warning.
"""

from optim.cpu_jit import codes as codes
from optim.cpu_jit.step import all_finite as all_finite
from optim.cpu_jit.step import step as step
from optim.cpu_jit.step import supports as supports
