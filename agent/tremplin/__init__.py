"""The Tremplin service: LXD and its containers, driven by the host."""
