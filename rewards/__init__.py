"""Rewards: groups in, components and totals out. A family of reward functions is a file and a line here."""

from rewards import (  # noqa: F401  (importing registers)
    choices,
    format,
    judge,
    length,
    math_answer,
    process_reward,
    repetition,
    reward_model,
)
