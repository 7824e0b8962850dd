"""The log forwarder: what the kernel and the VM's programs log becomes LogRecords for the host."""
