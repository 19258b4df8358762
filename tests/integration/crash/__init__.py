"""Every fault point struck with SIGKILL in a real job, and every byte compared afterwards."""
