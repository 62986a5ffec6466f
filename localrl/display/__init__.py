"""Shows people what a process is doing: one line on a terminal, plain lines elsewhere."""
