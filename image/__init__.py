"""Builds what the VM boots from and what its containers are made of; `python3 -m image --help`.

Runs with Debian's own Python and the standard library alone, as root. Nothing here runs in the VM.
"""
