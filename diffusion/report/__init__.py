"""Image grids and plots of results."""
