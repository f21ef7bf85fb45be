"""What a terminal shows: progress, meters, tables, and the options of light commands."""
