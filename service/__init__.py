"""The roof: the gateway, its sessions, the processes and the command line."""
