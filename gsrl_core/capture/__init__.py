"""Photos and video to posed pinhole images, sparse points and metric scale."""
