"""Behind the command's flags: choices checked all at once, the run directory claimed, and how it ends."""
