"""How good a model is: likelihood, tasks, comparisons, and how sure the figures are."""
