"""Simulation: the FR3 and PutCubeOnPlate in SAPIEN, physics worker processes, and environments rendered by splats."""

import warnings

# SAPIEN looks for Vulkan when it is imported; only raster_sapien.py draws with it.
warnings.filterwarnings("ignore", message="Failed to find system libvulkan")
