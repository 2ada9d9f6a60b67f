"""Real2Sim2Real: photographed bench -> 3D Gaussian scene -> splat-rendered simulation -> policy RL -> robot package.

Conventions everywhere: metres, radians, seconds; OpenCV cameras (x right, y down, z forward) with a full K;
quaternions wxyz; images uint8 RGB ``[..., H, W, 3]``; frames named in variables (``base_from_scan`` maps scan
coordinates into base coordinates, ``world_to_camera`` likewise).
"""

__version__ = "0.1.0"
