"""The learning rate of each step."""

import math

from deep_delta.train.recipe import Recipe


def rate_factor(recipe: Recipe, step: int) -> float:
    """The learning rate of a step, counted from 0, over the recipe's lr.

    Linear warm-up whose last of `warmup_steps` has the full rate, then a cosine that ends at
    `min_lr_ratio`.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * (1 - recipe.min_lr_ratio) + recipe.min_lr_ratio
