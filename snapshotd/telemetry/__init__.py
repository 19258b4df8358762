"""How the daemon is, told to people, collectors and the service manager."""
