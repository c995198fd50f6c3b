"""Denoising diffusion from maximum likelihood: DDPM (arXiv:2006.11239) to DDIM (arXiv:2010.02502), in JAX."""
