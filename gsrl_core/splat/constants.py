"""Numbers that every rasteriser must share, so that they draw the same picture.

They are those of gsplat 1.5.3 in its "classic" mode (gsplat/cuda/include/Common.h and rendering.py).
"""

EPS2D = 0.3
"""Added to both diagonal entries of the projected covariance (px^2): a low-pass filter of about one pixel."""
NEAR_PLANE = 0.01
"""Gaussians whose centre is nearer along the camera's z axis are not drawn (m)."""
FAR_PLANE = 1e10
"""Gaussians whose centre is farther are not drawn (m)."""
FRUSTUM_MARGIN = 0.3
"""The Jacobian is evaluated at x/z, y/z clamped to the image enlarged by this fraction of half its size per side."""
ALPHA_MAX = 0.999
"""A single Gaussian never covers more than this."""
ALPHA_MIN = 1.0 / 255.0
"""Contributions below this are skipped."""
TRANSMITTANCE_MIN = 1e-4
"""A pixel is finished before the Gaussian that would leave at most this much light through; that one is not drawn."""
TILE_SIZE = 16
"""Edge of the square tiles that the fast rasterisers bin into (px)."""
SURFACE_ALPHA = 0.5
"""Where the static part covers more than this it has a surface that can hide bodies."""
CONTACT_TOLERANCE = 0.01
"""Bodies are hidden only this far behind the static surface (m): where one stands on the table, the mean depth of a
pixel is not known better, and bodies must not sink in."""
RADIUS_SIGMAS = 3.33
"""Radius of a Gaussian of opacity o in standard deviations: min(this, sqrt(2 ln(o / ALPHA_MIN)))."""
