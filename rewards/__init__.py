"""Rewards: groups in, components and totals out. A family of reward functions is a file and a line here."""

from rewards import format, length, math_answer, repetition  # noqa: F401  (importing registers)
