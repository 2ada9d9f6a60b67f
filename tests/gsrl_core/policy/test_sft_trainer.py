"""Schedule and identity of a run; the loop itself is tested with data in tests/gsrl_core/test_sft.py."""

import pytest
from policy_examples import SMALL, randomised

from gsrl_core.policy.sft_trainer import deciding, learning_rate, trained_parameters
from gsrl_core.sections import SftConfig


def test_learning_rate_schedule():
    config = SftConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(110, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    short = SftConfig(steps=20, decay_steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(step, short) for step in (15, 60, 200)] == [
        *(learning_rate(s, config) for s in (15, 60)),
        0.1,
    ]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"checkpoint_every": 7}, True),
        ({"gradient_checkpointing": True}, True),
        ({"steps": 200}, False),
        ({"seed": 1}, False),
        ({"micro_batch": 8}, False),
    ],
)
def test_what_decides_the_numbers_of_past_steps(change, same):
    first = SftConfig(steps=100)
    assert (deciding(first) == deciding(SftConfig(**({"steps": 100} | change)))) == same


def test_steps_decide_nothing_past_where_the_schedule_does_not_follow_them():
    assert deciding(SftConfig(steps=10, decay_steps=50)) == deciding(SftConfig(steps=20, decay_steps=50))
    assert deciding(SftConfig(steps=10, decay_steps=50)) != deciding(SftConfig(steps=10, decay_steps=60))


def test_the_expert_is_what_ppo_trains():
    network = randomised(SMALL)
    assert trained_parameters(network, SftConfig(trainable="expert")).keys() == network.trainable_in_ppo().keys()
    assert trained_parameters(network, SftConfig()).keys() == dict(network.named_parameters()).keys()
