"""Selection of training rows: the methods, the run, explanations, and the audit."""
