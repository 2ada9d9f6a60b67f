"""Learning: returns, losses, rollouts and PPO of chunk policies. Axis legend: T chunks, B environments, N samples."""
