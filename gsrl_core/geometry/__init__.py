"""Rotations, rigid transforms, cameras and kinematics."""
