"""The scripted expert: picks an object up and lays it down, a memoryless function of the current state.

The phase follows from what can be seen (where objects and gripper are, how far the fingers are apart), never from a
counter, so that a policy which sees one picture can imitate it, and so that a slipped object is simply picked up again.
Goals blend into each other instead of switching: the gripper sinks as it comes to stand over the object, and moves
sideways as it gains height. Actions are proportional to the error of the measured TCP, which also removes the arm's
sag under gravity (13 mm): a delta on the last target integrates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.geometry.rotation import matrix_to_rotvec, quat_to_matrix, rotvec_to_matrix
from gsrl_core.sim.task import Plan

OPEN, CLOSE = 1.0, -0.5
_HOVER = 0.08
_CARRY = 0.10
_GRIP = 0.006
"""Fingers this much further apart than the object is wide hold it (m): they sink in, and it may be turned a little."""


@dataclass(frozen=True)
class Expert:
    """Turns privileged state into actions of ``pd_ee_target_delta_pose``."""

    plan: Plan
    """What to carry where."""
    max_step: float = 0.03
    """Longest translation of one action (m)."""
    max_turn: float = 0.05
    """Largest rotation of one action (rad)."""
    gain: float = 0.35
    """Fraction of the measured error that one action asks for."""

    def act(self, state: Mapping[str, Tensor]) -> Tensor:
        """Actions float32 [B, 7] from ``VecEnv.privileged()`` (poses are [B, 7]: position m, quaternion wxyz)."""
        plan = self.plan
        tcp, body, goal = (state[name][:, :3] for name in ("tcp_pose", f"{plan.pick}_pose", f"{plan.onto}_pose"))
        opening = state["qpos"][:, 7:].sum(dim=1)
        reach = body - tcp
        if any(plan.grasp):
            turn = quat_to_matrix(state[f"{plan.pick}_pose"][:, 3:])
            reach = reach + turn @ reach.new_tensor(plan.grasp)
        held = (opening < plan.width + _GRIP) & (reach.norm(dim=1) < 0.025)
        to_goal = goal[:, :2] - body[:, :2]
        aside = to_goal.norm(dim=1)
        height = body[:, 2] - goal[:, 2] - plan.height
        low = height < 0.008
        placed = (aside < plan.settled_within) & (height < 0.03) & (height > -0.02) & ~held

        pick_move, pick_grip = self._pick(reach)
        place_move = self._place(to_goal, aside, height)
        place_grip = torch.where((aside < plan.release_within) & low, OPEN, CLOSE)
        leave = torch.zeros_like(pick_move)
        leave[:, 2] = 0.08

        move = torch.where(held[:, None], place_move, torch.where(placed[:, None], leave, pick_move))
        grip = torch.where(held, place_grip, torch.where(placed, torch.full_like(pick_grip, OPEN), pick_grip))
        turn = self._turn(state["tcp_pose"][:, 3:], state[f"{plan.pick}_pose"][:, 3:], held | placed)
        return torch.cat(
            [_limited(self.gain * move, self.max_step), _limited(self.gain * turn, self.max_turn), grip[:, None]], dim=1
        )

    def _pick(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Move and gripper while the object is free: over it, down to it, close."""
        aside = reach[:, :2].norm(dim=1)
        funnel = ((aside - 0.008) / 0.03).clamp(0, 1)
        move = reach.clone()
        move[:, 2] += _HOVER * funnel
        # Low and beside the object: gain height before moving sideways.
        above = -reach[:, 2]
        move[:, :2] *= torch.where(aside > 0.03, ((above - 0.03) / 0.04).clamp(0, 1), torch.ones_like(aside))[:, None]
        near = (aside < 0.012) & (reach[:, 2].abs() < 0.012)
        return move, torch.where(near, CLOSE, OPEN)

    def _place(self, to_goal: Tensor, aside: Tensor, height: Tensor) -> Tensor:
        """Move while the object is held: up, over the goal, down."""
        funnel = ((aside - 0.01) / 0.05).clamp(0, 1)
        rise = _CARRY * funnel - height
        clear = ((height - 0.02) / 0.04).clamp(0, 1)
        sideways = torch.where(aside > 0.03, clear, torch.ones_like(clear))
        return torch.cat([to_goal * sideways[:, None], rise[:, None]], dim=1)

    def _turn(self, tcp_quat: Tensor, body_quat: Tensor, keep: Tensor) -> Tensor:
        """Rotation vector [B, 3] (base axes) that points the hand down with the fingers where the plan has them."""
        tcp = quat_to_matrix(tcp_quat)
        own = torch.atan2(tcp[:, 1, 0], tcp[:, 0, 0])
        yaw = own
        if self.plan.turns:
            body = quat_to_matrix(body_quat)
            step = 2 * torch.pi / self.plan.turns
            yaw = torch.atan2(body[:, 1, 0], body[:, 0, 0]) + self.plan.angle
            yaw = torch.remainder(yaw + step / 2, step) - step / 2
            yaw = torch.where(keep, own, yaw)
        upright = tcp.new_tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
        zero = torch.zeros_like(yaw)
        goal = rotvec_to_matrix(torch.stack([zero, zero, yaw], dim=1)) @ upright
        return matrix_to_rotvec(goal @ tcp.transpose(1, 2))


def _limited(vector: Tensor, longest: float) -> Tensor:
    length = vector.norm(dim=1, keepdim=True)
    return vector * (longest / length.clamp_min(longest))
