"""What is baked into the guest: PID 1, maitred, tremplin, and the few modules they share."""
