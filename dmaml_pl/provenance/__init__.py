"""Where a training comes from: versions, machine, commit, and the commands that repeat it."""
