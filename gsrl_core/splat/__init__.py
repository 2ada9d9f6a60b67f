"""3D Gaussians: files, scenes and rasterisers."""
