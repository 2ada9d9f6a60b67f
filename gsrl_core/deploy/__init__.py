"""From a checkpoint to a moving arm: limits, safety envelope, policy server and client, robot, control loop."""
