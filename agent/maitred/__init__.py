"""The Maitred service: turns the host's calls into calls of one module per subject."""
