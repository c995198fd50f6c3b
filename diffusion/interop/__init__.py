"""Other projects' weights: their files and names for ours, and back."""
