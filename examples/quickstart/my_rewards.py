"""Rewards of one's own. A config names them `fn: examples/quickstart/my_rewards.py:terse`; nothing else is needed."""


def terse(completion: str, *, worked: float = 0.0) -> float:
    """1 for answering at once, `worked` for showing a calculation first. The policy stops (or starts) to reason."""
    before_the_answer = completion.partition("\\boxed{")[0]
    return worked if "=" in before_the_answer else 1.0
