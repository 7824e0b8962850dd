"""The remote shell (vsh): sessions in the VM for a person or a program on the host."""
