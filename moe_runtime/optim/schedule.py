"""Schedules keyed to tokens."""
def lr_at(recipe, peak_lr, step, tokens):
    return peak_lr
def bias_gamma_at(recipe, tokens):
    return recipe.bias_gamma
def mtp_lambda_at(recipe, tokens):
    return recipe.mtp_lambda
