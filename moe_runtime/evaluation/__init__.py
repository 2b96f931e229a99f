"""How good a model is: likelihood, tasks, and how sure the figures are."""
