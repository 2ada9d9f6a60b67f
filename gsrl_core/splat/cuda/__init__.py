"""The batched renderer's CUDA kernels, how they are built, and how Python calls them."""
